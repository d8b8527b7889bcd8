"""What a search changes from trial to trial, and which value is tried next: nothing here knows Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import PruningError
from ..recipe import Recipe
from ..targets import Target

CLOSE = 1.05  # a good model and one that is not, so near to each other: nothing is between them that matters
_SMALLEST = 1e-3  # of what a recipe asks for
TIMES = ("speedup", "latency_ms")
_SHARES = ("macs", "parameters")


class Tried(NamedTuple):
    """A value that a trial asked for, and whether its model was good enough; ``None``: it still runs."""

    size: float
    good: bool | None


@dataclass(frozen=True)
class Aim:
    """Which key of the recipe's target a search changes.

    Sizes are what is compared: smaller means a smaller model, so that of a speed-up it is the inverse.

    Args:
        key: Of `Target`.
        first: The recipe's own value: the first that is tried.
    """

    key: str
    first: float

    def size(self, value: float) -> float:
        """Return the size that a value of the key means."""
        return 1 / value if self.key == "speedup" else value

    def value(self, size: float) -> float:
        """Return the value of the key that means a size, to four figures."""
        return float(f"{1 / size if self.key == 'speedup' else size:.4g}")

    @property
    def dense(self) -> float | None:
        """The size of the dense model; ``None`` where the key does not say it."""
        return 1.0 if self.key == "speedup" or self.key in _SHARES else None

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value of the key."""
        sizes = self.size(self.first) * _SMALLEST, self.dense or self.size(self.first) / _SMALLEST
        low, high = sorted(self.value(size) for size in sizes)
        return low, high

    def of(self, recipe: Recipe, value: float) -> Target:
        """Return the recipe's target with another value."""
        assert recipe.target is not None
        changed: dict[str, Any] = {self.key: value}
        return replace(recipe.target, **changed)

    def next(self, tried: Sequence[Tried]) -> float | None:
        """Return the value of the key to try next; ``None``: there is nothing left to find.

        The recipe's own comes first. While models are good enough, the next is half as large; then always the middle,
        by its logarithm, between the smallest good one and the largest below it that is not. Where others run in
        there, it is the middle of the widest gap.
        """
        if not tried:
            return self.first
        sizes = [one.size for one in tried]
        best = min([one.size for one in tried if one.good] + ([self.dense] if self.dense else []), default=None)
        if best is None:
            return self._within(max(sizes) * 1.5)
        worst = max((one.size for one in tried if one.good is False and one.size < best), default=None)
        if worst is None:
            return self._within(min(sizes) / 2)
        running = [one.size for one in tried if one.good is None and worst < one.size < best]
        edges = sorted([worst, *running, best])
        low, high = max(pairwise(edges), key=lambda gap: gap[1] / gap[0])
        return None if best / worst <= CLOSE else self.value(math.sqrt(low * high))

    def _within(self, size: float) -> float | None:
        low, high = self.range
        return value if low <= (value := self.value(size)) <= high else None


def aim_of(recipe: Recipe) -> Aim:
    """Return what a recipe's target says is to be changed.

    Raises:
        PruningError: The recipe has no target.
    """
    if recipe.target is None:
        raise PruningError(
            "search needs a recipe with a target, such as target.macs=0.5: it is what changes between trials. "
            "Received: target=None"
        )
    ((key, value),) = recipe.target.said.items()
    return Aim(key, float(value))
