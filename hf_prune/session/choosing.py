"""Which units and weights stay: from scores, from what is there and how much is due. Nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..allocation import bundles_of, select_units
from ..live import Units
from ..masks import Masks, entries_left, keep_entries, vectors_by_tensor
from ..patterns import PATTERNS
from ..pruners import Pruner, WeightPruner
from ..registry import takes
from ..sharding import any_sharded, join, part_of, select_across
from ..structure import Group, KeepVectors, Kept
from .budgets import Budget
from .tasks import Task

Scores = Mapping[str, Tensor]
Stays = Mapping[str, Mapping[int, Tensor]]  # tensor -> axis -> which of its entries are of units that are there
Check = Callable[[Kept], None]
_TENSOR_BY_TENSOR = ("global", "uniform")  # allocations that look at one tensor at a time


# units
def choose_together(
    tasks: Sequence[Task],
    units: Units,
    scores: Scores,
    budget: Budget,
    share: float,
    position: int,
    check: Check,
    limit: float = 1.0,
) -> Units:
    """One ranking over all tasks, down to a share of the dense model's cost.

    Args:
        tasks: Those that remove units; they have one schedule.
        units: What is there.
        scores: ``(units,)`` by group.
        budget: What units cost.
        share: Of the dense model's cost that remains in the end, in (0, 1].
        position: Of the schedule.
        check: Raises where a plan cannot be.
        limit: How much of the way may be gone then, in [0, 1].
    """
    goal = (1 - (1 - share) * min(limit, tasks[0].fraction(position))) * budget.dense
    groups = [group for task in tasks for group in units.named(task.groups)]
    last, limits = limit >= 1 and all(position >= task.last_change for task in tasks), _limits(tasks, units)
    kept = budget.choose(units, groups, scores, goal, limits, last) if budget.left(units) > goal or last else None
    if kept is not None:
        check(kept)
        return units.keep(kept)
    before, now = math.inf, budget.left(units)
    # again: a matrix between two groups (two convolutions, an LSTM's hidden weights) has counted twice
    while goal < now < before:
        costs, values = budget.costs(units, groups), dict[str, Tensor]()
        for task in tasks:
            names = [group.name for group in units.named(task.groups)]
            values |= task.pruner.allocate()({name: scores[name] for name in names}, {n: costs[n] for n in names})
        units = _select(units, groups, values, costs, now - goal, limits, last, check)
        before, now = now, budget.left(units)
    return units


def choose_alone(
    task: Task,
    units: Units,
    scores: Scores,
    dense_units: Mapping[str, int],
    position: int,
    check: Check,
    limit: float = 1.0,
) -> Units:
    """One task's own sparsity, counted in units of the dense model; or its threshold."""
    groups = units.named(task.groups)
    if task.pruner.threshold is not None:
        return _choose_above(task, units, scores, position, check, limit)
    costs = {group.name: 1.0 for group in groups}
    excess = due_to_leave(task, units, dense_units, position, limit)
    values = task.pruner.allocate()({name: scores[name] for name in costs}, costs)
    last = limit >= 1 and position >= task.last_change
    return _select(units, groups, values, costs, excess, _limits([task], units), last, check)


def due_to_leave(task: Task, units: Units, dense_units: Mapping[str, int], position: int, limit: float = 1.0) -> int:
    """Return how many units must leave for one task's own sparsity, at this position of the schedule."""
    now = sum(int(units.alive[group.name].sum()) for group in units.named(task.groups))
    left = 1 - task.sparsity * min(limit, task.fraction(position))
    return round(now - left * sum(dense_units[name] for name in task.groups))


def _choose_above(task: Task, units: Units, scores: Scores, position: int, check: Check, limit: float) -> Units:
    """Let units leave whose score is up to a threshold; those that can only leave together by their mean."""
    limits, kept = _limits([task], units), dict[str, list[int]]()
    for group in units.named(task.groups):
        alive, values = units.alive[group.name].clone(), scores[group.name]
        most = task.threshold(values[alive], position, limit)
        for bundles in bundles_of(group, values, units.alive[group.name], 1.0, *limits[group.name]):
            alive[bundles.units[bundles.values <= most].flatten()] = False
        kept[group.name] = alive.nonzero().view(-1).tolist()
    check(kept)
    return units.keep(kept)


def _limits(tasks: Sequence[Task], units: Units) -> dict[str, tuple[int, int]]:
    """Return for each group how many units stay in a part at least, and of what their number is a multiple."""
    found = [(task.pruner, group) for task in tasks for group in units.named(task.groups)]
    return {group.name: (pruner.floor(group), at_once(pruner, group)) for pruner, group in found}


def at_once(pruner: Pruner, group: Group) -> int:
    """Return how many units of a part of a group leave together."""
    return math.lcm(pruner.multiple_of, group.multiple)


def _select(
    units: Units,
    groups: Sequence[Group],
    values: Scores,
    costs: Mapping[str, float],
    excess: float,
    limits: Mapping[str, tuple[int, int]],
    last: bool,
    check: Check,
) -> Units:
    alive = {group.name: units.alive[group.name] for group in groups}
    floors, multiples = ({name: limit[k] for name, limit in limits.items()} for k in (0, 1))
    by_name = {group.name: group for group in groups}
    chosen = select_units(by_name, values, alive, costs, excess, min_kept=floors, multiple_of=multiples, last=last)
    kept = {name: mask.nonzero().view(-1).tolist() for name, mask in chosen.items()}
    check(kept)
    return units.keep(kept)


