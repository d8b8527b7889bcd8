"""Schedules: when to prune, and what fraction of the way to go by then. Arithmetic on one number."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .errors import PruningError
from .registry import Registry, takes
from .settings import settings

logger = logging.getLogger(__name__)
_EVERY, _CHANGES = 50, 10  # steps between changes where nothing is said, and how many changes a short run has at least
_FEW = 4  # changes that remove anything, below which a schedule is hardly gradual
_SPELLED = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(steps?|epochs?|%|)", re.IGNORECASE)
ScheduleFunction = Callable[..., float]
SCHEDULES: Registry[ScheduleFunction] = Registry("schedule")


def register_schedule(name: str) -> Callable[[ScheduleFunction], ScheduleFunction]:
    """Register a function from progress between begin and end, in [0, 1], to the fraction of the way, in [0, 1].

    A function that has a parameter `power` gets the schedule's by keyword.

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


@register_schedule("polynomial")
def polynomial(progress: float, power: float) -> float:
    """As cubic, with an exponent of one's own: ``1 - (1 - t)^power``."""
    return 1 - math.pow(1 - progress, power)


@register_schedule("exponential")
def exponential(progress: float, power: float) -> float:
    """The way that is left shrinks by the same factor at each change: ``(1 - e^(-power t)) / (1 - e^(-power))``.

    With ``power = -ln(1 - sparsity)`` it is what is left of the model that shrinks so.
    """
    return math.expm1(-power * progress) / math.expm1(-power)


@register_schedule("cosine")
def cosine(progress: float) -> float:
    """Little early, most in the middle, little late: ``(1 - cos(pi t)) / 2``."""
    return (1 - math.cos(math.pi * progress)) / 2


@register_schedule("constant")
def constant(progress: float) -> float:
    """All at `begin`, and masks change until `end`: for rules that drop and grow."""
    return 1.0


def as_moment(value: Any, least: float = 0) -> Any:
    """Return a moment of a run, or a time, as settings hold it: an int is steps, a float a fraction, text epochs.

    Args:
        value: A number, or text: ``"30 steps"``, ``"25 %"``, ``"2 epochs"``.
        least: The smallest number of steps.

    Raises:
        ValueError: It is none of them, or negative.
    """
    found = _SPELLED.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (isinstance(value, str) and not found):
        raise ValueError(
            f"it must be steps (30), a fraction (0.25), '2 epochs', '30 steps' or '25 %'. Received: {value!r}"
        )
    if found:
        value = _spelled(float(found[1]), found[2].lower(), str(value))
    if isinstance(value, (int, float)) and (not value >= 0 or (isinstance(value, int) and value < least)):
        raise ValueError(
            f"it must be greater than or equal to {least if isinstance(value, int) else 0}. Received: {value}"
        )
    return value


def _spelled(number: float, unit: str, text: str) -> int | float | str:
    if unit.startswith("epoch"):
        return f"{number:g} epochs"
    if unit.startswith("step") or (not unit and text.strip().isdigit()):
        if number != int(number):
            raise ValueError(f"steps must be whole. Received: {text!r}")
        return int(number)
    return number / 100 if unit == "%" else number


Moment = Annotated[int | float | str, BeforeValidator(as_moment)]
Time = Annotated[int | float | str, BeforeValidator(lambda value: value if value is None else as_moment(value, 1))]


