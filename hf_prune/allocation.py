"""Allocation and selection: make scores comparable between groups, then turn them into masks in exactly one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Registry
from .structure import Group

AllocationFunction = Callable[[Mapping[str, Tensor], Mapping[str, float]], dict[str, Tensor]]
ALLOCATIONS: Registry[AllocationFunction] = Registry("allocation")


def register_allocation(name: str) -> Callable[[AllocationFunction], AllocationFunction]:
    """Register a function from (scores by group, cost of one unit by group) to values that compare between groups.

    The units with the smallest values leave first, until the budget is met.

    Example:
        >>> @register_allocation("mean_normalised")
        ... def mean_normalised(scores, costs):
        ...     return {name: score / score.mean() for name, score in scores.items()}
    """
    return ALLOCATIONS.register(name)


@register_allocation("global")
def global_by_cost(scores: Mapping[str, Tensor], costs: Mapping[str, float]) -> dict[str, Tensor]:
    """Rank over all groups by score per cost: what is worth least for what it costs leaves first."""
    return {name: score / costs[name] for name, score in scores.items()}


@register_allocation("uniform")
def uniform(scores: Mapping[str, Tensor], costs: Mapping[str, float]) -> dict[str, Tensor]:
    """Rank inside each group: every group loses the same share."""
    return {name: (_ranks(score) + 0.5) / score.numel() for name, score in scores.items()}


def _ranks(score: Tensor) -> Tensor:
    """Return each entry's place in ascending order, of the scores' shape."""
    order = score.flatten().argsort(stable=True)
    ranks = torch.empty(len(order), dtype=torch.float64, device=score.device)
    ranks[order] = torch.arange(len(order), dtype=torch.float64, device=score.device)
    return ranks.view(score.shape)


class Bundle(NamedTuple):
    """Units of one group that can only leave together: one of each part, and as many as keep a multiple."""

    value: float
    group: str
    units: tuple[int, ...]
    cost: float


def select_units(
    groups: Mapping[str, Group],
    values: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    costs: Mapping[str, float],
    excess: float,
    *,
    min_kept: Mapping[str, int],
    multiple_of: Mapping[str, int],
    last: bool = True,
) -> dict[str, Tensor]:
    """Remove the least valuable units until `excess` is gone; what was removed before stays removed.

    At the last change a unit that costs more than what is still to go is passed over, unless nothing smaller could
    leave: the budget is met, and overshot by less than the smallest unit that was left. Before, such a unit waits for a
    later change and none is taken in its place: a schedule of many small steps would else use up all cheap units.

    Args:
        groups: The groups to choose among, by name.
        values: ``(units,)`` for each group, comparable between groups, larger = keep.
        alive: ``(units,)`` boolean: what is there now.
        costs: What leaves with one unit of each group.
        excess: How much has to leave, in the unit of `costs`.
        min_kept: Units that stay in each part of a group at least.
        multiple_of: Kept units per part are a multiple of this, where there are as many.
        last: Whether no change will follow.

    Returns:
        ``(units,)`` boolean masks, True = keep.
    """
    masks = {name: mask.clone() for name, mask in alive.items()}
    bundles = [
        bundle
        for name, group in groups.items()
        for bundle in _bundles(group, values[name], alive[name], costs[name], min_kept[name], multiple_of[name])
    ]
    passed: dict[str, Bundle] = {}
    for bundle in sorted(bundles, key=lambda bundle: bundle.value):
        if excess <= 0 or (bundle.cost > excess and not last):
            return masks
        if bundle.group in passed or bundle.cost > excess:
            passed.setdefault(bundle.group, bundle)  # its later bundles cost as much, and must not overtake it
            continue
        masks[bundle.group][list(bundle.units)] = False
        excess -= bundle.cost
    if excess > 0 and passed:  # nothing that is left fits: the smallest overshoots the budget least
        smallest = min(passed.values(), key=lambda bundle: (bundle.cost, bundle.value))
        masks[smallest.group][list(smallest.units)] = False
    return masks


def _bundles(group: Group, value: Tensor, alive: Tensor, cost: float, min_kept: int, multiple: int) -> list[Bundle]:
    """Return what can leave a group, the least valuable first."""
    here = alive.view(group.parts, -1)
    parts = [part for part in range(group.parts) if here[part].any()]
    if not parts:
        return []
    rows = [here[part].nonzero().view(-1) + part * group.per_part for part in parts]
    order = torch.stack([units[value[units].argsort(stable=True)] for units in rows])  # (parts, units that are there)
    worth, left = value[order].double(), order.shape[1]
    first = left % multiple or multiple  # then what stays is a multiple
    bundles = list[Bundle]()
    for start, stop, width in ((0, first, first), (first, left, multiple)):
        shape = (len(parts), (stop - start) // width, width)  # then (bundles, units in each)
        leaving = order[:, start:stop].reshape(shape).transpose(0, 1).flatten(1)
        means = worth[:, start:stop].reshape(shape).transpose(0, 1).flatten(1).mean(1)
        count = leaving.shape[1]
        bundles += [
            Bundle(mean, group.name, tuple(units), cost * count)
            for mean, units in zip(means.tolist(), leaving.tolist())
        ]
    stays = left - first
    return bundles[: 1 + (stays - min_kept) // multiple] if stays >= min_kept else []


def select_weights(values: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Keep exactly this many weights, the most valuable ones; among equals the earlier ones.

    Args:
        values: One tensor of values for each parameter, comparable between them, larger = keep.
        keep: Weights that stay in all.

    Returns:
        Boolean masks of the values' shapes, True = keep.
    """
    flat = torch.cat([value.flatten() for value in values.values()])
    mask = torch.ones_like(flat, dtype=torch.bool)
    if keep < len(flat):
        threshold = flat.kthvalue(len(flat) - keep).values
        mask = flat > threshold
        equal = (flat == threshold).nonzero().view(-1)
        mask[equal[: keep - int(mask.sum())]] = True
    parts = torch.split(mask, [value.numel() for value in values.values()])
    return {name: part.view(value.shape).clone() for (name, value), part in zip(values.items(), parts)}
