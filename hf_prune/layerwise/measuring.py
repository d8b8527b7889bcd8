"""What each layer's heads, neurons, branches and the layer itself are worth: the loss without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..allocation import select_units
from ..errors import PruningError
from ..evidence import EVIDENCE, Loss
from ..evidence.calibration import evaluating, model_loss, on_device
from ..given import check_data, check_model
from ..live import LiveModel, Masking, masked_for_now
from ..pruners import ChannelPruner, ExpertPruner, HeadPruner, NeuronPruner, UnitPruner
from ..schedules import Schedule
from ..session.scoring import Scorer, make_evidence
from ..session.tasks import Tasks, make_tasks
from ..sharding import check_whole
from ..structure import Group, Kept
from .effects import WHOLE, Effect, Sensitivity

SHARES = (0.25, 0.5, 0.75)
_PRUNERS: tuple[type[UnitPruner], ...] = (HeadPruner, NeuronPruner, ExpertPruner, ChannelPruner)
_INSIDE_EXPERTS = "*experts.[0-9]*"  # hundreds of places with little in each: whole experts are looked at instead


class Attempt(NamedTuple):
    """What is masked in one evaluation."""

    place: str
    kind: str
    share: float
    removed: int
    units: int
    kept: Kept


def sensitivity(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    shares: Sequence[float] = SHARES,
    score: str | Callable[..., Tensor] = "taylor",
    batches: int = 8,
    loss: Loss | None = None,
    seed: int = 0,
) -> Sensitivity:
    """Measure how much the loss rises when parts of each layer go, one part at a time.

    Of each layer shares of its heads (KV groups, experts, channels) and neurons are masked, those that the score puts
    last; then each whole branch and each whole layer. Nothing is trained. Afterwards the model is bit for bit what it
    was, also where it was interrupted.

    Args:
        model: A transformers model.
        data: Batches with labels, such as a DataLoader.
        shares: Of a layer's units that go, each in (0, 1).
        score: A registered name, or a function, as in `Pruner`.
        batches: Use so many batches of `data` at most, 1 or more.
        loss: From (model, batch) to a loss; ``None``: the model's own.
        seed: For scores that draw numbers.

    Returns:
        The loss of the whole model and without each part: to print, to write as CSV, to plot.

    Raises:
        PruningError: A share is out of range, there is no batch, or batches do not fit the model.

    Example:
        >>> print(sensitivity(model, loader))  # doctest: +SKIP
        >>> sensitivity(model, loader).plot("sensitivity.png")  # doctest: +SKIP
    """
    check_model(model)
    check_whole(model)
    taken = _batches(data, batches, next(model.parameters()).device)
    _check_shares(shares)
    live = LiveModel(model)
    pruners = _pruners_for(live.groups, score)
    with evaluating(model):
        scores = _scores(live, pruners, taken, loss, seed)
        dense = _mean_loss(model, taken, loss)
        attempts = list(_attempts(live, scores, shares))
        effects = [_effect(live, one, taken, loss, dense) for one in _with_progress(attempts)]
    named = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    return Sensitivity(dense, tuple(effects), named, len(taken))


# what there is to mask
def _pruners_for(groups: Sequence[Group], score: Any) -> list[UnitPruner]:
    found = [sort(score=score, exclude=[_INSIDE_EXPERTS]) for sort in _PRUNERS]
    return [one for one in found if any(group.kind in one.kinds(groups) and one.wants(group.name) for group in groups)]


def _attempts(live: LiveModel, scores: Mapping[str, Tensor], shares: Sequence[float]) -> Iterator[Attempt]:
    """Yield what is masked, one after the other: shares of units, whole branches, whole layers."""
    for group in live.groups:
        if group.name in scores:
            yield from _shares_of(group, scores[group.name], shares)
        elif group.kind == "branch":
            yield Attempt(group.place, group.kind, WHOLE, 1, 1, {group.name: []})
        elif group.kind == "layer" and group.units > group.least:  # the last one stays
            kept_before = live.record[group.name][0] if group.name in live.record else range(group.units)
            for unit, number in enumerate(kept_before):
                others = [one for one in range(group.units) if one != unit]
                yield Attempt(f"{group.name}.{number}", group.kind, WHOLE, 1, group.units, {group.name: others})


def _shares_of(group: Group, score: Tensor, shares: Sequence[float]) -> Iterator[Attempt]:
    everything, limits = torch.ones(group.units, dtype=torch.bool), ({group.name: group.least}, {group.name: 1})
    for share in shares:
        many = round(share * group.units)
        named = {group.name: group}
        chosen = select_units(
            named,
            {group.name: score},
            {group.name: everything},
            {group.name: 1.0},
            many,
            min_kept=limits[0],
            multiple_of={group.name: group.multiple},
        )[group.name]
        removed = int((~chosen).sum())
        if 0 < removed < group.units:
            kept = {group.name: chosen.nonzero().view(-1).tolist()}
            yield Attempt(group.place, group.kind, share, removed, group.units, kept)


# what it is worth
def _scores(
    live: LiveModel, pruners: Sequence[UnitPruner], data: Sequence[Any], loss: Loss | None, seed: int
) -> dict[str, Tensor]:
    """Return ``(units,)`` scores of every group that shares are taken of."""
    tasks: Tasks = make_tasks(pruners, live, Schedule("oneshot", begin=1, end=1), 1)
    scorer = Scorer(live, Masking(live), make_evidence(tasks, live, seed))
    units = [(task.score, group) for task in tasks for group in live.groups if group.name in task.groups]
    ready: dict[str, Tensor] = {}
    if any(EVIDENCE[need].from_data for task in tasks for need in task.needs):
        ready = scorer.calibrate(data, loss, tasks.weights, units)
    return {group.name: ready[group.name] if group.name in ready else scorer.units(one, group) for one, group in units}


def _effect(live: LiveModel, one: Attempt, data: Sequence[Any], loss: Loss | None, dense: float) -> Effect:
    with masked_for_now(live, one.kept):
        without = _mean_loss(live.model, data, loss)
    return Effect(one.place, one.kind, one.share, one.removed, one.units, without, without - dense)


@torch.no_grad()
def _mean_loss(model: nn.Module, data: Sequence[Any], loss: Loss | None) -> float:
    return sum(float((loss or model_loss)(model, batch)) for batch in data) / len(data)


def _batches(data: Iterable[Mapping[str, Any]], limit: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the first batches, on the model's device: they are gone through many times."""
    check_data(data)
    if limit < 1:
        raise PruningError(f"batches must be 1 or more. Received: {limit}")
    taken = list(islice(data, limit))
    if not taken:
        raise PruningError("data must hold at least one batch. Received: none")
    return [on_device(batch, device) for batch in taken]


def _check_shares(shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 < share < 1:
            hint = f" Did you mean {share / 100:g}?" if 1 < share < 100 else ""
            raise PruningError(f"shares must each be in (0, 1); whole branches go anyway. Received: {share:g}.{hint}")


def _with_progress(attempts: Sequence[Attempt]) -> Iterator[Attempt]:
    from transformers.utils import logging  # its switch for progress bars is ours

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, markup=False, emoji=False)
    with Progress(*columns, console=console, transient=True, disable=not logging.is_progress_bar_enabled()) as progress:
        shown = progress.add_task("Sensitivity", total=len(attempts))
        for one in attempts:
            progress.update(shown, description=f"Without {one.place}")
            yield one
            progress.advance(shown)
