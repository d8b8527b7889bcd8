"""Two models that are asked the same, timed in turn on it, and what pruning has left of them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..architectures import find_groups
from ..checkpoint import load_pruned
from ..errors import PruningError, UnsupportedModelError
from ..plan import read_record
from ..report import Measurement, Report, compare_latency, count, torch_subject, torch_threads
from ..report.subjects import evaluating
from .answers import Asked, Head, Row, head_of_model, load_processor
from .finding import Place, dense_places, load_dense, pruned_folder

_SECONDS, _ROUNDS = 1.5, (5, 50)  # for which both are timed about, and how often at least and at most
_SHOWN = {"head", "kv_group", "neuron"}  # kinds of units; others where some are gone


class Compared(NamedTuple):
    """What the models answer, and what that costs them."""

    rows: list[Row]
    report: Report


@dataclass
class Pair:
    """A pruned model, and its dense one where that was found.

    Args:
        folder: Of the pruned model.
        dense: Where the dense model lies; ``None``: it was not found.
        models: ``"dense"`` (where there is one) and ``"pruned"``.
        head: How they are asked.
        processor: Tokenizer or image processor.
        report: What was kept, and what both cost.
        notes: What a reader must know.
    """

    folder: Path
    dense: str | None
    models: dict[str, Any]
    head: Head
    processor: Any
    report: Report
    notes: list[str] = field(default_factory=list)

    def compare(self, *given: Any) -> Compared:
        """Ask both models, and time one forward of each on the same input, in turn, with one thread.

        Args:
            *given: One text, two for a pair, or an image of PIL.

        Raises:
            PruningError: Nothing was given, or no token to be found.
        """
        inputs = self.head.prepare(self.processor, self.models["pruned"], *given)
        with ExitStack() as stack:
            stack.enter_context(torch_threads(1))
            for model in self.models.values():
                stack.enter_context(evaluating(model))
            logits = {name: model(**inputs).logits[0] for name, model in self.models.items()}
            rows = list(self.head.answer(Asked(self.models, self.processor, inputs, logits)))
            times = _latency(self.models, inputs)
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else None
        told: dict[str, Any] = {"batch": 1, "length": length, "threads": 1}
        costs: dict[str, Any] = {
            name: replace(self.costs[name], latency_ms={"torch": time}, **told) for name, time in times.items()
        }
        return Compared(rows, replace(self.report, **costs))

    @property
    def costs(self) -> dict[str, Measurement]:
        """What was counted of each model."""
        both = {"dense": self.report.dense, "pruned": self.report.pruned}
        return {name: one for name, one in both.items() if one is not None}

    def example(self) -> Any:
        """Return what the page begins with."""
        return self.head.example(self.processor, self.models["pruned"])


def _latency(models: dict[str, Any], inputs: Any) -> dict[str, float]:
    runs = {name: torch_subject(model, inputs, 1, 1).run for name, model in models.items()}
    once = compare_latency(runs, repeats=1, warmup=1)
    rounds = int(min(max(1000 * _SECONDS / sum(once.values()), _ROUNDS[0]), _ROUNDS[1]))
    return compare_latency(runs, repeats=rounds, warmup=1)


def load_pair(folder: str | Path, dense: str | None = None) -> Pair:
    """Load a pruned model, and the dense one that it was made from.

    Args:
        folder: A run's folder, or that of a saved model.
        dense: Folder or Hub name of the dense model; by default what the folder's files say, as far as it is on this
            machine. Where it is not, the pruned model stands alone, and a note says so.

    Raises:
        PruningError: There is no such folder, its model is of another kind, or `dense` is not its dense model.
    """
    place = pruned_folder(folder)
    pruned = load_pruned(place, dtype=torch.float32).eval()
    head = head_of_model(pruned)
    found, where, notes = _find_dense(place, pruned, dense)
    folders: list[str | Path] = [place, *([where] if where else [])]
    report = _report(pruned, found, notes)
    models = {**({"dense": found} if where else {}), "pruned": pruned}
    return Pair(place, where, models, head, load_processor(head, folders, pruned), report, notes)


def _find_dense(place: Path, pruned: Any, told: str | None) -> tuple[Any, str | None, list[str]]:
    if told is not None:
        return load_dense(Place(told, "--dense"), pruned, fetch=True), told, []
    reasons = []
    for one in dense_places(place):
        try:
            return load_dense(one, pruned), one.name, []
        except PruningError as error:
            reasons.append(str(error))
    why = "; ".join(reasons) or "its files name none"
    return None, None, [f"The dense model was not found, so the pruned one is shown alone: {why}. --dense names it."]


def _report(pruned: Any, dense: Any, notes: list[str]) -> Report:
    counted: dict[str, Any] = {
        name: count(model) for name, model in (("dense", dense), ("pruned", pruned)) if model is not None
    }
    try:
        record, live = read_record(pruned), find_groups(pruned)
    except UnsupportedModelError as error:
        notes.append(f"What was kept cannot be shown: {error}")
        return Report(**counted)
    whole = record.dense_groups(live)
    kinds = _SHOWN | {group.kind for group in whole if group.name in record}
    left = {group.name: record.dense_numbers(group) for group in live}
    units = {group.name: group.units for group in whole if group.kind in kinds}
    return Report({name: left.get(name, []) for name in units}, units, **counted)
