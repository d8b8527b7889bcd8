"""A target in entries that units own, instead of multiply-accumulates: biases count, too."""

from __future__ import annotations

import math

from hf_prune import Target, register_budget
from hf_prune.dense import dense_note
from hf_prune.session import Budget
from hf_prune.settings import settings
from hf_prune.structure import keep_vectors


@register_budget("entries")
class Entries(Budget):
    """All entries that units own."""

    def of_dense(self, live):
        noted = dense_note(live.model).get("parameters", 0)  # of a model that was pruned before
        return max(noted, sum(map(math.prod, live.shapes.values())))

    def left(self, units):
        shapes = {name: list(shape) for name, shape in units.shapes.items()}
        for (name, dim), vector in units.vectors.items():
            shapes[name][dim] = int(vector.sum())
        return sum(map(math.prod, shapes.values()))

    def costs(self, units, groups):
        gone = {
            group.name: keep_vectors([group], {group.name: range(1, group.units)}, units.shapes) for group in groups
        }
        return {name: max(1, sum(self._entries(units, *key) * int((~one).sum()) for key, one in vectors.items()))
                for name, vectors in gone.items()}  # fmt: skip

    def _entries(self, units, name, dim):
        return math.prod(n for axis, n in enumerate(units.shapes[name]) if axis != dim)


@settings(frozen=True)
class EntryTarget(Target):
    """Which share of the entries remains."""

    macs: float = 1.0
    entries: float = 0.5

    @property
    def budget(self):
        return "entries", self.entries
