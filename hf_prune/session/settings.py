"""What a run is told to do: the same for the callback, a loop of one's own, one shot, arguments and a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evidence import Loss
from ..pruners import Pruner, Target, as_pruners
from ..schedules import Schedule
from .guards import Guard


@dataclass(frozen=True)
class PruningSettings:
    """What to remove, when, how much, and by which data. It holds no state, and can be used again.

    Args:
        pruners: What to remove: one pruner or several.
        schedule: When; ``None`` takes `Schedule()`. A pruner's own schedule comes first.
        target: How much is to remain over all structured pruners.
        data: Calibration batches; ``None`` takes scores from the training batches themselves.
        loss: From (model, batch) to the loss on `data`; ``None``: the model's own.
        guards: Who may hold a change back, or undo the last one.
        shrink_live: Remove units physically at every change.
        seed: For scores that draw numbers.
    """

    pruners: Pruner | Sequence[Pruner]
    schedule: Schedule | None = None
    target: Target | None = None
    data: Iterable[Mapping[str, Any]] | None = None
    loss: Loss | None = None
    guards: Sequence[Guard] = ()
    shrink_live: bool = False
    seed: int = 0

    @property
    def several(self) -> list[Pruner]:
        """The pruners as a list."""
        return as_pruners(self.pruners)
