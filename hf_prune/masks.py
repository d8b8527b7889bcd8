"""Masks of single weights: parameter name to a boolean tensor, True = keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .errors import PruningError, did_you_mean

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


def adopt_torch_masks(model: nn.Module) -> Masks:
    """Take over what `torch.nn.utils.prune` has masked: the model is plain again, with zeros, and its masks are ours.

    Hand the masks to `Pruning` and what is masked stays so, and counts towards its sparsity.

    Args:
        model: A model of which some tensors are a ``…_orig`` and a ``…_mask``; changed in place. Its parameters are the
            same objects as before, so that an optimizer goes on.

    Returns:
        Parameter name -> boolean mask, True = keep; empty where torch has masked nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
        >>> {name: int(mask.sum()) for name, mask in adopt_torch_masks(model).items()}
        {'0.weight': 8}
    """
    masks: Masks = {}
    for path, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        names = [name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False)]
        for name in [name for name in names if f"{name}_mask" in buffers]:
            masks[f"{path}.{name}" if path else name] = buffers[f"{name}_mask"].bool()
            torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
    return masks


def check_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Masks:
    """Return a copy of masks that fit these tensors, on their devices.

    Raises:
        PruningError: One names no tensor of the model, has another shape, or is not boolean.
    """
    for name, mask in masks.items():
        if name not in tensors:
            hint = did_you_mean(name, list(tensors))
            raise PruningError(f"masks must name parameters of the model.{hint} Received: '{name}'.")
        if mask.dtype != torch.bool or mask.shape != tensors[name].shape:
            raise PruningError(
                f"masks['{name}'] must be boolean, of the parameter's shape {tuple(tensors[name].shape)}. "
                f"Received: {mask.dtype}, {tuple(mask.shape)}."
            )
    return {name: mask.to(tensors[name].device, copy=True) for name, mask in masks.items()}


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
