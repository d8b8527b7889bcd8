"""Budgets: what units cost, for a target that says how much is to remain."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..dense import dense_note
from ..live import LiveModel, Units
from ..registry import Registry
from ..structure import Group, Kept, keep_vectors, unit_cost
from ..targets import Target

Limits = Mapping[str, tuple[int, int]]  # units of a part of a group that stay at least, and of what they are a multiple


class Budget(ABC):
    """What units cost; made once, of the live model that a run begins with.

    Args:
        live: The live model.
        target: What is to remain; some budgets take more from it than a number.
        names: Of the groups that are chosen from; none: of all.

    Attributes:
        dense: What the dense model costs.
        tolerance: Up to how many times what was asked for may be left.
    """

    tolerance = 1.0

    def __init__(self, live: LiveModel, target: Target | None = None, names: Collection[str] = ()) -> None:
        self.live, self.target = live, target
        self.names = tuple(names) or tuple(group.name for group in live.groups)
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

    def share(self, wanted: float) -> float:
        """Return what is to remain, as a share of what the dense model costs: from a target's number."""
        return wanted

    def choose(
        self,
        units: Units,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        goal: float,
        limits: Limits,
        last: bool,
    ) -> Kept | None:
        """Return which units stay; ``None``, as most do: those that are worth least for what they cost leave first.

        Args:
            units: What is there.
            groups: Those that are chosen from.
            scores: ``(units,)`` by group, larger = keep.
            goal: What may be left.
            limits: For each group, how many units stay in a part at least, and of what their number is a multiple.
            last: Whether no change will follow.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Return what a report should say beside what is left."""
        return {}

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
        left = _shapes_left(units)
        costs = {group.name: unit_cost(_left_of(units, group, left), units.groups, left) for group in groups}
        return {name: max(1.0, float(cost)) for name, cost in costs.items()}  # scores are divided by it


@register_budget("parameters")
class Parameters(Budget):
    """All parameters of the model."""

    def of_dense(self, live: LiveModel) -> float:
        """Return those of the dense model."""
        noted: float = dense_note(live.model).get("parameters", 0)  # of a model that was pruned before
        return max(noted, sum(math.prod(live.shapes[name]) for name in self._owned()))

    def left(self, units: Units) -> float:
        """Return those of what is there."""
        left = _shapes_left(units)
        return sum(math.prod(left[name]) for name in self._owned())

    def costs(self, units: Units, groups: Sequence[Group]) -> dict[str, float]:
        """Return the entries that one unit of each of these groups owns."""
        left = _shapes_left(units)
        return {group.name: max(1.0, self._of_unit(units, group, left)) for group in groups}

    def _of_unit(self, units: Units, group: Group, left: Mapping[str, Sequence[int]]) -> float:
        vectors = keep_vectors([group], {group.name: range(1, group.units)}, units.shapes)
        entries = {key: int((~one).sum()) for key, one in vectors.items()}
        return float(sum(count * _others(left[name], dim) for (name, dim), count in entries.items()))

    def _owned(self) -> list[str]:
        """Return parameters by name, tied ones once; buffers are none."""
        return [name for name, _ in self.live.model.named_parameters()]


@register_budget("size_mb")
class SizeMb(Parameters):
    """Size of all parameters in 10^6 bytes."""

    def share(self, wanted: float) -> float:
        """Return the share of the dense model's size; more than that leaves the model as it is."""
        parameters = list(self.live.model.parameters())
        each = sum(one.numel() * one.element_size() for one in parameters) / sum(one.numel() for one in parameters)
        return min(1.0, wanted * 1e6 / (each * self.dense))


def _shapes_left(units: Units) -> dict[str, list[int]]:
    left = {name: list(shape) for name, shape in units.shapes.items()}
    for (name, dim), vector in units.vectors.items():
        left[name][dim] = int(vector.sum())
    return left


def _others(shape: Sequence[int], dim: int) -> int:
    return math.prod(n for axis, n in enumerate(shape) if axis != dim)


def _left_of(units: Units, group: Group, shapes: Mapping[str, Sequence[int]]) -> Group:
    """Return a group as it would be if what is masked were gone: fewer layers, narrower branches."""
    if group.modules:
        modules = tuple(module for module, there in zip(group.modules, units.alive[group.name]) if there)
        return replace(group, modules=modules, units=max(1, len(modules)))
    if group.traits.is_place:
        slices = [replace(part, per_unit=shapes[part.parameter][part.dim]) for part in group.slices]
        return replace(group, slices=tuple(slices))
    return group


def make_budget(live: LiveModel, target: Target | None, names: Collection[str]) -> Budget | None:
    """Return the budget that a target counts; ``None`` where there is none."""
    return None if target is None else BUDGETS[target.budget[0]](live, target, names)
