"""Schedules: when to prune, and what fraction of the way to go by then. Arithmetic on one number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

from pydantic import Field

from .errors import PruningError
from .registry import Registry
from .settings import settings

logger = logging.getLogger(__name__)
_EVERY, _CHANGES = 50, 10  # steps between changes where nothing is said, and how many changes a short run has at least
_FEW = 4  # changes that remove anything, below which a schedule is hardly gradual
ScheduleFunction = Callable[[float], float]
SCHEDULES: Registry[ScheduleFunction] = Registry("schedule")


def register_schedule(name: str) -> Callable[[ScheduleFunction], ScheduleFunction]:
    """Register a function from progress between begin and end, in [0, 1], to the fraction of the way, in [0, 1].

    Example:
        >>> @register_schedule("square_root")
        ... def square_root(progress):
        ...     return progress**0.5
    """
    return SCHEDULES.register(name)


@register_schedule("linear")
def linear(progress: float) -> float:
    """The same amount at each change."""
    return progress


@register_schedule("cubic")
def cubic(progress: float) -> float:
    """Much early, little late (Zhu & Gupta 2017, arXiv:1710.01878): ``1 - (1 - t)^3``."""
    return 1 - (1 - progress) ** 3


@register_schedule("oneshot")
def oneshot(progress: float) -> float:
    """Everything at once, at `begin`."""
    return 1.0


@settings(frozen=True)
class Schedule:
    """When to prune; how much is the pruners' business.

    Args:
        kind: ``"cubic"``, ``"linear"``, ``"oneshot"`` or a registered name.
        begin: First change: a float is a fraction of all steps in [0, 1], an int a step. The earliest change comes
            after the first step.
        end: Last change, likewise, not before `begin`.
        frequency: Optimizer steps between changes, at least 1. ``None``: 50, and fewer where a short run would have
            less than ten changes.
        initial: Sparsity at the first change, in [0, 1), in units of the final one.

    Example:
        >>> Schedule(begin=0.0, end=0.5, frequency=20).change_steps(100)
        [1, 21, 41, 50]
    """

    kind: str = "cubic"
    begin: int | float = Field(default=0.1, ge=0)
    end: int | float = Field(default=0.7, ge=0)
    frequency: int | None = Field(default=None, ge=1)
    initial: float = Field(default=0.0, ge=0, lt=1)

    def bounds(self, total_steps: int) -> tuple[int, int]:
        """Return the first and the last change as steps in [1, total_steps].

        Raises:
            PruningError: `begin` or `end` is out of range, or they are the wrong way round.
        """
        steps = []
        for key, value in (("begin", self.begin), ("end", self.end)):
            if isinstance(value, float) and value > 1:
                raise PruningError(f"schedule.{key} as a float is a fraction of all steps in [0, 1]. Received: {value}")
            step = round(value * total_steps) if isinstance(value, float) else value
            if step > total_steps:
                raise PruningError(
                    f"schedule.{key} must be within the {total_steps} steps of this run. Received: {value}"
                )
            steps.append(max(1, step))
        if steps[0] > steps[1]:
            raise PruningError(f"schedule.begin must not be after schedule.end. Received: {self.begin} and {self.end}")
        return steps[0], steps[1]

    def change_steps(self, total_steps: int) -> list[int]:
        """Return the optimizer steps after which masks change."""
        SCHEDULES[self.kind]
        begin, end = self.bounds(total_steps)
        every = self.frequency or max(1, min(_EVERY, (end - begin) // _CHANGES))
        return [begin] if self.kind == "oneshot" else sorted({*range(begin, end, every), end})

    def warn_of_few(self, total_steps: int) -> None:
        """Say where a schedule that is meant to be gradual has hardly any changes."""
        if self.kind == "oneshot":
            return
        jumps = [0.0, *(self.fraction(step, total_steps) for step in self.change_steps(total_steps))]
        removing = sum(after > before for before, after in pairwise(jumps))
        if removing < _FEW:
            logger.warning(
                f"Schedule '{self.kind}' removes units at {removing} steps of {total_steps} only: a smaller frequency, "
                f"or longer training, is gentler. Received: begin={self.begin}, end={self.end}, "
                f"frequency={self.frequency}"
            )

    def fraction(self, step: int, total_steps: int) -> float:
        """Return how much of the way to the final sparsity is gone after this step, in [0, 1]."""
        begin, end = self.bounds(total_steps)
        if step < begin:
            return 0.0
        progress = 1.0 if step >= end else (step - begin) / (end - begin)
        return self.initial + (1 - self.initial) * SCHEDULES[self.kind](progress)
