"""Allocation and selection: make scores comparable between groups, then turn them into masks in exactly one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .ranking import nth_smallest
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


@register_allocation("as_is")
def as_is(scores: Mapping[str, Tensor], costs: Mapping[str, float]) -> dict[str, Tensor]:
    """Rank over all groups by the score alone, whatever units cost."""
    return dict(scores)


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


class Bundles(NamedTuple):
    """Units of one group that can only leave together: one of each part, and as many as keep a multiple.

    Args:
        group: The group's name.
        values: What each bundle is worth, ``(bundles,)``, the least first.
        units: Who is in it, ``(bundles, units in each)``.
        cost: What leaves with one of them.
    """

    group: str
    values: Tensor
    units: Tensor
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
    found = [
        bundles
        for name, group in groups.items()
        for bundles in bundles_of(group, values[name], alive[name], costs[name], min_kept[name], multiple_of[name])
    ]
    leaving = _in_order(found, excess, last=last) if found and excess > 0 else {}
    masks = {name: mask.clone() for name, mask in alive.items()}
    for place, rows in leaving.items():
        masks[found[place].group][found[place].units[rows].flatten()] = False
    return masks


def _in_order(found: list[Bundles], excess: float, *, last: bool) -> dict[int, list[int]]:
    """Return who leaves: the place among what was found -> numbers of bundles."""
    order = torch.cat([one.values for one in found]).argsort(stable=True)
    places = torch.cat([torch.full((len(one.values),), i) for i, one in enumerate(found)])[order]
    rows = torch.cat([torch.arange(len(one.values)) for one in found])[order]
    spent = torch.tensor([one.cost for one in found], dtype=torch.float64)[places].cumsum(0)
    fit = int(torch.searchsorted(spent, excess))  # so many leave one after the other, and leave something to go
    fit += int(fit < len(spent) and spent[fit] == excess)
    leaving = {place: rows[:fit][places[:fit] == place].tolist() for place in range(len(found))}
    excess -= float(spent[fit - 1]) if fit else 0.0
    passed: dict[str, tuple[float, int, int]] = {}
    for place, row in zip(places[fit:].tolist(), rows[fit:].tolist()) if excess > 0 and last else ():
        one = found[place]
        if excess <= 0:
            return leaving
        if one.group in passed or one.cost > excess:
            passed.setdefault(one.group, (one.cost, place, row))  # its later bundles cost as much: none overtakes it
            continue
        leaving[place].append(row)
        excess -= one.cost
    if excess > 0 and passed:  # nothing that is left fits: the smallest overshoots the budget least
        _, place, row = min(passed.values(), key=lambda one: one[0])  # among equals the least valuable: it came first
        leaving[place].append(row)
    return leaving


def bundles_of(
    group: Group, value: Tensor, alive: Tensor, cost: float, min_kept: int, multiple: int
) -> Iterator[Bundles]:
    """Yield what can leave a group: first what makes a multiple of the rest, then the others."""
    here = alive.view(group.parts, -1)
    parts = [part for part in range(group.parts) if here[part].any()]
    if not parts:
        return
    rows = [here[part].nonzero().view(-1) + part * group.per_part for part in parts]
    order = torch.stack([units[value[units].argsort(stable=True)] for units in rows])  # (parts, units that are there)
    worth, left = value[order].double(), order.shape[1]
    first = left % multiple or multiple  # then what stays is a multiple
    stays = left - first
    count = 1 + (stays - min_kept) // multiple if stays >= min_kept else 0
    for start, width, number in ((0, first, min(1, count)), (first, multiple, max(0, count - 1))):
        if number:
            shape = (len(parts), number, width)  # then (bundles, units in each)
            leaving = order[:, start : start + number * width].reshape(shape).transpose(0, 1).flatten(1)
            means = worth[:, start : start + number * width].reshape(shape).transpose(0, 1).flatten(1).mean(1)
            yield Bundles(group.name, means, leaving, cost * leaving.shape[1])


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
        threshold = nth_smallest(flat, len(flat) - keep)
        mask = flat > threshold
        equal = (flat == threshold).nonzero().view(-1)
        mask[equal[: keep - int(mask.sum())]] = True
    parts = torch.split(mask, [value.numel() for value in values.values()])
    return {name: part.view(value.shape).clone() for (name, value), part in zip(values.items(), parts)}
