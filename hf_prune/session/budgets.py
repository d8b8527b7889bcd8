"""Budgets: what units cost, for a target that says how much is to remain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..live import LiveModel, Units
from ..registry import Registry
from ..structure import Group, unit_cost


class Budget(ABC):
    """What units cost; made once, of the live model that a run begins with.

    Args:
        live: The live model.

    Attributes:
        dense: What the dense model costs.
    """

    def __init__(self, live: LiveModel) -> None:
        self.dense = self.of_dense(live)

    @abstractmethod
    def of_dense(self, live: LiveModel) -> float:
        """Return what the dense model costs."""

    @abstractmethod
    def left(self, units: Units) -> float:
        """Return what a model costs of which these units are there."""

    @abstractmethod
    def costs(self, units: Units, groups: Sequence[Group]) -> Mapping[str, float]:
        """Return what leaves with one more unit of each of these groups, above 0."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the dense model costs: a resumed model may be smaller from the start."""
        return {"dense": self.dense}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.dense = state["dense"]


BUDGETS: Registry[type[Budget]] = Registry("budget")
register_budget = BUDGETS.register


@register_budget("macs")
class Macs(Budget):
    """Multiply-accumulates per token of the matrices that units can be cut from."""

    def of_dense(self, live: LiveModel) -> float:
        """Return those of the dense model."""
        return live.dense_macs

    def left(self, units: Units) -> float:
        """Return those of what is there."""
        return units.macs

    def costs(self, units: Units, groups: Sequence[Group]) -> dict[str, float]:
        """Return those of one unit: next to units that are masked already, it has fewer."""
        left = {name: list(shape) for name, shape in units.shapes.items()}
        for (name, dim), vector in units.vectors.items():
            left[name][dim] = int(vector.sum())
        costs = {group.name: unit_cost(_left_of(units, group, left), units.groups, left) for group in groups}
        return {name: max(1.0, float(cost)) for name, cost in costs.items()}  # scores are divided by it


def _left_of(units: Units, group: Group, shapes: Mapping[str, Sequence[int]]) -> Group:
    """Return a group as it would be if what is masked were gone: fewer layers, narrower branches."""
    if group.modules:
        modules = tuple(module for module, there in zip(group.modules, units.alive[group.name]) if there)
        return replace(group, modules=modules, units=max(1, len(modules)))
    if group.traits.is_place:
        slices = [replace(part, per_unit=shapes[part.parameter][part.dim]) for part in group.slices]
        return replace(group, slices=tuple(slices))
    return group
