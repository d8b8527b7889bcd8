"""The numbers that a log shows: how sparse a model is by now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..masks import count_masked, entries_left
from ..structure import Group, named_tensors

if TYPE_CHECKING:
    from .pruning import Pruning

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Zeros:
    """What was counted over all shards when masks last changed: a log, perhaps of one process, must not wait.

    Args:
        sparsity: Share of zeros in all matrices that units are cut from or that single weights leave.
        sparsity_weight: Share of masked weights where there are masks.
    """

    sparsity: float
    sparsity_weight: float


def count_zeros(pruning: Pruning) -> Zeros:
    """Count what is masked or gone now; under FSDP all processes call it."""
    tensors, in_scope = named_tensors(pruning.model), {name for names in pruning.weights.values() for name in names}
    owned = {part.parameter for group in pruning.groups for part in group.slices if not part.adapter}
    matrices = {name for name in owned if tensors[name].ndim > 1}
    beside = (in_scope | set(pruning.masks)) - matrices
    total = (pruning.dense_macs if pruning.groups else 0) + sum(tensors[name].numel() for name in beside)
    vectors = pruning._vectors() if pruning.groups else {}
    left = entries_left(matrices | beside, tensors, vectors, pruning.masks)
    masked, prunable = count_masked(tensors, pruning.masks)
    return Zeros(round(1 - left / total, 6), round(masked / prunable, 6) if prunable else 0.0)


def bytes_of(pruning: Pruning) -> int:
    """Return the memory in bytes that reversible masks, and scores that follow single weights, take in this process."""
    return pruning.shadows.nbytes(pruning.masks) + sum(one.nbytes for one in pruning.scorer.movement.values())


def numbers_of(pruning: Pruning) -> dict[str, float]:
    """Return what a log should show: sparsity in all and by kind, and the share of MACs left."""
    result = {"sparsity": pruning.zeros.sparsity}
    kinds = dict.fromkeys(kind for by_kind in pruning.counted.values() for kind in by_kind)
    for kind in kinds:
        names = [name for by_kind in pruning.counted.values() for name in by_kind.get(kind, ())]
        left = sum(int(pruning.alive[name].sum()) for name in names if name in pruning.alive)
        result[f"sparsity_{kind}"] = round(1 - left / sum(pruning.dense_units[name] for name in names), 6)
    if pruning.weights or pruning.masks:
        result["sparsity_weight"] = pruning.zeros.sparsity_weight
    if pruning.follows_weights or pruning.most_bytes:
        result["reversible_mb"] = round(max(pruning.most_bytes, bytes_of(pruning)) / 1e6, 3)
    if pruning.groups:
        result["macs_left"] = round(pruning.macs_left(), 6)
    return result


def warn_of_missed(pruning: Pruning) -> None:
    """Say where a target or a sparsity was not reached, and where there was nothing left to do for it."""
    untouched = pruning.record == pruning.before and all(bool(alive.all()) for alive in pruning.alive.values())
    if pruning.before and pruning.chosen and untouched:
        logger.warning(
            f"No unit was removed: a sparsity or a target is a share of the dense model, of whose MACs "
            f"{pruning.macs_left():.1%} were left before."
        )
    why = "min_kept, multiple_of, include, exclude and what a model needs at least let no more units go."
    if pruning.target is not None:
        if pruning.macs_left() > pruning.target.macs:
            logger.warning(
                f"target.macs={pruning.target.macs:g} was not reached, {pruning.macs_left():.3f} is left: {why}"
            )
        return
    for i, by_kind in pruning.counted.items():
        pruner, names = pruning.pruners[int(i)], [name for names in by_kind.values() for name in names]
        total = sum(pruning.dense_units[name] for name in names)
        gone = total - sum(int(pruning.alive[name].sum()) for name in names if name in pruning.alive)
        if gone < round((pruner.sparsity or 0.0) * total):
            logger.warning(
                f"sparsity={pruner.sparsity:g} of {type(pruner).__name__} was not reached, {gone} of {total} units of "
                f"kind {' or '.join(by_kind)} are gone: {why}"
            )


def by_kind(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return names of groups by their kind."""
    return {kind: [g.name for g in groups if g.kind == kind] for kind in dict.fromkeys(group.kind for group in groups)}
