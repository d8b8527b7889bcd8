"""What scores are made from: one kind of evidence a file, made by a session for all that need it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from ..errors import PruningError
from ..live import Cut, LiveModel, Masking, Units
from ..registry import Registry
from ..structure import Group


class MissingEvidence(PruningError):  # noqa: N818  it is one of ours, by any other name
    """There is nothing to score from; the message goes on from "Score 'NAME' needs"."""


@dataclass(frozen=True)
class Calibration:
    """What evidence that goes through data by itself is told.

    Args:
        batches: On the model's device; they can be gone through many times.
        loss_of: From a batch to the loss of the live model as it is at that moment.
        units: Which units are there.
        leaving: How many units of its groups leave now; ``None``: that is not known, as a target decides.
    """

    batches: Sequence[Mapping[str, Any]]
    loss_of: Callable[[Mapping[str, Any]], Tensor]
    units: Units
    leaving: int | None = None


@dataclass(frozen=True)
class Aim:
    """How much is to remain by now, for scores that are learned.

    Args:
        goal: The share of the dense model's cost that is to remain at this step, in [0, 1].
        costs: What one unit of a group, or one weight of a parameter, costs: a share of the same.
        alive: What is not masked, True = there; what is not named is there as a whole.
        steps: At which position of the schedule the goal is reached for good, at least 1.
        fixed: The share that costs of units do not tell.
    """

    goal: float
    costs: Mapping[str, float]
    alive: Mapping[str, Tensor]
    steps: int
    fixed: float = 0.0


class Evidence:
    """What scores are made from. A session makes one for all scores that need it, and hands it what happens.

    Everything here may be left as it is but the two that hand out numbers: `of_weight`, `of_units`, or both. In a step:
    `prepare`; the batches; `read`, where gradients are complete; the optimizer's step; `commit` of what hooks saw, or
    `discard` where the step was not taken; a change of masks where one is due, `follow` where units left; `step`, of
    steps that were taken: an optimizer of its own steps there.

    Args:
        live: The live model.
        groups: Names of the groups that are scored by it.
        weights: Names of the parameters that are scored by it.
        seed: For what is drawn.

    Attributes:
        name: What its state is called: the first need that it was registered for.
        scale: What gradients are multiplied by while they are read.
        active: Whether it sees the batches of this step.
        from_data: Whether it comes from batches: one shot then needs data.
        takes: What of batches: their ``"gradients"``, only ``"forwards"``, or calibration ``"data"`` that it goes
            through by itself, in `measure`: there must be data then, in training too.
        at_once: Whether it says which units leave first for one change alone, of one pruner: it is told how many.
        of_step: Whether it is of the last step's batches alone: where that step was left out, there is none.
        heavy: Whether it takes memory that grows with the model: the log then says how much.
        late: Whether there is nothing to score from before its first `step`: the first change must come behind one.
        learns: Whether it is told how much is to remain (`aims`) before each of its steps.
        aims: How much that is: one of each target and each sparsity.
        sees_masked: Whether it can see what masked units would bring, behind shut gates: those of `groups` may return.
    """

    name = ""
    active = True
    from_data = True
    takes: Literal["gradients", "forwards", "data"] = "gradients"
    at_once = False
    of_step = False
    heavy = False
    late = False
    learns = False
    aims: Sequence[Aim] = ()
    sees_masked = False

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str], seed: int) -> None:
        self.live, self.groups, self.weights, self.seed = live, tuple(groups), tuple(weights), seed
        self.scale = 1.0

    # numbers
    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return what is needed of a parameter, of its whole shape, in every process.

        Raises:
            MissingEvidence: There is none.
        """
        raise MissingEvidence(f"'{need}', which no single weight has")

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return what is needed of the units of a group, ``(units,)``.

        Raises:
            MissingEvidence: There is none.
        """
        raise MissingEvidence(f"'{need}', which no unit has")

    # batches
    def start(self) -> None:
        """Hook the model, to see batches."""

    def stop(self) -> None:
        """Take all hooks away; what was seen stays."""

    def prepare(self, step: int, until_change: int | None) -> None:
        """Get ready for the batches of the next step.

        Args:
            step: Its number in the run, from 1.
            until_change: Steps until masks of units change next, 0: in this one; ``None``: they change no more. Of
                evidence of weights alone it is masks of weights.
        """

    def shut(self, gone: Mapping[str, Tensor]) -> None:
        """Let units be computed and hand on zeros, from now on.

        Args:
            gone: Group to ``(units,)`` boolean, True = shut; all others hand on what they compute.
        """

    def commit(self, scale: float = 1.0, *, may_overflow: bool = False) -> None:
        """Let what batches brought count: the optimizer has taken the step.

        Args:
            scale: What the loss was multiplied by, as a GradScaler does.
            may_overflow: Whether numbers that are not finite tell of a scale that is too large, and are left out.
        """

    def discard(self) -> None:
        """Forget what batches brought: their step was not taken."""

    def is_finite(self) -> bool:
        """Whether all that batches brought and that does not count yet is finite."""
        return True

    def reset(self) -> None:
        """Forget all that has counted: calibration data follow."""

    def measure(self, calibration: Calibration) -> None:
        """Go through calibration data, where it `takes` data; all processes call it, each with its own."""

    def synchronize(self) -> None:
        """Let all processes hold the same, so that they decide the same; all of them call it."""

    # steps
    def read(self, masking: Masking, ahead: Collection[str]) -> None:
        """Read gradients: they are complete, and `scale` times too large; ``None`` where a backward reached nothing.

        What is masked is 0 in the live tensors; `masking.full` has its last value.

        Args:
            masking: What is masked.
            ahead: Names of the groups and parameters whose masks will still change.
        """

    def step(self) -> None:
        """Go on: the optimizer has stepped, and masks have changed where they were due."""

    def settle(self) -> None:
        """Give memory back: no mask changes any more."""

    # a part of a session
    @property
    def nbytes(self) -> int:
        """Its memory in bytes, in this process."""
        return 0

    def follow(self, cut: Cut) -> None:
        """Go on with a model that has lost units."""
        self.groups = tuple(name for name in self.groups if name in cut.groups)
        self.weights = tuple(cut.names[name] for name in self.weights if name in cut.names)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; under FSDP all processes call it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


Made = TypeVar("Made", bound=type[Evidence])
EVIDENCE: Registry[type[Evidence]] = Registry("need")


def register_evidence(*needs: str) -> Callable[[Made], Made]:
    """Register a class of evidence under what scores say in their `needs`.

    Args:
        *needs: One name, or several that one object hands out; the first one names it in states.

    Raises:
        PruningError: A name is taken.

    Example:
        >>> @register_evidence("age")
        ... class Age(Evidence):
        ...     steps = 0
        ...     def step(self): self.steps += 1
        ...     def of_weight(self, need, name, weight): return torch.full_like(weight, self.steps)
    """

    def register(made: Made) -> Made:
        for need in needs:
            EVIDENCE.add(need, made)
        made.name = needs[0]
        return made

    return register
