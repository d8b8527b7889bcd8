"""Guards: whether a change may be made now, must wait, or the last one is to be undone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ..errors import PruningError
from ..live import LiveModel, Snapshot, forwards_of
from ..registry import Registry

Verdict = Literal["go", "wait", "back"]


class Guard:
    """A verdict before each change of masks, and a look at every evaluation.

    While one guard says ``"wait"``, the schedule stands still and training goes on. ``"back"`` restores weights,
    moments, masks and the schedule's position from before the last change that was made; steps, and the learning rate,
    go on. It is asked when a change is due, so that the last one cannot be undone. A session asks a copy of it.

    Attributes:
        goes_back: Whether it may say ``"back"``: then a copy of the model is held.
    """

    goes_back = False

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Look at what an evaluation has found."""

    def verdict(self) -> Verdict:
        """Say whether the change that is due may be made."""
        return "go"

    def changed(self) -> None:
        """Take note that the change was made."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


GUARDS: Registry[type[Guard]] = Registry("guard")
register_guard = GUARDS.register


class Guarding:
    """All guards of a run, and the model as it was before the last change that they let pass.

    Args:
        live: The live model.
        guards: They are asked in this order. Copies are: the settings that they come from hold no state.

    Attributes:
        goes_back: Whether any may undo a change.
        waits: Whether the last change that was due was not made.
    """

    def __init__(self, live: LiveModel, guards: Sequence[Guard]) -> None:
        self._live, self._guards = live, [_copy(one) for one in guards]
        self._forwards = forwards_of(live.model)  # before anything is masked: skipping is made again from masks
        self._good: Snapshot | None = None
        self._position = 0
        self.goes_back, self.waits = any(one.goes_back for one in guards), False

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell all what an evaluation has found."""
        for one in self._guards:
            one.observe(metrics)

    def verdict(self) -> Verdict:
        """Return the strictest verdict; there must be something to go back to."""
        verdicts = {one.verdict() for one in self._guards}
        strange = verdicts - {*get_args(Verdict)}
        if strange:
            raise PruningError(f"A guard's verdict must be 'go', 'wait' or 'back'. Received: {strange.pop()!r}")
        back = "back" in verdicts and self._good is not None
        self.waits = bool(verdicts - {"go"})
        return "back" if back else "wait" if self.waits else "go"

    def keep(self, parts: Mapping[str, Any], position: int) -> None:
        """Remember how everything is before a change."""
        self._good, self._position = Snapshot(self._live.model, self._live.optimizer, parts), position

    def back(self) -> tuple[dict[str, Any], int]:
        """Let the model and its optimizer be as they were before the last change.

        Returns:
            The parts of that time, and the schedule's position at that change.
        """
        assert self._good is not None
        self._good.restore(self._live.model, self._live.optimizer)
        return copy.deepcopy(self._good.parts), self._position

    def changed(self) -> None:
        """Tell all that the change was made."""
        for one in self._guards:
            one.changed()

    def settle(self) -> None:
        """Give back what was kept to go back to: no change is due any more, and nobody is asked."""
        self._good = None

    def state_dict(self) -> dict[str, Any]:
        """Return what all guards need, and what there is to go back to."""
        good = None if self._good is None else self._good.state_dict()
        return {"guards": [one.state_dict() for one in self._guards], "good": good, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; states of before there were guards tell of none.

        Raises:
            PruningError: It is of other guards.
        """
        if state["guards"] and len(state["guards"]) != len(self._guards):
            raise PruningError(
                f"The pruning state must be of these guards, {len(self._guards)}. Received: {len(state['guards'])}"
            )
        for one, told in zip(self._guards, state["guards"]):
            one.load_state_dict(told)
        self._good, self._position = None, state["position"]
        if state["good"] is not None:
            self._good = Snapshot(self._live.model, self._live.optimizer)
            self._good.load_state_dict(state["good"], self._forwards)


def _copy(guard: Guard) -> Guard:
    """Return a guard of the same settings with a state of its own; whatever it refers to stays one."""
    made = copy.copy(guard)
    made.load_state_dict(copy.deepcopy(guard.state_dict()))
    return made
