"""Guards: whether a change may be made now, must wait, or the last one is to be undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from ..errors import PruningError
from ..live import LiveModel, Snapshot, forwards_of
from ..registry import Registry
from ..sharding import from_first
from .clock import Clock

Verdict = Literal["go", "wait", "back"]
Made = TypeVar("Made", bound="type[Guard]")


class Guard:
    """A verdict before each change of masks, and a look at every evaluation.

    While one guard says ``"wait"``, the schedule stands still and training goes on. ``"back"`` restores weights,
    moments, masks and the schedule's position from before the last change that was made; steps, and the learning rate,
    go on. Of that moment there is a copy: a second ``"back"`` with no change in between restores the same again, and
    never something older; a second copy is held where only an older model was good enough to end with. A guard is asked
    when a change is due. A session asks a copy of it; where there are several
    processes, all go by what the first one's guards have seen.

    Attributes:
        name: What states and reports call it: what it was registered as.
        goes_back: Whether it may say ``"back"``: then a copy of the model is held.
        needs_evaluation: Whether it does nothing without evaluations: a Trainer must then make some.
        level: How much of the way to the final sparsity is gone, in [0, 1]: the session says it.
        kept: The same, of the copy that is held.
        progress: How much of the training is gone, in [0, 1]: the session says it.
    """

    name = ""
    goes_back = False
    needs_evaluation = False
    level = 0.0
    kept = 0.0
    progress = 0.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Look at what an evaluation has found."""

    def verdict(self) -> Verdict:
        """Say whether the change that is due may be made."""
        return "go"

    def limit(self) -> float:
        """Return how much of the way may be gone after the change that is due; it is due again where that is less."""
        return 1.0

    def proven(self) -> bool:
        """Say whether the model of now is good enough to be gone back to."""
        return True

    def lasting(self) -> bool:
        """Say whether the model of now is good enough for a run that goes back to end with."""
        return self.proven()

    def rests(self) -> bool:
        """Say whether the model of now is one to end with although the verdict is ``"wait"``: nothing more is tried."""
        return False

    def changed(self) -> None:
        """Take note that the change was made; `level` is that of now."""

    def undone(self) -> None:
        """Take note that the last change was undone; `level` is that of now."""

    def facts(self) -> dict[str, Any]:
        """Return what a report should say of it."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


GUARDS: Registry[type[Guard]] = Registry("guard")


def register_guard(name: str) -> Callable[[Made], Made]:
    """Register a class of guards under a name, by which a resumed run finds its state again.

    Args:
        name: The name.

    Raises:
        PruningError: It is taken.
    """

    def register(made: Made) -> Made:
        GUARDS.add(name, made)
        made.name = name
        return made

    return register


@dataclass
class _Kept:
    """A model to go back to, where the schedule and the level were, and whether a run may end with it."""

    model: Snapshot
    position: int
    level: float
    lasting: bool

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"model": self.model.state_dict()}


class Guarding:
    """All guards of a run, the model of before the last change that they let pass, and the last one to end with.

    Args:
        live: The live model.
        guards: They are asked in this order. Copies are: the settings that they come from hold no state.
        clock: Of the run.

    Attributes:
        goes_back: Whether any may undo a change.
        waits: Whether the last change that was due was not made.
        level: How much of the way to the final sparsity is gone, in [0, 1].
    """

    def __init__(self, live: LiveModel, guards: Sequence[Guard], clock: Clock) -> None:
        self._live, self._guards, self._clock = live, _named([_copy(one) for one in guards]), clock
        self._forwards = forwards_of(live.model)  # before anything is masked: skipping is made again from masks
        self._good: _Kept | None = None  # what "back" restores
        self._last: _Kept | None = None  # what the end restores; mostly the same one
        self._made = 0
        self.goes_back, self.waits, self.level = any(one.goes_back for one in guards), False, 0.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell all what an evaluation has found."""
        self._tell()
        for one in self._guards.values():
            one.observe(metrics)

    def verdict(self, position: int) -> Verdict:
        """Return the strictest verdict on the change at a position; there must be something to go back to."""
        self._agree()
        verdicts = {one.verdict() for one in self._guards.values()}
        strange = verdicts - {*get_args(Verdict)}
        if strange:
            raise PruningError(f"A guard's verdict must be 'go', 'wait' or 'back'. Received: {strange.pop()!r}")
        back = "back" in verdicts and self._good is not None
        self.waits = bool(verdicts - {"go"}) or (self.is_made(position) and not self._all("lasting"))
        return "back" if back else "wait" if self.waits else "go"

    def is_made(self, position: int) -> bool:
        """Whether the change at this position was made, and has only waited for an evaluation."""
        return bool(self._made) and self._made == position

    def limit(self) -> float:
        """Return how much of the way may be gone after the change that is due."""
        return min((one.limit() for one in self._guards.values()), default=1.0)

    def is_worth_keeping(self, verdict: Verdict) -> bool:
        """Whether to keep the model of now: before a change, or where it is the smallest that a run may end with."""
        smallest = self._last.level if self._last is not None and self._last.lasting else 0.0
        return self.goes_back and (verdict == "go" or (self._all("rests") and self.level > smallest))

    def keep(self, parts: Callable[[], Mapping[str, Any]], position: int) -> None:
        """Remember how everything is, where it is worth going back to."""
        if self._all("proven") or self._good is None:
            model = Snapshot(self._live.model, self._live.optimizer, parts())
            self._good = _Kept(model, position, self.level, self._all("lasting"))
            if self._good.lasting or self._last is None:
                self._last = self._good
            self._tell()

    def back(self, *, at_end: bool = False) -> tuple[dict[str, Any], int]:
        """Let the model and its optimizer be as they were before the last change.

        Args:
            at_end: As they were when a run could last have ended with them.

        Returns:
            The parts of that time, and the schedule's position at that change.
        """
        kept = self._last if at_end else self._good
        assert kept is not None
        kept.model.restore(self._live.model, self._live.optimizer)
        self.level, self._made = kept.level, 0
        self._tell()
        for one in self._guards.values():
            one.undone()
        return copy.deepcopy(kept.model.parts), kept.position

    def changed(self, asked: float, position: int, *, last: bool) -> bool:
        """Tell all that the change was made.

        Args:
            asked: How much of the way is gone by the schedule; a limit may have been below it.
            position: Of the schedule.
            last: Whether it was the last change.

        Returns:
            Whether the schedule stands here until there was more, or until an evaluation has approved it.
        """
        limit = self.limit()
        self.level, full = min(limit, asked), limit >= asked
        self._tell()
        for one in self._guards.values():
            one.changed()
        stands = not full or (last and not self._all("lasting"))
        self._made = position if full and stands else 0
        return stands

    def ends_badly(self) -> bool:
        """Whether a run ends with a model that no evaluation has approved, and there is one that has been."""
        self._agree()
        last = self._last
        return last is not None and not self._all("lasting") and (last.lasting or self.level != last.level)

    def settle(self) -> None:
        """Give back what was kept to go back to: no change is due any more, and nobody is asked."""
        self._good = self._last = None

    def facts(self) -> dict[str, Any]:
        """Return what a report should say of all guards."""
        found = {name: one.facts() for name, one in self._guards.items()}
        return {"guards": told} if (told := {name: facts for name, facts in found.items() if facts}) else {}

    def told(self) -> str:
        """Say in a sentence what all guards did."""
        by_name = self.facts().get("guards", {}).items()
        told = [f"{name} ({', '.join(f'{key} {value}' for key, value in facts.items())})" for name, facts in by_name]
        return f" Guards: {'; '.join(told)}." if told else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what all guards need, and what there is to go back to."""
        return {
            "guards": {name: one.state_dict() for name, one in self._guards.items()},
            "good": None if self._good is None else self._good.state_dict(),
            "last": None if self._last in (None, self._good) else self._last.state_dict(),
            "level": self.level,
            "made": self._made,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; states of before there were guards tell of none.

        Raises:
            PruningError: It is of other guards.
        """
        told = state["guards"]
        if not isinstance(told, Mapping):  # of before guards had names: by their order
            told = dict(zip(self._guards, told)) if len(told) == len(self._guards) else dict(enumerate(told))
        if told and set(told) != set(self._guards):
            raise PruningError(
                f"The pruning state must be of these guards: {', '.join(self._guards) or 'none'}. "
                f"Received: {', '.join(map(str, told))}"
            )
        for name, one in told.items():
            self._guards[name].load_state_dict(one)
        self._made, self.level = state.get("made", 0), state.get("level", 0.0)
        self._good = self._restored(state["good"])
        self._last = self._restored(state.get("last")) or self._good
        self._tell()

    def _restored(self, state: Mapping[str, Any] | None) -> _Kept | None:
        """Return what `_Kept.state_dict` has told of."""
        if state is None:
            return None
        model = Snapshot(self._live.model, self._live.optimizer)
        model.load_state_dict(state["model"], self._forwards)
        return _Kept(**{**state, "model": model})

    def _all(self, what: Literal["proven", "lasting", "rests"]) -> bool:
        """Whether all guards that go back say so of the model of now."""
        return all(getattr(one, what)() for one in self._guards.values() if one.goes_back)

    def _agree(self) -> None:
        """Let all processes go by what the guards of the first one have seen."""
        self._tell()
        for name, state in from_first(lambda: {n: one.state_dict() for n, one in self._guards.items()}).items():
            self._guards[name].load_state_dict(state)

    def _tell(self) -> None:
        progress = min(1.0, self._clock.steps / self._clock.total_steps)
        for one in self._guards.values():
            one.level, one.kept, one.progress = self.level, self._good.level if self._good else 0.0, progress


def _named(guards: Sequence[Guard]) -> dict[str, Guard]:
    """Return guards by name; of several of one name the second is called ``"accuracy 2"``."""
    names = [one.name or type(one).__name__ for one in guards]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return {f"{name} {n}" if n > 1 else name: one for name, n, one in zip(names, counts, guards)}


def _copy(guard: Guard) -> Guard:
    """Return a guard of the same settings with a state of its own; whatever it refers to stays one."""
    made = copy.copy(guard)
    made.load_state_dict(copy.deepcopy(guard.state_dict()))
    return made
