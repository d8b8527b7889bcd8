"""Masks of single weights: parameter name to a boolean tensor, True = keep; under FSDP for the local shard."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .errors import PruningError, did_you_mean
from .given import check_model
from .optimizers import moments
from .sharding import bounds, is_sharded, join, local, own_entries, part_of, total_of
from .structure import KeepVectors

Masks = dict[str, Tensor]


@torch.no_grad()
def apply_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], optimizer: Any = None) -> None:
    """Zero masked weights in place, and their moments where an optimizer is given."""
    values, keep = [], []
    for name, mask in masks.items():
        held = [tensors[name].detach(), *moments(optimizer, tensors[name])]
        values += [local(one) for one in held]
        keep += [mask] * len(held)
    if values:
        torch._foreach_mul_(values, keep)


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
    check_model(model)
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
    return local_masks(tensors, masks)


def local_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Masks:
    """Return copies of whole masks as every process keeps them: on the tensors' devices, of its own shards."""
    return {name: part_of(mask, tensors[name]).to(tensors[name].device, copy=True) for name, mask in masks.items()}


def whole_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Masks:
    """Return masks of whole tensors; under FSDP a call that all processes must make, and on the CPU."""
    return {
        name: join(mask, tensors[name]).cpu() if is_sharded(tensors[name]) else mask for name, mask in masks.items()
    }


def count_masked(tensors: Mapping[str, Tensor], vectors: KeepVectors, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many weights are masked, and how many have a mask, over all shards; those of removed units are out."""
    total = entries_left(masks, tensors, vectors, {})
    return total - entries_left(masks, tensors, vectors, masks), total


def entries_left(
    names: Iterable[str], tensors: Mapping[str, Tensor], vectors: KeepVectors, masks: Mapping[str, Tensor]
) -> int:
    """Count the entries of these tensors that are neither masked nor of removed units, over all shards."""
    by_tensor = vectors_by_tensor(vectors)
    left, in_shards = 0, dict[str, int]()
    for name in names:
        tensor, stays = tensors[name], by_tensor.get(name, {})
        if name not in masks:
            left += math.prod(int(stays[dim].sum()) if dim in stays else n for dim, n in enumerate(tensor.shape))
            continue
        in_shards[name] = int(keep_entries(tensor, stays, masks[name]).sum())
    whole_ones = [name for name in in_shards if bounds(tensors[name]) is None]
    left += sum(in_shards.pop(name) for name in whole_ones)
    return left + (total_of(sum(in_shards.values()), tensors[min(in_shards)]) if in_shards else 0)


def vectors_by_tensor(vectors: KeepVectors) -> dict[str, dict[int, Tensor]]:
    """Return tensor name -> axis -> which entries of that axis stay."""
    found: dict[str, dict[int, Tensor]] = {}
    for (name, dim), vector in vectors.items():
        found.setdefault(name, {})[dim] = vector
    return found


def keep_entries(tensor: Any, stays: Mapping[int, Tensor], mask: Tensor | None) -> Tensor:
    """Return which entries of a tensor are neither masked nor of removed units: of the part that lies here.

    Where no unit is removed, this is the mask itself and no copy.
    """
    if mask is not None and not stays:
        return mask
    keep = torch.ones_like(local(tensor), dtype=torch.bool) if mask is None else mask.clone()
    for dim, vector in stays.items():
        keep.index_fill_(dim, own_entries(tensor, dim, (~vector).nonzero().view(-1)), False)
    return keep


def check_ranks_agree(
    masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None, facts: Mapping[str, int] | None = None
) -> None:
    """Compare one digest of all masks between processes; where it differs, one for each mask.

    Shards are compared between processes that hold the same part.

    Args:
        masks: What this process masks.
        tensors: Tells which masks are of shards.
        facts: Other numbers that must be the same everywhere: thresholds of weights that are nowhere whole.

    Raises:
        PruningError: Two processes decided differently: names the first tensor that differs. It is raised in all.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    shards = {name: bounds(tensors[name]) for name in masks if tensors and name in tensors}
    mine = {(name, shards.get(name)): digest(mask) for name, mask in masks.items()}
    mine |= {(name, None): fact for name, fact in (facts or {}).items()}
    if not any(shards.values()) and len(set(_gather(hashlib.sha256(repr(mine).encode()).hexdigest()))) == 1:
        return
    found = _first_difference(_gather(mine))
    if found is not None:
        name, one, other = found
        raise PruningError(
            f"Processes must mask the same. Received: '{name}' differs between rank {one} and rank {other}"
        )


def digest(mask: Tensor) -> int:
    """Return a checksum of a mask, computed where the mask is: each eight entries times a number of their place."""
    entries = mask.detach().flatten().to(torch.uint8)
    blocks = torch.nn.functional.pad(entries, (0, -len(entries) % 8)).view(torch.int64)
    places = torch.arange(1, len(blocks) + 1, device=blocks.device) * -7046029254386353131  # 2**64 / golden ratio
    return int((blocks * ((places ^ (places >> 29)) | 1)).sum())


def _gather(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def _first_difference(everyone: list[dict[Any, int]]) -> tuple[str, int, int] | None:
    """Return the first name whose digests differ, and two ranks that differ; every process finds the same."""
    first: dict[Any, tuple[int, int]] = {}
    names = [dict.fromkeys(name for name, _ in theirs) for theirs in everyone]
    for rank, theirs in enumerate(everyone):
        for name in names[0] | names[rank]:
            if (name in names[0]) != (name in names[rank]):
                return name, 0, rank
        for key, value in theirs.items():
            known, where = first.setdefault(key, (value, rank))
            if known != value:
                return key[0], where, rank
    return None
