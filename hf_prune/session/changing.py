"""One change: from evidence to which units and weights stay. What is chosen is written by `Masking`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..evidence import EVIDENCE
from ..live import LiveModel, Masking, Units
from ..masks import Masks
from . import checks
from .budgets import Budget
from .choosing import choose_alone, choose_together, choose_weights, due_to_leave
from .scoring import Scorer
from .seeing import Seeing
from .settings import PruningSettings
from .tasks import Task, Tasks


@dataclass(frozen=True)
class Chooser:
    """Who is asked what stays, when masks are due to change."""

    told: PruningSettings
    live: LiveModel
    tasks: Tasks
    budget: Budget | None
    masking: Masking
    scorer: Scorer
    seeing: Seeing

    def choose(self, due: Sequence[Task], position: int, limit: float = 1.0) -> tuple[Units, Masks, dict[str, int]]:
        """Return which units and weights stay, and numbers that all processes must have found alike.

        Args:
            due: The tasks whose masks change.
            position: Of the schedule.
            limit: How much of the way may be gone then.

        Raises:
            PruningError: Scores are missing, not finite, or all zero; or the model cannot be without these layers.
        """
        scores = self._unit_scores(due, position)
        units, weights, facts = self._units(due, scores, position, limit), dict(self.masking.weights), dict[str, int]()
        for task in (one for one in due if not one.structured):
            taken = self.scorer.take(task, unread=self.told.data is not None)
            made, facts[task.weights[0]] = choose_weights(
                task, taken, weights, self.masking.given, self.live.tensors, units.vectors, position, limit
            )
            weights |= made
        return units, weights, facts

    def _units(self, due: Sequence[Task], scores: dict[str, Tensor], position: int, limit: float) -> Units:
        structured, target, check = [task for task in due if task.structured], self.told.target, self.live.check
        reopened = [name for task in structured if task.rule.returns for name in task.groups]
        units = self.masking.reopened(reopened) if reopened else self.masking.units
        if structured and target is not None:
            assert self.budget is not None
            share = self.budget.share(target.budget[1])
            return choose_together(self.tasks.units, units, scores, self.budget, share, position, check, limit)
        for task in structured:
            units = choose_alone(task, units, scores, self.live.dense_units, position, check, limit)
        return units

    def _unit_scores(self, due: Sequence[Task], position: int) -> dict[str, Tensor]:
        """Return ``(units,)`` scores of every group of the tasks that are due, checked to be finite."""
        structured = [task for task in due if task.structured]
        scoring = self.tasks.units if structured and self.told.target is not None else structured
        units = [(task.score, group) for task in scoring for group in self.masking.units.named(task.groups)]
        ready: dict[str, Tensor] = {}
        if self.told.data is not None and any(EVIDENCE[need].from_data for task in due for need in task.needs):
            self.seeing.show()
            alone = next((task for task in structured if any(EVIDENCE[need].at_once for need in task.needs)), None)
            now, dense = self.masking.units, self.live.dense_units
            leaving = None if alone is None else due_to_leave(alone, now, dense, position)
            weights = [task for task in due if not task.structured]
            ready = self.scorer.calibrate(self.told.data, self.told.loss, weights, units, leaving)
            self.seeing.hide()
        self.scorer.synchronize()
        ready |= {group.name: self.scorer.units(score, group) for score, group in units if group.name not in ready}
        return checks.checked_scores({group.name: ready[group.name] for _, group in units}, self.masking.units.alive)
