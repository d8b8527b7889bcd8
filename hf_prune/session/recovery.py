"""A pruning state that was lost, read from the zeros of a resumed model: where that is exact, and only there."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..errors import CheckpointError
from ..kinds import KINDS
from ..live import Units
from ..masks import entries_left, keep_entries, vectors_by_tensor
from ..removal import unmasked_units
from ..sharding import whole
from ..structure import Group
from .budgets import Budget
from .choosing import at_once
from .pruning import Pruning
from .tasks import Task


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
    strange = {kind for task in pruning.tasks for kind in task.kinds if not KINDS[kind].zeros_tell}
    if strange:
        raise CheckpointError(f"masks of kind {', '.join(sorted(strange))} are more than zeros")
    if any(task.pruner.threshold is not None for task in pruning.tasks):
        raise CheckpointError("zeros do not tell which of them a threshold has masked")
    _check_nothing_lost(pruning, steps)
    fresh = pruning.state_dict()
    units = _units(pruning)
    told = {"alive": dict(units.alive), "weights": _weight_masks(pruning, units, steps), "unchecked": True}
    clock = {**fresh["clock"], "steps": steps, "position": steps}
    pruning.load_state_dict({**fresh, "clock": clock, "masking": {**fresh["masking"], **told}})
    _check_units(pruning)


def _check_nothing_lost(pruning: Pruning, steps: int) -> None:
    if steps >= pruning.last_change:
        return
    until, seen = f"changes are due until step {pruning.last_change}", pruning.settings.data is None
    if seen and any(one.state_dict() for one in pruning.evidence.values() if not one.heavy):
        raise CheckpointError(f"running means of scores are lost, and {until}")
    if pruning.masking.returning or any(one.heavy for one in pruning.evidence.values()):
        raise CheckpointError(f"values of masked weights are lost, and {until}")


def _last_change(task: Task, steps: int) -> int:
    """Return the step at which a task last changed masks; 0: it has not yet."""
    return max((step for step in task.changes if step <= steps), default=0)


def _fraction(task: Task, steps: int) -> float:
    """Return how much of a task's way is gone after so many steps, in [0, 1]."""
    last = _last_change(task, steps)
    return task.fraction(last) if last else 0.0


def _weight_masks(pruning: Pruning, units: Units, steps: int) -> dict[str, Tensor]:
    """Read masks of single weights; in units that are there must be exactly as many zeros as the schedule has made."""
    tensors, masks, stays = pruning.live.tensors, dict[str, Tensor](), vectors_by_tensor(units.vectors)
    for task in (one for one in pruning.tasks.weights if _last_change(one, steps)):
        mine = dict[str, Tensor]()
        zeros, total = 0, entries_left(task.weights, tensors, units.vectors, {})
        for name in task.weights:
            tensor = whole(tensors[name].detach())
            there = keep_entries(tensor, stays.get(name, {}), None)
            zeros += int((there & (tensor == 0)).sum())
            mine[name] = (tensor != 0) | ~there
        expected = round(task.sparsity * _fraction(task, steps) * total)
        if zeros != expected:
            raise CheckpointError(f"{zeros} of {total} weights are zero, and the schedule has masked {expected}")
        masks.update(mine)
    return masks


def _units(pruning: Pruning) -> Units:
    """Read which units are there: those of which any entry that they own is not zero."""
    bare = [replace(group, least=0, multiple=1) for group in pruning.groups if group.traits.zeros_tell]
    return pruning.masking.units.keep(unmasked_units(pruning.model, bare))


def _check_units(pruning: Pruning) -> None:
    """Check that as many units are masked as the schedule has asked for, and none before it began.

    Before its last change a schedule may be behind by less than what leaves at once.
    """
    if pruning.settings.target is not None and pruning.budget is not None:
        _check_target(pruning, pruning.budget, *pruning.settings.target.budget)
    position, live = pruning.clock.position, pruning.live
    for task in pruning.tasks.units:
        chosen = pruning.masking.units.named(task.groups)
        total = sum(live.dense_units[name] for name in task.groups)
        fraction = _fraction(task, position)
        gone = total - sum(int(pruning.alive[group.name].sum()) for group in chosen)
        waiting = 0 if position >= task.last_change else max(_leaving(task, one) for one in chosen)
        least = round(task.sparsity * fraction * total)
        if gone < least - waiting or (gone and not fraction):
            raise CheckpointError(f"{gone} of {total} units are zero, and the schedule has masked {least}")


def _check_target(pruning: Pruning, budget: Budget, name: str, share: float) -> None:
    tasks, units = pruning.tasks.units, pruning.masking.units
    last = max(_last_change(task, pruning.clock.position) for task in tasks)
    goal = 1 - (1 - budget.share(share)) * (tasks[0].fraction(last) if last else 0.0)
    costs = budget.costs(Units.all_of(units.groups, units.shapes), units.groups)
    waits = [costs[one.name] * _leaving(task, one) for task in tasks for one in units.named(task.groups)]
    waiting, left = 0 if pruning.finished else max(waits) / budget.dense, budget.left(units) / budget.dense
    if left > goal * budget.tolerance + waiting + 1e-9:
        told = "MACs" if name == "macs" else name
        raise CheckpointError(f"{left:.4f} of the {told} are left, and the schedule was at {goal:.4f}")


def _leaving(task: Task, group: Group) -> int:
    """Return how many units of a group leave together."""
    return group.parts * at_once(task.pruner, group)
