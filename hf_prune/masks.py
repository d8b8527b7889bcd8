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
        held = [tensors[name].data, *moments(optimizer, tensors[name])]
        values += held
        keep += [mask] * len(held)
    if values:
        torch._foreach_mul_(values, keep)


def moments(optimizer: Any, parameter: Tensor) -> list[Tensor]:
    """Return the optimizer's state tensors that have the parameter's shape."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return [value for value in state.values() if torch.is_tensor(value) and value.shape == parameter.shape]


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
