"""What drives units towards zero between changes: a regularisation, and what learned scores aim at."""

from __future__ import annotations

from collections.abc import Iterable

from ..evidence import Aim, Evidence
from ..live import LiveModel, Masking, Units
from .budgets import Budget
from .regularising import Regularising
from .settings import PruningSettings
from .tasks import Task, Tasks


class Driving:
    """Behind each step of the optimizer: shrinks what is regularised, and tells evidence how much is to remain by now.

    Args:
        told: What the run was told.
        live: The live model.
        tasks: What is pruned.
        masking: What is masked.
        budget: Of the target, if there is one.
        evidence: What scores are made from.
    """

    def __init__(
        self,
        told: PruningSettings,
        live: LiveModel,
        tasks: Tasks,
        masking: Masking,
        budget: Budget | None,
        evidence: Iterable[Evidence],
    ) -> None:
        self._live, self._tasks, self._masking, self._budget = live, tasks, masking, budget
        self._share = 1.0 if told.target is None or budget is None else budget.share(told.target.budget[1])
        self._learning = [one for one in evidence if one.learns]
        self._regularising = Regularising(told.regularisation, live, tasks, masking, budget, self._share)
        self._priced: tuple[Units | None, dict[str, float], float] = None, {}, 0.0

    def shrink(self, position: int, taken: bool) -> None:
        """Shrink what is regularised, before masks are chosen: momentum has moved what was zero.

        Args:
            position: Of the schedule, behind this step.
            taken: Whether the optimizer has taken it.
        """
        if taken:
            progress = min(1.0, position / self._tasks.last_change)
            self._regularising.step(self._tasks.ahead(position - 1), progress)

    def aim(self, position: int) -> None:
        """Tell evidence that learns how much is to remain at this position, after masks have changed."""
        aims = self._aims(position) if self._learning else []
        for one in self._learning:
            one.aims = [aim for aim in aims if aim.costs.keys() & {*one.groups, *one.weights}]

    def settle(self) -> None:
        """Let what was learned go into the model, also of a run that ended early: evaluations have seen it so."""
        for one in self._learning:
            one.settle()

    def _aims(self, position: int) -> list[Aim]:
        """Return one aim for the target, and one for each task that has its own sparsity."""
        alone = [self._alone(task, position) for task in self._tasks if task.sparsity]
        return alone if self._budget is None else [self._together(self._budget, position), *alone]

    def _together(self, budget: Budget, position: int) -> Aim:
        """Aim at a target: units cost shares of the dense model's budget."""
        tasks, units = self._tasks.units, self._masking.units
        priced, costs, fixed = self._priced
        if priced is not units:
            groups = units.named([name for task in tasks for name in task.groups])
            costs = {name: cost / budget.dense for name, cost in budget.costs(units, groups).items()}
            there = sum(cost * int(units.alive[name].sum()) for name, cost in costs.items())
            fixed = budget.left(units) / budget.dense - there
            self._priced = units, costs, fixed
        goal = 1 - (1 - self._share) * _gone(tasks[0], position)
        return Aim(goal, costs, {name: units.alive[name] for name in costs}, tasks[0].last_change, fixed)

    def _alone(self, task: Task, position: int) -> Aim:
        """Aim at a task's own sparsity: all units, or all weights, cost the same."""
        if task.structured:
            there, total = self._masking.units.alive, sum(self._live.dense_units[name] for name in task.groups)
            names = [name for name in task.groups if name in there]  # a layer may have taken some along
        else:
            there, total = self._masking.weights, sum(self._live.tensors[name].numel() for name in task.weights)
            names = list(task.weights)
        alive = {name: there[name] for name in names if name in there}
        goal = 1 - task.sparsity * _gone(task, position)
        return Aim(goal, dict.fromkeys(names, 1 / total), alive, task.last_change)


def _gone(task: Task, position: int) -> float:
    """Return how much of the way learned scores have gone: as far as the schedule, or evenly where that is further."""
    return max(task.fraction(position), min(1.0, position / task.last_change))
