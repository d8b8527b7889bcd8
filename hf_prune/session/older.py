"""Pruning states that earlier versions wrote: they are read for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PruningError


def steps_of(state: Mapping[str, Any]) -> int:
    """Return the steps of a run, taken or left out, at which a state was taken.

    Raises:
        PruningError: It does not say.
    """
    try:
        clock = of_today(state)["clock"]
        return int(clock["steps"] + clock["skipped"])
    except (KeyError, TypeError, ValueError) as error:
        raise PruningError(f"The pruning state must say at which step it was taken. Received: {error!r}") from error


def of_today(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state as this version has it: by the parts of a session.

    Flat states, of before sessions had parts, have everything beside each other.
    """
    if "steps" not in state:
        return state
    dense_units, dense_macs, dense, counted = state["dense"]
    steps, skipped = state["steps"], state.get("skipped", 0)
    means = {key.removeprefix("mean_"): one for key, one in state.items() if key.startswith("mean_")}
    masking = {"alive": state["alive"], "weights": state["masks"], "shadows": state.get("shadows", {})}
    return {
        "live": {"record": state["record"], "before": {}, "dense_units": dense_units, "dense_macs": dense_macs},
        "tasks": {"kinds": counted},
        "clock": {"steps": steps, "skipped": skipped, "position": steps},
        # which entries leak was not written: it is found out again in the next step
        "masking": {**masking, "leaking": [], "unchecked": state["leaky"] or state["unchecked"]},
        "numbers": {"dense": dense, "most_bytes": state.get("most_bytes", 0)},
        "evidence.gate": {"means": means},
        "evidence.movement": {"sums": state.get("movement", {})},
        "budget": {"dense": dense_macs},
        "guards": {"guards": [], "good": None, "position": 0},
    }
