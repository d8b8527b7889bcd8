"""One pruner on one model: what it chooses from, by which score, when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import PruningError
from ..evidence import EVIDENCE
from ..live import Cut, LiveModel
from ..pruners import Pruner, UnitPruner, WeightPruner
from ..rules import Rule
from ..schedules import Schedule
from ..scores import SCORES, Score, get_score
from ..structure import Group
from .clock import Clock

Kinds = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Task:
    """One pruner on one model.

    Args:
        pruner: Its settings.
        schedule: When.
        total_steps: Of the run.
        kinds: Kind to the names of the dense model's groups that units are chosen from; empty for single weights.
        weights: Names of the parameters that single weights are chosen from; empty for units.
        of: Whether units are scored as such, or by the weights that they own; single weights always are.
    """

    pruner: Pruner
    schedule: Schedule
    total_steps: int
    kinds: Kinds
    weights: tuple[str, ...]
    of: Literal["unit", "weight"]

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that units are chosen from; some may have left the model with their layer."""
        return tuple(name for names in self.kinds.values() for name in names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all groups and parameters that it chooses from."""
        return (*self.groups, *self.weights)

    @property
    def structured(self) -> bool:
        """Whether it removes units."""
        return isinstance(self.pruner, UnitPruner)

    @cached_property
    def score(self) -> Score:
        """By what it chooses."""
        return get_score(self.pruner.score, self.of)

    @cached_property
    def rule(self) -> Rule:
        """What may come back at a change."""
        return self.pruner.resolve_rule()

    @cached_property
    def scores(self) -> dict[str, Score]:
        """All scores that it needs, by name: its own under ``""``, and those of its rule."""
        return {"": self.score, **{name: get_score(name, "weight") for name in self.rule.also}}

    @cached_property
    def needs(self) -> frozenset[str]:
        """What its scores need."""
        return frozenset(need for score in self.scores.values() for need in score.needs)

    @property
    def of_step(self) -> bool:
        """Whether it is scored by what only the last step's batches tell."""
        return any(EVIDENCE[need].of_step for need in self.needs)

    @property
    def waits(self) -> bool:
        """Whether all that its scores need counts only behind the step, and no gradient is among it."""
        return bool(self.needs) and all(EVIDENCE[need].takes == "forwards" for need in self.needs)

    @cached_property
    def changes(self) -> tuple[int, ...]:
        """The positions of the schedule at which its masks change."""
        return tuple(self.schedule.change_steps(self.total_steps))

    @property
    def last_change(self) -> int:
        """After it nothing changes any more."""
        return self.changes[-1]

    @property
    def sparsity(self) -> float:
        """Share that is to leave; 0 where a target or a threshold decides."""
        return self.pruner.sparsity or 0.0

    def threshold(self, scores: Tensor, position: int, limit: float = 1.0) -> float:
        """Return up to which score units or weights leave at this position, where a threshold decides.

        Args:
            scores: All of a group, or of a tensor.
            position: Of the schedule.
            limit: How much of the way may be gone then, in [0, 1].
        """
        largest = float(scores.max()) if self.pruner.relative and scores.numel() else 1.0
        return (self.pruner.threshold or 0.0) * min(limit, self.fraction(position)) * largest

    def due(self, position: int) -> bool:
        """Whether its masks change at this position."""
        return position in self.changes

    def fraction(self, position: int) -> float:
        """Return how much of its way is gone at this position, in [0, 1]."""
        return self.schedule.fraction(position, self.total_steps)


class Tasks:
    """All tasks of a run, in the order of its pruners; they are never changed, but exchanged for others."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tuple(tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    @property
    def units(self) -> list[Task]:
        """Those that remove units."""
        return [task for task in self if task.structured]

    @property
    def weights(self) -> list[Task]:
        """Those that mask single weights."""
        return [task for task in self if not task.structured]

    @property
    def last_change(self) -> int:
        """The position after which nothing changes any more."""
        return max(task.last_change for task in self)

    @property
    def returning(self) -> list[str]:
        """Names of groups and parameters of which something may come back."""
        return [name for task in self if task.rule.returns for name in task.names]

    @property
    def from_zero(self) -> list[str]:
        """Names of parameters of which what comes back begins at zero."""
        return [name for task in self if task.rule.from_zero for name in task.names]

    def due(self, clock: Clock, taken: bool, *, waits: bool) -> list[Task]:
        """Return the tasks whose masks change now.

        In the last step all that are not done do: steps that were left out must not leave a run denser than asked.

        Args:
            clock: Where the run is; in such a last step the schedule is put to its end.
            taken: Whether the optimizer has taken this step.
            waits: Whether a guard holds the schedule back.
        """
        position = clock.position
        due = [task for task in self if taken and task.due(position)]
        late = [task for task in self if task.last_change > position]
        blind = not taken and any(task.of_step for task in late)
        if not late or blind or not clock.over or waits:
            return due
        clock.position = self.last_change
        return [task for task in self if task in due or task in late]

    def ahead(self, position: int) -> set[str]:
        """Return the names of groups and parameters whose masks will still change."""
        return {name for task in self if position < task.last_change for name in task.names}

    def follow(self, cut: Cut) -> None:
        """Go on with the weights that are left, under their names of now."""
        now = [tuple(cut.names[name] for name in task.weights if name in cut.names) for task in self]
        self._tasks = tuple(replace(task, weights=names) for task, names in zip(self, now))

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted on the dense model."""
        units = [(i, task.kinds) for i, task in enumerate(self) if task.kinds]
        return {"kinds": {str(i): {kind: list(names) for kind, names in kinds.items()} for i, kinds in units}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on the dense model that a run began with."""
        self._tasks = tuple(replace(task, kinds=state["kinds"].get(str(i), {})) for i, task in enumerate(self))


def make_tasks(
    pruners: Sequence[Pruner],
    live: LiveModel,
    schedule: Schedule,
    total_steps: int,
    epoch_steps: float | None = None,
) -> Tasks:
    """Ask each pruner what it chooses from on this model.

    Where a unit has no gate (an expert, a neuron of stacked experts), all are scored by the weights that they own, as
    scores of gates and of weights do not compare.

    Raises:
        PruningError: A score is of gates alone, and there is a unit that has none.
    """
    dense = live.dense_groups()
    kinds = [_by_kind(pruner.choose(dense)) if isinstance(pruner, UnitPruner) else {} for pruner in pruners]
    names = {name for mine in kinds for named in mine.values() for name in named}
    blind = next((group.name for group in live.groups if group.name in names and not group.has_gate), None)

    def make(pruner: Pruner, mine: Kinds) -> Task:
        of = _scored_by(pruner, blind)
        weights = _weights_of(pruner, live.model)
        when = (pruner.schedule or schedule).in_steps(epoch_steps)
        return Task(pruner, when, total_steps, mine, weights, of)

    return Tasks([make(pruner, mine) for pruner, mine in zip(pruners, kinds)])


def _scored_by(pruner: Pruner, blind: str | None) -> Literal["unit", "weight"]:
    """Say whether a pruner's score is one of units or of weights, where a group has no gates (`blind`)."""
    score = pruner.resolve_score()
    if score.of == "weight" or blind is None or not any(EVIDENCE[need].sees_masked for need in score.needs):
        return score.of
    if "weight" not in SCORES[score.name] or any(EVIDENCE[n].heavy for n in SCORES[score.name]["weight"].needs):
        raise PruningError(
            f"Score '{score.name}' of units reads gates, and units of '{blind}' have none: take a score of weights, "
            f"such as 'taylor' or 'l1'. Received: {type(pruner).__name__}"
        )
    return "weight"


def _weights_of(pruner: Pruner, model: nn.Module) -> tuple[str, ...]:
    return tuple(pruner.choose_weights(model)) if isinstance(pruner, WeightPruner) else ()


def _by_kind(groups: Sequence[Group]) -> dict[str, list[str]]:
    kinds = dict.fromkeys(group.kind for group in groups)
    return {kind: [group.name for group in groups if group.kind == kind] for kind in kinds}
