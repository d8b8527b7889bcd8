"""Masking and removing units: the reference meaning of a plan, and its physical form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .architectures import find_groups, live_shapes
from .masks import moments
from .plan import close_kept, read_record, write_record
from .structure import Group, KeepVectors, Kept, keep_vectors

Model = TypeVar("Model", bound=nn.Module)


def mask_units(model: Model, kept: Kept) -> Model:
    """Zero every entry that removed units own, in place: what a plan means.

    Args:
        model: A model whose groups `find_groups` finds.
        kept: Group name to the units that stay, in the dense model's numbering; other groups keep all.

    Returns:
        The same model, with the same shapes.

    Raises:
        PruningError: An unknown group or unit, or unequal numbers of heads per KV group.

    Example:
        >>> mask_units(model, {"layers.0.attention.heads": [0, 2, 3]})  # doctest: +SKIP
    """
    groups = find_groups(model)
    live = close_kept(groups, read_record(model).to_live(groups, kept))
    zero_removed(named_tensors(model), keep_vectors(groups, live, live_shapes(model)))
    return model


def shrink(model: Model, kept: Kept | None = None, *, optimizer: Any = None) -> Model:
    """Remove units physically, in place; the function stays that of the masked model.

    Parameters keep their identity (new data, other shape), so that an optimizer, a scheduler and hooks go on.

    Args:
        model: A model whose groups `find_groups` finds; it may have been shrunk before.
        kept: Group name to the units that stay, in the dense model's numbering; other groups keep all. ``None``: all
            units that are not masked (not zero in every entry they own) now; the last unit of a group stays anyway.
        optimizer: Its moments are cut along.

    Returns:
        The same model, smaller. ``model.config.pruning_config`` says what was kept.

    Raises:
        PruningError: An unknown group or unit, unequal numbers of heads per KV group, or nothing left of a group.

    Example:
        >>> shrink(model, {"layers.0.mlp.neurons": range(512)})  # doctest: +SKIP
    """
    groups, record = find_groups(model), read_record(model)
    live = unmasked_units(model, groups) if kept is None else record.to_live(groups, kept)
    live = close_kept(groups, live)
    record = record.after(groups, live)
    cut(model, groups, live, optimizer=optimizer)
    write_record(model, record, find_groups(model))
    return model


def cut(model: nn.Module, groups: Sequence[Group], live_kept: Kept, *, optimizer: Any = None) -> None:
    """Drop all entries of removed units and tell the code around them; numbering is the live model's."""
    vectors = keep_vectors(groups, live_kept, live_shapes(model))
    tensors, done = named_tensors(model), set[tuple[int, int]]()
    for (name, dim), vector in vectors.items():
        if (id(tensors[name]), dim) not in done:  # tied parameters are one tensor
            done.add((id(tensors[name]), dim))
            _take(tensors[name], dim, vector, optimizer)
    changed = {name.rpartition(".")[0] for name, _ in vectors}
    for path in changed:
        _sync_linear(model.get_submodule(path))
    for group in find_groups(model) if vectors else ():
        for counter in group.counters:
            count = group.units if counter.of == "units" else group.per_part
            setattr(model.get_submodule(counter.module), counter.attribute, count * counter.per_unit)


def unmasked_units(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the live units that own any entry that is not zero; where parts differ, the fullest part decides."""
    tensors, alive = named_tensors(model), dict[str, torch.Tensor]()
    for group in groups:
        used = torch.zeros(group.units, dtype=torch.bool)
        for part in group.slices:
            tensor = tensors[part.parameter].detach()
            rows = tensor.ne(0).movedim(part.dim, 0).flatten(1).any(1).cpu() if tensor.ndim > 1 else tensor.ne(0).cpu()
            index = part.index(torch.arange(group.units), group.per_part)
            used |= rows[index].view(group.units, part.per_unit).any(1)
        if not used.any():
            used[0] = True
        if group.parts > 1:
            used = _even_parts(used.view(group.parts, -1)).flatten()
        alive[group.name] = used
    return {name: used.nonzero().view(-1).tolist() for name, used in alive.items() if not used.all()}


def zero_removed(tensors: dict[str, torch.Tensor], vectors: KeepVectors, optimizer: Any = None) -> None:
    """Zero removed entries of tensors, and of an optimizer's moments: a zero that keeps its momentum twitches."""
    with torch.no_grad():
        for (name, dim), vector in vectors.items():
            gone = (~vector).nonzero().view(-1).to(tensors[name].device)
            for tensor in (tensors[name], *moments(optimizer, tensors[name])):
                tensor.index_fill_(dim, gone, 0)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _even_parts(used: torch.Tensor) -> torch.Tensor:
    """Give every part that keeps any unit as many as the fullest one, masked units filling up."""
    need = int(used.sum(1).max())
    for row in used:
        spare = (~row).nonzero().view(-1)
        if row.any():
            row[spare[: need - int(row.sum())]] = True
        elif len(used) > 1:
            row[:need] = True  # its KV group is masked as a whole and is removed on its own account
    return used


@torch.no_grad()
def _take(tensor: torch.Tensor, dim: int, vector: torch.Tensor, optimizer: Any) -> None:
    """Keep these entries of a tensor, of its gradient and of the optimizer's moments."""
    index = vector.nonzero().view(-1).to(tensor.device)
    old = tensor.shape
    state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == old:
            state[key] = value.index_select(dim, index)
    gradient, tensor.grad = tensor.grad, None
    tensor.data = tensor.data.index_select(dim, index)
    tensor.grad = None if gradient is None else gradient.index_select(dim, index)


def _sync_linear(module: nn.Module) -> None:
    """Make a Linear's own numbers say its weight's shape."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
