"""Masking and removing units: the reference meaning of a plan, and its physical form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .adapters import is_adapted, mark_changed, sync_adapter
from .architectures import find_groups
from .dense import note_dense
from .depth import check_depth, drop_modules
from .given import check_given, check_model
from .optimizers import cut_moments, moments_along
from .plan import close_kept, read_record
from .sharding import check_whole, fill, is_sharded, whole
from .skipping import (
    close_router,
    is_skipped,
    leave_unquantized,
    restore,
    select_heads,
    skip_adapter,
    skip_block,
    skip_channels,
    skip_core,
    skip_layer,
    skip_projection,
)
from .stock import write_record
from .structure import (
    Group,
    KeepVectors,
    Kept,
    Shapes,
    Slice,
    gone_entries,
    keep_vectors,
    live_shapes,
    named_tensors,
    units_gone,
    units_left,
)
from .wrappers import follow_shapes

Model = TypeVar("Model", bound=nn.Module)


def mask_units(model: Model, kept: Kept) -> Model:
    """Zero every entry that removed units own, in place: what a plan means.

    A removed layer also hands its input on, and a removed expert is never chosen.

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
    check_given("kept", kept, Mapping, "a mapping from a group's name to the units that stay")
    groups = find_groups(model)
    live = close_kept(groups, read_record(model).to_live(groups, kept))
    zero_removed(named_tensors(model), gone_entries(keep_vectors(groups, live, live_shapes(model))))
    skip_removed(model, groups, live)
    mark_changed(model)
    return model


def shrink(model: Model, kept: Kept | None = None, *, optimizer: Any = None) -> Model:
    """Remove units physically, in place; the function stays that of the masked model.

    Parameters keep their identity (new data, other shape), so that an optimizer, a scheduler and hooks go on.

    Args:
        model: A model whose groups `find_groups` finds; it may have been shrunk before.
        kept: Group name to the units that stay, in the dense model's numbering; other groups keep all. ``None``: all
            units that are not masked (not zero in every entry they own) now.
        optimizer: Its moments are cut along.

    Returns:
        The same model, smaller. ``model.config.pruning_config`` says what was kept.

    Raises:
        PruningError: An unknown group or unit, unequal numbers of heads per KV group, too few units left of a group,
            or layers whose removal the config cannot say; or parameters are sharded by FSDP.

    Example:
        >>> shrink(model, {"layers.0.mlp.neurons": range(512)})  # doctest: +SKIP
    """
    check_model(model)
    if kept is not None:
        check_given("kept", kept, Mapping, "a mapping from a group's name to the units that stay")
    check_whole(model)
    groups, record = find_groups(model), read_record(model)
    live = unmasked_units(model, groups) if kept is None else record.to_live(groups, kept)
    live = close_kept(groups, live)
    check_depth(model, groups, live)
    before, record = record, record.after(groups, live)
    if record:
        note_dense(model, groups, before)
    cut(model, groups, live, optimizer=optimizer)
    write_record(model, record)
    return model


def cut(model: nn.Module, groups: Sequence[Group], live_kept: Kept, *, optimizer: Any = None) -> None:
    """Drop all entries of removed units and tell the code around them; numbering is the live model's."""
    check_whole(model)
    tensors = named_tensors(model)
    vectors = keep_vectors([one for one in groups if not one.modules or one.slices], live_kept, live_shapes(model))
    _cut_tensors(tensors, vectors, optimizer)
    for path in {name.rpartition(".")[0] for name, _ in vectors}:
        _sync(model, path)
    tell_counters(model, groups, live_kept)
    _hand_shares(model, groups, live_kept)
    for group in groups:
        if group.traits.masked_by == "router":  # what was masked is gone now
            restore(model.get_submodule(group.core))
    skip_removed(model, groups, {name: units for name, units in live_kept.items() if not units})
    drop_modules(model, groups, live_kept)
    if optimizer is not None:
        _forget({id(one) for one in tensors.values()} - {id(one) for one in named_tensors(model).values()}, optimizer)
    follow_shapes(model)