@settings(frozen=True)
class Schedule:
    """When to prune; how much is the pruners' business.

    A moment is an int (a step), a float in [0, 1] (a fraction of all steps), or text: ``"2 epochs"``, ``"30 steps"``,
    ``"25 %"``. The earliest change comes after the first step.

    Args:
        kind: ``"cubic"``, ``"linear"``, ``"oneshot"``, ``"polynomial"``, ``"exponential"``, ``"cosine"``,
            ``"constant"`` or a registered name.
        begin: Moment of the first change.
        end: Moment of the last change, not before `begin`.
        frequency: Time between changes, at least one step: optimizer steps, a fraction of all of them, or
            ``"0.5 epochs"``. ``None``: 50 steps, and fewer where a short run would have less than ten changes.
        initial: Sparsity at the first change, in [0, 1), in units of the final one.
        power: Of ``"polynomial"`` its exponent, of ``"exponential"`` its rate, above 0.
        steps: Changes by hand, (moment, fraction of the way) each, instead of all of the above; fractions may fall,
            for what may come back, and the last one is 1.

    Example:
        >>> Schedule(begin=0.0, end=0.5, frequency=20).change_steps(100)
        [1, 21, 41, 50]
        >>> Schedule(steps=[(10, 0.5), ("60 %", 1.0)]).change_steps(100)
        [10, 60]
    """

    kind: str = "cubic"
    begin: Moment = 0.1
    end: Moment = 0.7
    frequency: Time | None = None
    initial: float = Field(default=0.0, ge=0, lt=1)
    power: float = Field(default=3.0, gt=0, le=100)
    steps: tuple[tuple[Moment, Annotated[float, Field(ge=0, le=1)]], ...] = ()

    def __post_init__(self) -> None:
        """Its kind is a registered one; changes by hand stand alone."""
        SCHEDULES[self.kind]
        if not self.steps:
            return
        beside = (self.kind, self.begin, self.end, self.frequency, self.initial, self.power)
        if beside != ("cubic", 0.1, 0.7, None, 0.0, 3.0):
            raise ValueError("steps stand alone: without kind, begin, end, frequency, initial and power")
        if self.steps[-1][1] != 1:
            raise ValueError(f"the last of the steps must reach a fraction of 1. Received: {self.steps[-1][1]:g}")

    def __repr__(self) -> str:
        """Show power and steps where they are not as they would be anyway."""
        shown = {key: getattr(self, key) for key in ("kind", "begin", "end", "frequency", "initial")}
        shown |= {key: value for key, value in (("power", self.power), ("steps", self.steps)) if value not in (3.0, ())}
        return f"Schedule({', '.join(f'{key}={value!r}' for key, value in shown.items())})"

    def in_steps(self, epoch: float | None) -> Schedule:
        """Return this schedule with steps in place of epochs.

        Args:
            epoch: Optimizer steps of one pass over the data; ``None``: nobody knows.

        Raises:
            PruningError: Epochs are named, and nobody knows how long one is.
        """

        def counted(key: str, value: int | float | str | None) -> Any:
            if not isinstance(value, str):
                return value
            if epoch is None:
                raise PruningError(
                    f"schedule.{key} in epochs needs to know how long one is: a Trainer does, and "
                    f"Pruning(..., epoch_steps=100). Received: {value!r}"
                )
            return max(round(float(value.split()[0]) * epoch), int(key == "frequency"))

        moments = {key: counted(key, getattr(self, key)) for key in ("begin", "end", "frequency")}
        steps = tuple((counted("steps", moment), fraction) for moment, fraction in self.steps)
        changed = any(getattr(self, key) != value for key, value in moments.items()) or steps != self.steps
        return replace(self, **moments, steps=steps) if changed else self

    def bounds(self, total_steps: int) -> tuple[int, int]:
        """Return the first and the last change as steps in [1, total_steps].

        Raises:
            PruningError: A moment is out of range or in epochs, or they are the wrong way round.
        """
        if self.steps:
            by_hand = self._by_hand(total_steps)
            return by_hand[0][0], by_hand[-1][0]
        self.in_steps(None)
        begin, end = (_step(key, getattr(self, key), total_steps) for key in ("begin", "end"))
        if begin > end:
            raise PruningError(f"schedule.begin must not be after schedule.end. Received: {self.begin} and {self.end}")
        return begin, end

    def change_steps(self, total_steps: int) -> list[int]:
        """Return the optimizer steps after which masks change."""
        if self.steps:
            return [step for step, _ in self._by_hand(total_steps)]
        SCHEDULES[self.kind]
        begin, end = self.bounds(total_steps)
        if self.kind == "oneshot":
            return [begin]
        usual = max(1, min(_EVERY, (end - begin) // _CHANGES))
        every = usual if self.frequency is None else _step("frequency", self.frequency, total_steps, latest=math.inf)
        return sorted({*range(begin, end, every), end})

    def warn_of_few(self, total_steps: int) -> None:
        """Say where a schedule that is meant to be gradual has hardly any changes."""
        if self.steps or self.kind in ("oneshot", "constant"):
            return
        jumps = [0.0, *(self.fraction(step, total_steps) for step in self.change_steps(total_steps))]
        removing = sum(after > before for before, after in pairwise(jumps))
        if removing < _FEW:
            logger.warning(
                f"Schedule '{self.kind}' removes units at {removing} steps of {total_steps} only: a smaller frequency, "
                f"or longer training, is gentler. Received: begin={self.begin}, end={self.end}, "
                f"frequency={self.frequency}"
            )

    def progress(self, step: int, total_steps: int) -> float:
        """Return how much of the time between the first and the last change is gone, in [0, 1]."""
        begin, end = self.bounds(total_steps)
        return 1.0 if step >= end else max(0.0, (step - begin) / (end - begin))

    def fraction(self, step: int, total_steps: int) -> float:
        """Return how much of the way to the final sparsity is gone after this step, in [0, 1]."""
        if self.steps:
            return max(((at, fraction) for at, fraction in self._by_hand(total_steps) if at <= step), default=(0, 0.0))[
                1
            ]
        if step < self.bounds(total_steps)[0]:
            return 0.0
        function = SCHEDULES[self.kind]
        power = {"power": self.power} if takes(function, "power") else {}
        return self.initial + (1 - self.initial) * function(self.progress(step, total_steps), **power)

    def _by_hand(self, total_steps: int) -> list[tuple[int, float]]:
        """Return (step, fraction of the way) of each change by hand."""
        self.in_steps(None)
        found = [(_step("steps", moment, total_steps), fraction) for moment, fraction in self.steps]
        if any(after <= before for (before, _), (after, _) in pairwise(found)):
            raise PruningError(f"schedule.steps must come one after the other. Received: {[step for step, _ in found]}")
        return found


def _step(key: str, value: Any, total_steps: int, latest: float | None = None) -> int:
    """Return the step of a moment, at least 1."""
    if isinstance(value, float) and value > 1:
        raise PruningError(f"schedule.{key} as a float is a fraction of all steps in [0, 1]. Received: {value}")
    step = round(value * total_steps) if isinstance(value, float) else int(value)
    if step > (total_steps if latest is None else latest):
        raise PruningError(f"schedule.{key} must be within the {total_steps} steps of this run. Received: {value}")
    return max(1, step)
