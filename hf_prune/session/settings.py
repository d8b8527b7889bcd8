"""What a run is told to do: the same for the callback, a loop of one's own, one shot, arguments and a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PruningError
from ..evidence import Loss
from ..given import check_data, check_given, told
from ..pruners import Pruner, UnitPruner, as_pruners
from ..schedules import Schedule
from ..settings import renamed
from ..targets import Target
from .guards import Guard
from .regularising import Regularisation


@renamed("shrink_live", "shrink_during_training")
@dataclass(frozen=True)
class PruningSettings:
    """What to remove, when, how much, and by which data. It holds no state, and can be used again.

    Args:
        pruners: What to remove: one pruner or several.
        schedule: When; ``None`` takes `Schedule()`. A pruner's own schedule comes first.
        target: How much is to remain over all structured pruners.
        data: Calibration batches; ``None`` takes scores from the training batches themselves.
        loss: From (model, batch) to the loss on `data`; ``None``: the model's own.
        guards: Who may hold a change back, or undo the last one: one or several.
        shrink_during_training: Remove units physically at every change.
        seed: For scores that draw numbers.
        regularisation: What drives weights or units to zero while the model trains.

    Raises:
        PruningError: Something is of another kind.

    Example:
        >>> PruningSettings(HeadPruner(sparsity=0.5)).pruners[0].sparsity
        0.5
    """

    pruners: Sequence[Pruner]
    schedule: Schedule | None = None
    target: Target | None = None
    data: Iterable[Mapping[str, Any]] | None = None
    loss: Loss | None = None
    guards: Sequence[Guard] = ()
    shrink_during_training: bool = False
    seed: int = 0
    regularisation: Regularisation | None = None

    @property
    def shrink_live(self) -> bool:
        """The older name of `shrink_during_training`; it goes in version 0.3."""
        return self.shrink_during_training

    def __post_init__(self) -> None:
        """Take one pruner as several; settings are objects, not their names or numbers."""
        pruners = as_pruners(self.pruners)
        alone = self.target is None or sum(isinstance(one, UnitPruner) for one in pruners) == 1
        object.__setattr__(self, "pruners", tuple(one.settled(alone) for one in pruners))
        object.__setattr__(self, "guards", _as_guards(self.guards))
        name = f"{self.schedule!r:.40}" if isinstance(self.schedule, str) else "'cubic'"
        number = f"{self.target:g}" if isinstance(self.target, float) and 0 < self.target <= 1 else "0.5"
        check_given("schedule", self.schedule, (Schedule, type(None)), f"a Schedule, such as Schedule({name})")
        check_given("target", self.target, (Target, type(None)), f"a Target, such as Target(macs={number})")
        check_given(
            "regularisation",
            self.regularisation,
            (Regularisation, type(None)),
            "a Regularisation, such as Regularisation('group_lasso', strength=1.0)",
        )
        if self.data is not None:
            check_data(self.data)


def _as_guards(given: Any) -> tuple[Guard, ...]:
    several = () if given is None else (given,) if isinstance(given, (Guard, str, type)) else tuple(given)
    for one in several:
        check_given("guards", one, Guard, "guards, such as AccuracyGuard('accuracy', max_drop=0.01)")
    return several


def as_settings(pruners: Any, *others: Any, **named: Any) -> PruningSettings:
    """Return settings as they are given, or made of what else is given.

    Raises:
        PruningError: Settings are given, and beside them what they say already.
    """
    if not isinstance(pruners, PruningSettings):
        return PruningSettings(pruners, *others, **named)
    beside = [one for one in (*others, *named.values()) if one is not None and not (isinstance(one, int) and not one)]
    if beside:
        raise PruningError(f"PruningSettings say all: nothing is given beside them. Received: {told(beside[0])}")
    return pruners
