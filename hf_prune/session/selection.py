"""Which units leave at a change: down to a target together, or each pruner by its own sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..allocation import select_units
from ..depth import check_depth
from ..plan import close_kept
from ..structure import Group, live_shapes, unit_cost

if TYPE_CHECKING:
    from .pruning import Pruning


def select_together(pruning: Pruning, scores: Mapping[str, Tensor]) -> None:
    """One ranking over all structured pruners, down to the target's share of the MACs."""
    assert pruning.target is not None
    goal = 1 - (1 - pruning.target.macs) * pruning.schedule.fraction(pruning.steps, pruning.total_steps)
    groups = {group.name: group for chosen in pruning.chosen.values() for group in pruning._live(chosen)}
    limits = {
        name: limit for i, chosen in pruning.chosen.items() for name, limit in _limits(pruning, i, chosen).items()
    }
    before, now = math.inf, pruning._macs_now()
    # again: a matrix between two groups (two convolutions, an LSTM's hidden weights) has counted twice
    while goal * pruning.dense_macs < now < before:
        costs = _costs(pruning, groups)
        values: dict[str, Tensor] = {}
        for i, chosen in pruning.chosen.items():
            names = [group.name for group in chosen if group.name in groups]
            values.update(pruning.pruners[i].allocate()({n: scores[n] for n in names}, {n: costs[n] for n in names}))
        last = pruning.steps >= max(max(pruning.changes[i]) for i in pruning.chosen)
        _select(pruning, groups, values, costs, now - goal * pruning.dense_macs, limits, last)
        before, now = now, pruning._macs_now()


def _costs(pruning: Pruning, groups: Mapping[str, Group]) -> dict[str, float]:
    """Return what leaves with one unit of each group: next to units that are masked already, less."""
    left = {name: list(shape) for name, shape in live_shapes(pruning.model).items()}
    for (name, dim), vector in pruning._vectors().items():
        left[name][dim] = int(vector.sum())
    costs = {name: unit_cost(_left_of(pruning, group, left), pruning.groups, left) for name, group in groups.items()}
    return {name: max(1.0, float(cost)) for name, cost in costs.items()}  # scores are divided by it


def _left_of(pruning: Pruning, group: Group, shapes: Mapping[str, Sequence[int]]) -> Group:
    """Return a group as it would be if what is masked were gone: fewer layers, narrower branches."""
    if group.modules:
        modules = tuple(module for module, there in zip(group.modules, pruning.alive[group.name]) if there)
        return replace(group, modules=modules, units=max(1, len(modules)))
    if group.kind == "branch":
        slices = [replace(part, per_unit=shapes[part.parameter][part.dim]) for part in group.slices]
        return replace(group, slices=tuple(slices))
    return group


def select_alone(pruning: Pruning, i: int, scores: Mapping[str, Tensor]) -> None:
    """One pruner's own sparsity, counted in units."""
    pruner = pruning.pruners[i]
    assert pruner.sparsity is not None
    groups = {group.name: group for group in pruning._live(pruning.chosen[i])}
    costs = dict.fromkeys(groups, 1.0)
    fraction = (pruner.schedule or pruning.schedule).fraction(pruning.steps, pruning.total_steps)
    now = sum(int(pruning.alive[name].sum()) for name in groups)
    excess = now - (1 - pruner.sparsity * fraction) * sum(
        pruning.dense_units[name] for names in pruning.counted[str(i)].values() for name in names
    )
    values = pruner.allocate()({name: scores[name] for name in groups}, costs)
    last = pruning.steps >= max(pruning.changes[i])
    _select(pruning, groups, values, costs, round(excess), _limits(pruning, i, pruning.chosen[i]), last)


def _limits(pruning: Pruning, i: int, chosen: Sequence[Group]) -> dict[str, tuple[int, int]]:
    """Return for each group how many units stay in a part at least, and of what their number is a multiple."""
    pruner = pruning.pruners[i]
    return {g.name: (pruner.floor(g), math.lcm(pruner.multiple_of, g.multiple)) for g in chosen}


def _select(
    pruning: Pruning,
    groups: Mapping[str, Group],
    values: Mapping[str, Tensor],
    costs: Mapping[str, float],
    excess: float,
    limits: Mapping[str, tuple[int, int]],
    last: bool,
) -> None:
    alive = {name: pruning.alive[name] for name in groups}
    floors, multiples = ({name: limit[k] for name, limit in limits.items()} for k in (0, 1))
    chosen = select_units(groups, values, alive, costs, excess, min_kept=floors, multiple_of=multiples, last=last)
    live = {name: mask.nonzero().view(-1).tolist() for name, mask in chosen.items()}
    check_depth(pruning.model, pruning.groups, live)
    pruning._set_alive(close_kept(pruning.groups, {**pruning._live_kept(), **live}))
