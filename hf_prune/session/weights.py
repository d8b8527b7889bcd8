"""Masks of single weights: one decision over all tensors of a pruner, wherever their parts lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..allocation import select_weights
from ..masks import Masks
from ..pruners import WeightPruner
from ..sharding import any_sharded, join, part_of, select_across

_TENSOR_BY_TENSOR = ("global", "uniform")  # allocations that look at one tensor at a time


def mask_weights(
    pruner: WeightPruner,
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, Any],
    fraction: float,
) -> tuple[Masks, int]:
    """Mask the weights that are worth least, over all of a pruner's tensors.

    Args:
        pruner: How many, by which allocation.
        scores: Of each weight, by parameter; under FSDP of the local shards.
        masks: What is masked already, and stays so.
        tensors: The live tensors by name.
        fraction: How much of the pruner's sparsity is due, in [0, 1].

    Returns:
        The new masks, and a number that is the same in every process, where parts lie in several.
    """
    ours = {name: tensors[name] for name in scores}
    scores = {
        name: score.masked_fill(~masks[name], -torch.inf) if name in masks else score for name, score in scores.items()
    }
    total = sum(tensor.numel() for tensor in ours.values())
    keep = total - round((pruner.sparsity or 0.0) * fraction * total)
    if any_sharded(ours.values()):
        chosen, threshold = select_across(_allocate(pruner, scores, ours), ours, keep)
    else:
        values = pruner.allocate()(scores, dict.fromkeys(scores, 1.0))
        chosen, threshold = select_weights(values, keep), 0
    return {name: mask & masks.get(name, mask) for name, mask in chosen.items()}, threshold


def _allocate(pruner: WeightPruner, scores: Mapping[str, Tensor], tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make shards' scores comparable: an allocation sees whole tensors, one at a time where it takes them so."""
    one_by_one = pruner.allocation in _TENSOR_BY_TENSOR
    values: dict[str, Tensor] = {}
    for names in [[name] for name in scores] if one_by_one else [list(scores)]:
        full = {name: join(scores[name], tensors[name]) for name in names}
        made = pruner.allocate()(full, dict.fromkeys(names, 1.0))
        values.update({name: part_of(made[name], tensors[name]) for name in names})
    return values
