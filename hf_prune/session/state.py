"""What a resumed run needs, out of a session and into one; and a sharded session as a whole one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..architectures import find_groups
from ..errors import PruningError
from ..masks import local_masks, whole_masks
from ..plan import Record
from ..removal import skip_removed
from ..report import Measurement
from ..sharding import any_sharded, join, whole_copy
from ..stock import write_record
from ..structure import named_tensors
from .counting import count_zeros
from .reviving import keep_masks
from .stepping import read_next

if TYPE_CHECKING:
    from .pruning import Pruning

logger = logging.getLogger(__name__)


def state_of(pruning: Pruning) -> dict[str, Any]:
    """Return step, plan, masks (whole ones) and running means; under FSDP all processes call it."""
    state: dict[str, Any] = {
        "steps": pruning.steps,
        "skipped": pruning.skipped,
        "leaky": pruning._leaky,
        "unchecked": pruning._unchecked,
        "most_bytes": pruning.most_bytes,
        "record": {name: list(entry) for name, entry in pruning.record.items()},
        "dense": [pruning.dense_units, pruning.dense_macs, asdict(pruning.dense), pruning.counted],
        "alive": dict(pruning.alive),
        "masks": whole_masks(named_tensors(pruning.model), pruning.masks),
    }
    if pruning.watcher is not None:
        state |= {f"mean_{need}": _copies(means) for need, means in pruning.watcher.means.items()}
    if pruning.shadows.keep or pruning.scorer.movement:
        tensors = named_tensors(pruning.model)
        state["shadows"] = pruning.shadows.state(tensors)
        state["movement"] = _copies({name: join(one, tensors[name]) for name, one in pruning.scorer.movement.items()})
    return state


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU: a session goes on summing up in place."""
    return {name: one.detach().to("cpu", copy=True) for name, one in tensors.items()}


def restore(pruning: Pruning, state: Mapping[str, Any]) -> None:
    """Set a session to where `state_of` was taken.

    Raises:
        PruningError: The state is of another model or of other pruners.
    """
    means = pruning.watcher.means if pruning.watcher is not None else {}
    if set(state["alive"]) != set(pruning.alive) or any(f"mean_{need}" not in state for need in means):
        raise PruningError(
            f"The pruning state must be of this model and these pruners. Received: {sorted(state['alive'])[:4]}"
        )
    for need, name in ((need, name) for need, known in means.items() for name in known):
        found = state[f"mean_{need}"].get(name)
        if found is None or found.shape != state["alive"].get(name, found).shape:
            raise PruningError(
                f"The pruning state must have running means of all groups. Received: {need} of '{name}' "
                f"{'missing' if found is None else 'of another size'}"
            )
    pruning.steps, pruning._leaky, pruning._unchecked = state["steps"], state["leaky"], state["unchecked"]
    pruning.skipped, pruning.most_bytes = state.get("skipped", 0), state.get("most_bytes", 0)
    pruning.record = Record({name: (list(kept), dense) for name, (kept, dense) in state["record"].items()})
    pruning.dense_units, pruning.dense_macs, dense, pruning.counted = state["dense"]
    pruning.dense = Measurement(**dense)
    pruning.groups = find_groups(pruning.model) if pruning.groups else []
    for group in pruning.groups:
        if len(state["alive"][group.name]) != group.units:
            raise PruningError(
                f"The pruning state of '{group.name}' must have the model's {group.units} units. "
                f"Received: {len(state['alive'][group.name])}"
            )
    write_record(pruning.model, pruning.record)
    pruning.alive = {name: mask.clone() for name, mask in state["alive"].items()}
    tensors = named_tensors(pruning.model)
    pruning.masks = local_masks(tensors, state["masks"])
    pruning.shadows.load(state.get("shadows", {}), tensors, keep_masks(pruning, tensors))
    pruning.scorer.movement = local_masks(tensors, state.get("movement", {}))
    pruning._settle()
    if pruning.watcher is not None:
        pruning.watcher.stop()
        pruning.watcher.means = {need: _copies(state[f"mean_{need}"]) for need in means}
        pruning.watcher.groups = [group for group in pruning.groups if group.name in pruning.watcher.means["gate"]]
        if not pruning.finished and pruning.data is None:
            pruning.watcher.start()
    read_next(pruning)
    skip_removed(pruning.model, pruning.groups, pruning._live_kept())
    pruning.zeros = count_zeros(pruning)
    pruning.hold()


def gather(pruning: Pruning) -> bool:
    """Let a session go on with a plain copy of its sharded model; return whether units can be removed now."""
    if not any_sharded(pruning.model.parameters()):
        return True
    masks, plain = whole_masks(named_tensors(pruning.model), pruning.masks), whole_copy(pruning.model)
    if plain is None:
        logger.warning(
            f"{type(pruning.model).__name__} is sharded, and has no config by which to build a whole one: it stays so, "
            "with zeros. Load its full state dict into a plain model, and call hf_prune.shrink where units are to go."
        )
        return False
    pruning.model, pruning.optimizer, pruning.masks = plain, None, masks
    pruning.groups = find_groups(plain) if pruning.groups else []
    return True
