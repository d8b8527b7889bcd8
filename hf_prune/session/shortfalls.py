"""What a run has not done of what it was asked for: for its log, and for its report."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..live import LiveModel, Masking
from ..masks import count_masked
from ..structure import Group
from ..targets import Target
from .budgets import Budget
from .choosing import at_once
from .clock import Clock
from .tasks import Task, Tasks

logger = logging.getLogger(__name__)
_WHY = "min_kept, multiple_of, include, exclude and what a model needs at least let no more units go."
_NAMED = 4  # places that one sentence names


@dataclass(frozen=True)
class Shortfalls:
    """Compares a run that has ended with what it was asked for.

    Args:
        live: The live model.
        masking: What is masked of it.
        tasks: What was to be pruned.
        target: How much was to remain over all structured pruners.
        budget: What the target counts.
    """

    live: LiveModel
    masking: Masking
    tasks: Tasks
    target: Target | None
    budget: Budget | None

    def warn(self, clock: Clock, guards: str, macs_left: float) -> dict[str, list[str]]:
        """Log all of it, and return what a report should say: nothing where everything was done.

        Args:
            clock: Where the run ended.
            guards: What they did, in a sentence.
            macs_left: The share of the dense model's MACs that remains, in (0, 1].
        """
        finished = clock.position >= self.tasks.last_change
        told = self.missed(macs_left) if finished else self.early(clock, guards)
        for sentence in told:
            logger.warning(sentence)
        return {"warnings": told} if told else {}

    def early(self, clock: Clock, guards: str) -> list[str]:
        """Say that training ended before the schedule did, and whether a guard has held it back.

        Args:
            clock: Where the run ended.
            guards: What they did, in a sentence.
        """
        last = self.tasks.last_change
        held = f"while a guard held the schedule at {clock.position} of {last}"
        how = held if clock.position < clock.steps else f"before the schedule did at {last}"
        return [f"Training ended at step {clock.steps}, {how}: the model is denser than was asked for.{guards}"]

    def missed(self, macs_left: float) -> list[str]:
        """Say where a target or a sparsity was not reached, what a threshold did, and where nothing was left to do.

        Args:
            macs_left: The share of the dense model's MACs that remains, in (0, 1].
        """
        return [*self._untouched(macs_left), *self._of_target(), *self._of_tasks()]

    def _untouched(self, macs_left: float) -> Iterator[str]:
        live, alive = self.live, self.masking.units.alive
        untouched = live.record == live.before and all(bool(mask.all()) for mask in alive.values())
        if live.before and self.tasks.units and untouched:
            yield (
                "No unit was removed: a sparsity or a target is a share of the dense model, of whose MACs "
                f"{macs_left:.1%} were left before."
            )

    def _of_target(self) -> Iterator[str]:
        if self.target is None or self.budget is None:
            return
        name, share = self.target.budget[0], self.budget.share(self.target.budget[1])
        ((key, value),) = self.target.said.items() if name == "time" else [self.target.budget]
        left = self.budget.left(self.masking.units) / self.budget.dense
        if left > share * self.budget.tolerance:
            of = {"time": " of the dense model's time", "size_mb": " of the dense model's size"}.get(name, "")
            yield f"target.{key}={value:g} was not reached, {left:.3f}{of} is left: {_WHY}"

    def _of_tasks(self) -> Iterator[str]:
        for task in self.tasks:
            if task.pruner.threshold is not None:
                yield from self._of_threshold(task)
            elif task.structured and self.budget is None:
                yield from self._of_sparsity(task)

    def _of_sparsity(self, task: Task) -> Iterator[str]:
        total = sum(self.live.dense_units[name] for name in task.groups)
        gone = total - sum(self._left(task.groups).values())
        if gone < round(task.sparsity * total):
            yield (
                f"sparsity={task.sparsity:g} of {type(task.pruner).__name__} was not reached, {gone} of {total} units "
                f"of kind {' or '.join(task.kinds)} are gone: {_WHY}"
            )

    def _of_threshold(self, task: Task) -> Iterator[str]:
        """Say where a threshold was below every score, or above all of a place: nobody has seen the scores."""
        said = f"threshold={task.pruner.threshold:g} of {type(task.pruner).__name__}"
        if task.structured:
            dense, left, least = self.live.dense_units, self._left(task.groups), self._least(task)
        else:
            masks = {name: self.masking.weights[name] for name in task.weights if name in self.masking.weights}
            told = self.live.tensors, self.masking.units.vectors
            counted = {name: count_masked(*told, {name: mask}) for name, mask in masks.items()}
            dense, least = {name: of for name, (_, of) in counted.items()}, dict.fromkeys(counted, 0)
            left = {name: of - gone for name, (gone, of) in counted.items()}
        if all(left[name] == dense[name] for name in left):
            hint = "" if task.pruner.relative else " relative=True makes it a share of the largest."
            yield f"{said} has removed nothing: every score is above it.{hint}"
        emptied = [name for name in left if left[name] <= least[name] < dense[name]]
        if emptied:
            more = f" and {len(emptied) - _NAMED} more" if len(emptied) > _NAMED else ""
            kept = "no more than must stay" if task.structured and any(least[name] for name in emptied) else "nothing"
            yield f"{said} leaves {kept} of {', '.join(emptied[:_NAMED])}{more}."

    def _least(self, task: Task) -> Mapping[str, int]:
        """Return how many units must stay in each group; of one that has left with its layer, none."""
        there = {group.name: group for group in self.masking.units.named(task.groups)}
        return {name: _floor(task, there[name]) if name in there else 0 for name in task.groups}

    def _left(self, names: Iterable[str]) -> dict[str, int]:
        alive = self.masking.units.alive
        return {name: int(alive[name].sum()) if name in alive else 0 for name in names}


def _floor(task: Task, group: Group) -> int:
    """Return how many units of a group stay whatever the scores: those that leave together are not parted."""
    least, together = task.pruner.floor(group), at_once(task.pruner, group)
    return group.parts * -(-least // together) * together
