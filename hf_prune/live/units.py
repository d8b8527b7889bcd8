"""Which units are there: one state of a model's structure, never changed, with all that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..plan import close_kept
from ..structure import Group, KeepVectors, Kept, Shapes, gone_entries, keep_vectors, matrix_entries


@dataclass(frozen=True, eq=False)
class Units:
    """Which units of which groups are there now. What follows from it is computed once, where it is asked for.

    Args:
        groups: The live model's groups.
        shapes: Tensor name to its live shape.
        alive: Group name to ``(units,)`` boolean, True = there.
    """

    groups: Sequence[Group]
    shapes: Shapes
    alive: Mapping[str, Tensor]

    @classmethod
    def all_of(cls, groups: Sequence[Group], shapes: Shapes) -> Units:
        """Return the units of these groups, all there."""
        return cls(groups, shapes, {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups})

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def kept(self) -> dict[str, list[int]]:
        """Group name to the live numbers of units that are there."""
        return {name: mask.nonzero().view(-1).tolist() for name, mask in self.alive.items()}

    @cached_property
    def vectors(self) -> KeepVectors:
        """Which entries of which axis of which tensor are there, for all that have lost some."""
        return keep_vectors(self.groups, self.kept, self.shapes)

    @cached_property
    def gone(self) -> dict[tuple[str, int], Tensor]:
        """Numbers of the entries that are not there, of the same axes."""
        return gone_entries(self.vectors)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates per token of all matrices that units can be cut from, without what is masked."""
        return matrix_entries(self.groups, self.shapes, self.vectors)

    def named(self, names: Sequence[str]) -> list[Group]:
        """Return the groups of these names that are still in the model."""
        return [self.by_name[name] for name in names if name in self.by_name]

    def keep(self, kept: Kept) -> Units:
        """Return what is there once these groups keep only these units; whatever lies inside what goes, goes too."""
        closed = close_kept(self.groups, {**self.kept, **kept})
        alive = dict(self.alive)
        for name, units in closed.items():
            alive[name] = torch.zeros_like(alive[name])
            alive[name][list(units)] = True
        if all(torch.equal(mask, self.alive[name]) for name, mask in alive.items()):
            return self
        return replace(self, alive=alive)

    def reopened(self, fixed: Sequence[str]) -> Units:
        """Return what is there if all groups but these had lost nothing: all but what these have lost."""
        stays = {name: units for name, units in self.kept.items() if name in set(fixed)}
        return Units.all_of(self.groups, self.shapes).keep(stays)