# single weights
def choose_weights(
    task: Task,
    scores: Mapping[str, Scores],
    masks: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    vectors: KeepVectors,
    position: int,
    limit: float = 1.0,
) -> tuple[Masks, int]:
    """Mask the weights that are worth least, over all of a task's tensors; those of removed units do not count.

    Args:
        task: How many, by which allocation, pattern and rule.
        scores: Of each weight, by parameter, under FSDP of the local shards: its own under ``""``, and its rule's.
        masks: What is masked already.
        given: What stays masked whatever the rule.
        tensors: The live tensors by name.
        vectors: Which of their entries are of units that are there.
        position: Of the schedule.
        limit: How much of the way may be gone then, in [0, 1].

    Returns:
        The new masks, and a number that is the same in every process, where parts lie in several.
    """
    pruner, threshold = task.pruner, 0
    assert isinstance(pruner, WeightPruner)
    ours = {name: tensors[name] for name in task.weights}
    stays_in = vectors_by_tensor(vectors)
    there = {name: keep_entries(tensors[name], stays, None) for name in ours if (stays := stays_in.get(name))}
    total = entries_left(ours, tensors, vectors, {})
    keep = total - round(task.sparsity * min(limit, task.fraction(position)) * total)

    def select(values: Scores, among: Mapping[str, Tensor], *, fewer: float = 0.0) -> Masks:
        nonlocal threshold
        stays = {name: _all([one[name] for one in (among, given, there) if name in one]) for name in values}
        open_ = {
            name: value if (stay := stays[name]) is None else value.masked_fill(~stay, -torch.inf)
            for name, value in values.items()
        }
        number = round(keep * (1 - fewer)) if fewer else keep
        if pruner.threshold is not None:
            chosen = {name: _above(task, value, ours[name], position, limit) for name, value in open_.items()}
        elif any_sharded(ours.values()):
            chosen, threshold = select_across(_allocate(pruner, open_, ours, stays_in), ours, number)
        else:
            values_left = _ranked(pruner, _without_removed(open_, stays_in))
            chosen = _with_removed(PATTERNS[pruner.pattern].function(values_left, number), open_, stays_in, False)
        return {name: mask if (stay := stays[name]) is None else mask & stay for name, mask in chosen.items()}

    also: dict[str, Any] = {name: scores[name] for name in task.rule.also}
    if takes(task.rule.function, "progress"):
        also["progress"] = task.schedule.progress(position, task.total_steps)
    chosen = task.rule.function(scores[""], masks, select, **also)
    for name, here in there.items():  # what comes back with its unit has the mask that it had
        chosen[name] = chosen[name] & here | ~here & masks.get(name, True)
    return chosen, threshold


def _above(task: Task, scores: Tensor, tensor: Tensor, position: int, limit: float) -> Tensor:
    """Keep weights of a tensor, or of a shard, whose score lies above the threshold of all of it."""
    return scores > task.threshold(join(scores, tensor) if task.pruner.relative else scores, position, limit)


def _all(masks: Sequence[Tensor]) -> Tensor | None:
    """Return what all of these masks keep; ``None``: there are none."""
    return reduce(torch.Tensor.logical_and, masks) if masks else None


def _ranked(pruner: WeightPruner, scores: Scores) -> dict[str, Tensor]:
    """Return values that compare between tensors; what is decided, as infinite scores are, stays so.

    An allocation that takes means would make NaN of infinities: it sees the least and the largest score instead.
    """
    seen = {}
    for name, score in scores.items():
        known = score[score.isfinite()]
        ends = {"neginf": float(known.min()), "posinf": float(known.max())} if len(known) else {}
        seen[name] = score.nan_to_num(**ends) if len(known) < score.numel() else score
    made = pruner.allocate()(seen, dict.fromkeys(scores, 1.0))
    return {name: torch.where(score.isinf(), score, made[name]) for name, score in scores.items()}


def _without_removed(scores: Scores, stays: Stays) -> dict[str, Tensor]:
    """Return tensors as they will be once masked units are removed: allocations and patterns choose among these."""
    left = dict(scores)
    for name in scores.keys() & stays.keys():
        for dim, vector in stays[name].items():
            left[name] = left[name].index_select(dim, vector.nonzero().view(-1).to(left[name].device))
    return left


def _with_removed(left: Scores, whole: Scores, stays: Stays, fill: float) -> dict[str, Tensor]:
    """Return tensors of the shapes that `whole` has; what belongs to removed units is `fill`."""
    found = dict(left)
    for name in left.keys() & stays.keys():
        there = keep_entries(whole[name], stays[name], None)
        empty = torch.full(there.shape, fill, dtype=left[name].dtype, device=there.device)
        found[name] = empty.masked_scatter_(there, left[name])
    return found


def _allocate(pruner: WeightPruner, scores: Scores, tensors: Mapping[str, Tensor], stays: Stays) -> dict[str, Tensor]:
    """Make shards' scores comparable: an allocation sees whole tensors, one at a time where it takes them so."""
    one_by_one = pruner.allocation in _TENSOR_BY_TENSOR
    values: dict[str, Tensor] = {}
    for names in [[name] for name in scores] if one_by_one else [list(scores)]:
        full = {name: join(scores[name], tensors[name]) for name in names}
        made = _with_removed(_ranked(pruner, _without_removed(full, stays)), full, stays, -torch.inf)
        values.update({name: part_of(made[name], tensors[name]) for name in names})
    return values
