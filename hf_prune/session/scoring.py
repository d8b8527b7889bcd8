"""From evidence to numbers: scores of units and of single weights; never one that is not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import PruningError
from ..evidence import EVIDENCE, Calibration, Evidence, Loss, MissingEvidence, backward_all
from ..evidence.calibration import evaluating, model_loss, on_device
from ..live import LiveModel, Masking
from ..scores import Score
from ..sharding import join, part_of
from ..structure import Group
from .tasks import Task, Tasks

T = TypeVar("T")


def make_evidence(tasks: Tasks, live: LiveModel, seed: int) -> dict[str, Evidence]:
    """Make each kind of evidence that any task's scores need, by name."""
    kinds = {EVIDENCE[need]: None for task in tasks for need in sorted(task.needs)}
    found = {}
    for kind in kinds:
        mine = [task for task in tasks if any(EVIDENCE[need] is kind for need in task.needs)]
        groups = [name for task in mine for name in task.groups]
        weights = [name for task in mine for name in task.weights]
        found[kind.name] = kind(live, groups, weights, seed)
    return found


class Scorer:
    """Scores of a live model, from evidence.

    Args:
        live: The live model.
        masking: What is masked of it: masked weights are scored by the values that may come back.
        evidence: By name.
    """

    def __init__(self, live: LiveModel, masking: Masking, evidence: Mapping[str, Evidence]) -> None:
        self.live, self.masking, self.evidence = live, masking, evidence
        self._held: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Read gradients that are as many times too large."""
        for one in self.evidence.values():
            one.scale = scale
        try:
            yield
        finally:
            for one in self.evidence.values():
                one.scale = 1.0

    def synchronize(self) -> None:
        """Let all processes hold the same evidence, so that they decide the same."""
        for one in self.evidence.values():
            one.synchronize()

    def read(self, ahead: Iterable[str]) -> None:
        """Read gradients that are complete.

        Args:
            ahead: Names of all groups and parameters whose masks will still change.
        """
        for one in self.evidence.values():
            try:
                one.read(self.masking, set(ahead))
            except MissingEvidence as missing:
                raise PruningError(f"Evidence '{one.name}' needs {_without_stop(missing)}. Received: none") from None

    def hold(self, tasks: Iterable[Task]) -> None:
        """Hold the scores of these tasks' weights, which change masks next: gradients will be gone."""
        for task in tasks:
            for name, score in task.scores.items():
                held = self.weights(score, task.weights)
                self._held.update({(name, parameter): values for parameter, values in held.items()})

    def take(self, task: Task, *, unread: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return the scores of a task's weights that were held, or those of now: by score and parameter.

        Args:
            task: Whose weights.
            unread: Whether no evidence sees training steps.
        """
        wanted = {(name, parameter) for name in task.scores for parameter in task.weights}
        if not self._held.keys() >= wanted:
            if unread or not task.waits:
                self.read(task.weights)
            self.hold([task])
        return {
            name: {parameter: self._held.pop((name, parameter)) for parameter in task.weights} for name in task.scores
        }

    def calibrate(
        self,
        data: Iterable[Mapping[str, Any]],
        loss: Loss | None,
        tasks: Sequence[Task],
        units: Iterable[tuple[Score, Group]],
        leaving: int | None = None,
    ) -> dict[str, Tensor]:
        """Take all evidence, and scores of weights, from calibration data; gradients stay as they are.

        Args:
            data: Batches.
            loss: From (model, batch) to a loss; ``None``: the model's own.
            tasks: Whose weights are scored: those that are due, as what is held stays until it is taken.
            units: Scores, and the groups whose units are scored by them.
            leaving: How many units leave now, where one pruner says it.

        Returns:
            The scores of groups whose units are scored by their weights: gradients are gone afterwards.
        """
        data = self._measure(data, loss, leaving)
        evidence = [one for one in self.evidence.values() if one.takes != "data"]
        if not evidence:
            return {}
        model = self.live.model
        saved = {parameter: parameter.grad for parameter in model.parameters()}
        model.zero_grad(set_to_none=True)
        for one in evidence:
            one.reset()
            one.start()
        try:
            with self.scaled(backward_all(model, data, loss, evidence)):
                self.synchronize()
                self.read([name for task in tasks for name in task.weights])
                self.hold(tasks)
                return {group.name: self.units(score, group) for score, group in units if score.of == "weight"}
        finally:
            for one in evidence:
                one.stop()
            for parameter, gradient in saved.items():
                parameter.grad = gradient

    def _measure(self, data: Iterable[Mapping[str, Any]], loss: Loss | None, leaving: int | None) -> Any:
        """Let evidence that goes through data by itself do so; return the data, to be gone through once more."""
        mine = [one for one in self.evidence.values() if one.takes == "data"]
        if not mine:
            return data
        model = self.live.model
        device = next(model.parameters()).device
        batches = [on_device(batch, device) for batch in data]
        if not batches:
            raise PruningError("data must hold at least one batch. Received: none")
        told = Calibration(batches, functools.partial(loss or model_loss, model), self.masking.units, leaving)
        with evaluating(model):
            for one in mine:
                one.measure(told)
        return batches

    def units(self, score: Score, group: Group) -> Tensor:
        """Return one score for each unit of a group, ``(units,)``.

        Raises:
            PruningError: One is not finite.
        """
        if score.of == "unit":
            needed = {need: self._ask(score, need, lambda one, need: one.of_units(need, group)) for need in score.needs}
            values = _shaped(score, group.name, score.function(**needed), torch.Size([group.units]))
            return _finite(score, group.name, values.double().cpu())
        return _finite(score, group.name, self._summed(score, group))

    def weights(self, score: Score, names: Sequence[str]) -> dict[str, Tensor]:
        """Return scores of every weight of these parameters, of their shapes; under FSDP of the local shards.

        Raises:
            PruningError: One is not finite.
        """
        tensors = self.live.tensors
        found = ((name, _finite(score, name, self._weight(score, name, tensors[name]))) for name in names)
        return {name: part_of(values, tensors[name]) for name, values in found}

    def _summed(self, score: Score, group: Group) -> Tensor:
        """Sum the scores of all weights that a unit owns."""
        total, tensors = torch.zeros(group.units, dtype=torch.float64), self.live.tensors
        for part in (one for one in group.slices if not one.adapter):
            entries = self._weight(score, part.parameter, tensors[part.parameter]).double()
            rows = entries.movedim(part.dim, 0).flatten(1).sum(1) if entries.ndim > 1 else entries
            index = part.index(torch.arange(group.units), group.per_part)
            total += rows.cpu()[index].view(group.units, part.per_unit).sum(1)
        for unit, path in enumerate(group.modules):
            for name, weight in self.live.model.get_submodule(path).named_parameters(prefix=path):
                total[unit] += self._weight(score, name, weight).double().sum().cpu()
        return total

    @torch.no_grad()
    def _weight(self, score: Score, name: str, weight: Tensor) -> Tensor:
        """Return the scores of one tensor: whole in every process, as a score may compare weights with each other."""
        needed = {
            need: self._ask(score, need, lambda one, need: one.of_weight(need, name, weight)) for need in score.needs
        }
        whole = join(self.masking.full(name, weight), weight).float()
        return _shaped(score, name, score.function(whole, **needed), whole.shape)

    def _ask(self, score: Score, need: str, ask: Callable[[Evidence, str], Tensor]) -> Tensor:
        try:
            return ask(self.evidence[EVIDENCE[need].name], need)
        except MissingEvidence as missing:
            raise PruningError(f"Score '{score.name}' needs {_without_stop(missing)}. Received: none") from None


def _without_stop(missing: MissingEvidence) -> str:
    return str(missing).rstrip(".")


def _shaped(score: Score, name: str, values: Any, shape: torch.Size) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != shape:
        received = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise PruningError(
            f"Score '{score.name}' must return a tensor with one value for each {score.of} of '{name}', of shape "
            f"{tuple(shape)}. Received: {received}"
        )
    return values


def _finite(score: Score, name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise PruningError(
            f"Score '{score.name}' of '{name}' is not finite; nothing was cut. Received: {bad} such values of "
            f"{values.numel():,}"
        )
    return values
