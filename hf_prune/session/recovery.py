"""A pruning state that was lost, read from the zeros of a resumed model: where that is exact, and only there."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ..errors import CheckpointError
from ..plan import close_kept
from ..removal import unmasked_units
from ..sharding import whole
from ..structure import Group, live_shapes, named_tensors, unit_cost
from .pruning import Pruning

_READABLE = ("head", "kv_group", "neuron", "channel")  # others are also masked by hooks, which no file holds


def recover(pruning: Pruning, steps: int) -> None:
    """Set a fresh session to where a run was after so many steps, by the zeros in its model's weights.

    Zeros tell the masks. They do not tell running means of scores: these are not needed where no change is due any
    more, or scores come from calibration data, from weights alone or from the gradients of a single step. How many
    weights of the dense model were not zero is lost: the report then takes those that are left.

    Args:
        pruning: A session that has just been made, of a model whose weights have been loaded.
        steps: Optimizer steps behind it.

    Raises:
        CheckpointError: What was lost cannot be recovered exactly.
    """
    if hasattr(pruning.model, "peft_config"):
        raise CheckpointError("checkpoints of adapters hold no zeros")
    strange = {group.kind for groups in pruning.chosen.values() for group in groups} - {*_READABLE}
    if strange:
        raise CheckpointError(f"masks of kind {', '.join(sorted(strange))} are more than zeros")
    if pruning.watcher is not None and pruning.data is None and steps < pruning.last_change:
        raise CheckpointError(f"running means of scores are lost, and changes are due until step {pruning.last_change}")
    if pruning.follows_weights and steps < pruning.last_change:
        raise CheckpointError(
            f"values of masked weights are lost, and changes are due until step {pruning.last_change}"
        )
    fresh, masks = pruning.state_dict(), _weight_masks(pruning, steps)
    pruning.load_state_dict({**fresh, "steps": steps, "unchecked": True, "alive": _alive(pruning), "masks": masks})
    _check_units(pruning)


def _last_change(pruning: Pruning, i: int, steps: int) -> int:
    """Return the step at which a pruner last changed masks; 0: it has not yet."""
    return max((step for step in pruning.changes[i] if step <= steps), default=0)


def _fraction(pruning: Pruning, i: int, steps: int) -> float:
    """Return how much of a pruner's way is gone after so many steps, in [0, 1]."""
    last, schedule = _last_change(pruning, i, steps), pruning.pruners[i].schedule or pruning.schedule
    return schedule.fraction(last, pruning.total_steps) if last else 0.0


def _weight_masks(pruning: Pruning, steps: int) -> dict[str, Tensor]:
    """Read masks of single weights; there must be exactly as many zeros as the schedule has made."""
    tensors, masks = named_tensors(pruning.model), dict[str, Tensor]()
    for i, names in pruning.weights.items():
        if not _last_change(pruning, i, steps):
            continue
        mine = {name: whole(tensors[name].detach()) != 0 for name in names}
        total = sum(mask.numel() for mask in mine.values())
        expected = round((pruning.pruners[i].sparsity or 0.0) * _fraction(pruning, i, steps) * total)
        zeros = total - sum(int(mask.sum()) for mask in mine.values())
        if zeros != expected:
            raise CheckpointError(f"{zeros} of {total} weights are zero, and the schedule has masked {expected}")
        masks.update(mine)
    return masks


def _alive(pruning: Pruning) -> dict[str, Tensor]:
    """Read masks of units: True where any entry that a unit owns is not zero."""
    bare = [replace(group, least=0, multiple=1) for group in pruning.groups if group.kind in _READABLE]
    kept = {group.name: list(range(group.units)) for group in pruning.groups} | unmasked_units(pruning.model, bare)
    alive = {name: mask.zero_() for name, mask in pruning.state_dict()["alive"].items()}
    for name, units in close_kept(pruning.groups, kept).items():
        alive[name][units] = True
    return alive


def _check_units(pruning: Pruning) -> None:
    """Check that as many units are masked as the schedule has asked for, and none before it began.

    Before its last change a schedule may be behind by less than what leaves at once.
    """
    if pruning.target is not None and pruning.chosen:
        _check_target(pruning, pruning.target.macs)
    for i, chosen in pruning.chosen.items():
        total = sum(pruning.dense_units[name] for names in pruning.counted[str(i)].values() for name in names)
        fraction = _fraction(pruning, i, pruning.steps)
        gone = total - sum(int(pruning.alive[group.name].sum()) for group in chosen)
        waiting = 0 if pruning.steps >= max(pruning.changes[i]) else max(_at_once(pruning, i, one) for one in chosen)
        least = round((pruning.pruners[i].sparsity or 0.0) * fraction * total)
        if gone < least - waiting or (gone and not fraction):
            raise CheckpointError(f"{gone} of {total} units are zero, and the schedule has masked {least}")


def _check_target(pruning: Pruning, macs: float) -> None:
    last = max(_last_change(pruning, i, pruning.steps) for i in pruning.chosen)
    goal = 1 - (1 - macs) * (pruning.schedule.fraction(last, pruning.total_steps) if last else 0.0)
    shapes = live_shapes(pruning.model)
    costs = [
        unit_cost(one, pruning.groups, shapes) * _at_once(pruning, i, one)
        for i, chosen in pruning.chosen.items()
        for one in chosen
    ]
    waiting = 0 if pruning.finished else max(costs) / pruning.dense_macs
    if pruning.macs_left() > goal + waiting + 1e-9:
        raise CheckpointError(f"{pruning.macs_left():.4f} of the MACs are left, and the schedule was at {goal:.4f}")


def _at_once(pruning: Pruning, i: int, group: Group) -> int:
    """Return how many units of a group leave together."""
    return group.parts * math.lcm(pruning.pruners[i].multiple_of, group.multiple)