def _cut_tensors(tensors: Mapping[str, torch.Tensor], vectors: KeepVectors, optimizer: Any) -> None:
    done = set[tuple[int, int]]()
    for (name, dim), vector in vectors.items():
        if (id(tensors[name]), dim) not in done:  # tied parameters are one tensor
            done.add((id(tensors[name]), dim))
            _take(tensors[name], dim, vector, optimizer)


def _sync(model: nn.Module, path: str) -> None:
    """Make a module whose tensors were cut agree with them, and be left alone where they are empty."""
    module = model.get_submodule(path)
    sync_module(module)
    sync_adapter(model, path)
    if not all(parameter.numel() for parameter in module.parameters(recurse=False)):
        leave_unquantized(module)
        for one in (path, path.rpartition(".")[0]):  # transformers divides by widths where it draws weights
            model.get_submodule(one)._is_hf_initialized = True  # type: ignore[assignment]


def _hand_shares(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Let attentions that have lost heads get those heads' share of what the model computes for all."""
    fewer = [group for group in groups if len(units_left(group, live_kept)) < group.units]
    dropped = {group.arguments for group in fewer if any(where == "none" for _, where in group.arguments)}
    for group in groups:
        if group.arguments and (group in fewer or group.arguments in dropped):  # handed on to those that keep all, too
            units = units_left(group, live_kept)
            select_heads(model.get_submodule(group.core), group.arguments, units, group.units)


def _forget(gone: set[int], optimizer: Any) -> None:
    """Take parameters of removed modules out of an optimizer, as if it had been made for the small model."""
    for group in optimizer.param_groups:
        for parameter in [one for one in group["params"] if id(one) in gone]:
            optimizer.state.pop(parameter, None)
        group["params"] = [one for one in group["params"] if id(one) not in gone]


def tell_counters(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Tell the code around the weights how many units it has now."""
    for group in [one for one in groups if one.name in live_kept]:
        units = live_kept[group.name]
        parts = {unit // group.per_part for unit in units}
        for counter in group.counters:
            count = len(units) if counter.of == "units" else len(units) // max(1, len(parts))
            _set_number(model.get_submodule(counter.module), counter.attribute, count * counter.per_unit)


def _set_number(module: Any, attribute: str, value: int) -> None:
    if attribute.startswith("config."):
        module.config = copy.copy(module.config)
        module, attribute = module.config, attribute.removeprefix("config.")
    setattr(module, attribute, value)


def skip_removed(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Skip what computes nothing any more: removed layers, and blocks of which no unit is left."""
    shapes = live_shapes(model)
    for group in groups:
        if group.name not in live_kept:
            continue
        units, traits = live_kept[group.name], group.traits
        if traits.masked_by == "skip":
            for unit, path in enumerate(group.modules):
                (restore if unit in units else skip_layer)(model.get_submodule(path))
        elif traits.masked_by == "router" and len(units) < group.units:
            _close(model, group, units_gone(group, live_kept))
        elif not units and traits.is_place and not group.outputs:
            skip_block(model.get_submodule(group.core))
        elif not units and group.outputs and (traits.is_place or _is_empty(group.read, shapes)):
            _skip_emptied(model, group, shapes)


def _close(model: nn.Module, group: Group, gone: list[int]) -> None:
    """Let the router never choose removed experts, whatever correction is added before it chooses."""
    tensors = named_tensors(model)
    close_router(model.get_submodule(group.core), gone)
    for part in group.slices:
        tensor = tensors[part.parameter]
        if tensor.numel() == group.units and not part.parameter.startswith(f"{group.core}.bias"):
            with torch.no_grad():
                fill(tensor, -1, torch.tensor(gone, dtype=torch.long), -torch.inf)


def _skip_emptied(model: nn.Module, group: Group, shapes: Shapes) -> None:
    """Skip what computes units of which none are left, and let the output projection return a constant."""
    for part in group.slices[: -group.outputs]:
        if _is_empty([part], shapes):
            skip_channels(model.get_submodule(part.module))
    for part in group.read:
        output = model.get_submodule(part.module)
        skip_projection(output, removed=group.traits.is_place)
        around = model.get_submodule(part.module.rpartition(".")[0])
        if is_adapted(around):
            skip_adapter(around)
        if group.core:
            skip_core(model.get_submodule(group.core), output)


def _is_empty(parts: Sequence[Slice], shapes: Shapes) -> bool:
    return all(0 in shapes[part.parameter] for part in parts)


def unmasked_units(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the live units that own any entry that is not zero; where parts differ, the fullest part decides."""
    tensors, alive = named_tensors(model), dict[str, torch.Tensor]()
    for group in groups:
        if group.traits.masked_by == "skip":
            alive[group.name] = torch.tensor([not is_skipped(model.get_submodule(path)) for path in group.modules])
            continue
        used = torch.zeros(group.units, dtype=torch.bool)
        for part in group.slices if group.units else ():
            tensor = whole(tensors[part.parameter].detach())
            tensor = torch.where(tensor == -torch.inf, 0, tensor)  # of a masked expert
            rows = tensor.ne(0).movedim(part.dim, 0).flatten(1).any(1).cpu() if tensor.ndim > 1 else tensor.ne(0).cpu()
            index = part.index(torch.arange(group.units), group.per_part)
            used |= rows[index].view(group.units, part.per_unit).any(1)
        if group.parts > 1:
            used = _even_parts(used.view(group.parts, -1), -(-group.least // group.parts)).flatten()
        spare = max(0, group.least - int(used.sum()), -int(used.sum()) % group.multiple)
        used[(~used).nonzero().view(-1)[:spare]] = True
        alive[group.name] = used
    return {name: used.nonzero().view(-1).tolist() for name, used in alive.items() if not used.all()}


def zero_removed(
    tensors: Mapping[str, torch.Tensor], gone: Mapping[tuple[str, int], torch.Tensor], optimizer: Any = None
) -> None:
    """Zero removed entries of tensors, and of an optimizer's moments: a zero that keeps its momentum twitches.

    Args:
        tensors: The live tensors by name.
        gone: Tensor name and axis to the numbers of the entries (`structure.gone_entries`).
        optimizer: Whose moments; ``None``: none.
    """
    with torch.no_grad():
        for (name, dim), numbers in gone.items():
            index = numbers if is_sharded(tensors[name]) else numbers.to(tensors[name].device)  # once for all moments
            for tensor, axis in ((tensors[name], dim), *moments_along(optimizer, tensors[name], dim)):
                fill(tensor, axis, index, 0)


def _even_parts(used: torch.Tensor, least: int) -> torch.Tensor:
    """Give every part as many units as the fullest one, and the least that must stay: masked units fill up."""
    need = max(least, int(used.sum(1).max())) if used.numel() else 0
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
    cut_moments(optimizer, tensor, dim, index, _select)
    gradient, tensor.grad = tensor.grad, None
    data = _select(tensor.data, dim, index)
    if (
        tensor.requires_grad
    ):  # a loss that someone still holds keeps autograd's node of the old shape: another type ends it
        tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    tensor.data = data
    tensor.grad = None if gradient is None else _select(gradient, dim, index)


def _select(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Return these entries along an axis; an empty result still owns memory.

    Without memory of their own all empty tensors have the same address, and `save_pretrained` takes them for tied.
    """
    taken = tensor.index_select(dim, index)
    return taken if taken.numel() else tensor.new_zeros(1)[:0].view(taken.shape)


def sync_module(module: nn.Module) -> None:
    """Make a module's own numbers say its tensors' shapes."""
    shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups > 1:  # whole groups leave (of a depthwise convolution: channels)
            module.groups = shape[0] * module.groups // module.out_channels
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        rows, module.input_size = getattr(module, "weight_ih_l0").shape  # noqa: B009 (mypy takes it for a module)
        module.hidden_size = rows // gates
        module.flatten_parameters()
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
    elif type(module).__name__ == "Conv1D":  # transformers' own transposed Linear
        module.nx, module.nf = shape
