"""One optimizer step: what is read of it, whether it counts, and which masks are due."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..optimizers import check_state
from ..sharding import any_at
from ..structure import named_tensors
from .reviving import hide_masked

if TYPE_CHECKING:
    from .pruning import Pruning


_DECAY = 0.95  # of the running means of scores: about the last 20 steps that were read
_READ_FIRST, _READ_EVERY = 16, 4  # scores are read from the first steps' batches, and then from one step's of four


def read_next(pruning: Pruning) -> None:
    """Decide whether scores are read from the next step's batches: reading takes time, and means move slowly."""
    if pruning.watcher is not None and pruning.data is None:
        step = pruning.steps + 1
        ahead = [change for i in pruning.chosen for change in pruning.changes[i] if change >= step]
        near = step <= _READ_FIRST or (min(ahead, default=0) - step) % _READ_EVERY == 0
        pruning.watcher.active = bool(ahead) and near


def fade(pruning: Pruning, taken: bool) -> None:
    """Let a step that was read count more than those before it."""
    if taken and pruning.watcher is not None and pruning.watcher.active and pruning.data is None:
        pruning.watcher.fade(_DECAY)


def before_step(pruning: Pruning, scale: float) -> None:
    """Read gradients that are complete, and as many times too large as `scale` says."""
    watched = pruning.watcher is not None and pruning.watcher.gating
    hide_masked(pruning)
    pruning.scorer.scale = scale
    for i, names in pruning.weights.items() if pruning.data is None else ():
        if pruning.steps < max(pruning.changes[i]):
            pruning.scorer.add_movement(pruning._score(i), names)
        if pruning.steps + 1 in pruning.changes[i]:
            pruning.scorer.read_weights(pruning._score(i), names)
    pruning.scorer.scale = 1.0
    if pruning._unchecked and not pruning._leaky and not watched:  # shut gates let no gradient through
        pruning._unchecked, pruning._leaky = False, _gradients_leak(pruning)


def _gradients_leak(pruning: Pruning) -> bool:
    """Whether masked entries get gradients (act(0) is not 0): then masks are held after each step."""
    tensors = named_tensors(pruning.model)
    for (name, dim), vector in pruning._vectors().items() if pruning.groups else ():
        gradient, gone = tensors[name].grad, (~vector).nonzero().view(-1)
        if gradient is not None and any_at(gradient, dim, gone):
            return True
    return False


def count_batches(pruning: Pruning, taken: bool) -> None:
    """Let what was seen of a step's batches count, if the optimizer has taken the step."""
    watch = pruning._watch_steps
    if taken and not pruning._checked:
        check_state(pruning.optimizer)
        pruning._checked = True
    if pruning.watcher is None or pruning.data is not None:
        return
    if taken:
        pruning.watcher.commit(watch.scale, may_overflow=watch.scaled)
    else:
        pruning.watcher.discard()


def due_now(pruning: Pruning, taken: bool) -> list[int]:
    """Return the pruners that change masks now.

    In the last step all that are not done are: steps that were left out must not leave a run denser than asked.
    """
    due = [i for i, steps in pruning.changes.items() if taken and pruning.steps in steps]
    late = [i for i, steps in pruning.changes.items() if max(steps) > pruning.steps]
    blind = not taken and any("gradient" in pruning._score(i).needs for i in late)
    if late and not blind and pruning.skipped and pruning.steps + pruning.skipped >= pruning.total_steps:
        pruning.skipped -= pruning.last_change - pruning.steps
        pruning.steps = pruning.last_change
        due = sorted({*due, *late})
    return due
