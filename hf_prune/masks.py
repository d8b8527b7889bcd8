"""Masks of single weights: parameter name to a boolean tensor, True = keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import PruningError

Masks = dict[str, Tensor]


@torch.no_grad()
def apply_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], optimizer: Any = None) -> None:
    """Zero masked weights in place, and their moments where an optimizer is given."""
    values, keep = [], []
    for name, mask in masks.items():
        states = optimizer.state.get(tensors[name], {}).values() if optimizer is not None else ()
        moments = [value for value in states if torch.is_tensor(value) and value.shape == mask.shape]
        values += [tensors[name].data, *moments]
        keep += [mask] * (1 + len(moments))
    if values:
        torch._foreach_mul_(values, keep)


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction that is masked over all masks, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0


def check_ranks_agree(masks: Mapping[str, Tensor]) -> None:
    """Compare a digest of all masks between processes.

    Raises:
        PruningError: Two processes decided differently: names the first tensor that differs.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    mine = {name: hashlib.sha256(mask.cpu().numpy().tobytes()).hexdigest() for name, mask in masks.items()}
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        different = [name for name in mine if theirs.get(name) != mine[name]]
        if different:
            raise PruningError(
                f"Processes must mask the same. '{different[0]}' differs between rank {rank} and this one."
            )
