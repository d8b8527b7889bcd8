"""When a stock config can say a small shape, and how: counts that are the same in every layer, and the depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..adapters import mark_changed
from ..architectures import find_groups
from ..architectures.site import setting
from ..errors import PruningError
from ..kinds import KINDS
from ..parts import own_configs, transformers_part
from ..plan import BLOCK, FORMAT, Record, build_twin, encode_units, forget_parts, note, parent_in, read_record
from ..skipping import selected_heads
from ..structure import Group

STOCK = "stock transformers: from_pretrained"
IMPORT = "pip install hf_prune; import hf_prune; then transformers' from_pretrained (stock alone refuses these shapes)"
TOWER_COUNTS = ("encoder", "decoder")  # of an attribute: it counts for that tower alone
BY_DEFAULT = ("n_inner",)  # may be None, for four times the hidden size


def write_record(model: nn.Module, record: Record, *, stock: bool = True) -> None:
    """Write the block into the model's config, and the small shape itself where a stock config can say it.

    Args:
        model: The live model.
        record: What was removed, in dense numbering.
        stock: Whether a stock config may be written.
    """
    if not record:
        return
    model = transformers_part(model)
    own_configs(model)
    config = getattr(model, "config", None)
    kept = {name: encode_units(*units) for name, units in record.items()}
    if not hasattr(config, "model_type"):  # a module of one's own carries the block itself
        note(model, format=FORMAT, library_version=__version__, kept=kept)
        return
    before = read_record(model)
    if before != record:
        mark_changed(model)
    forget_parts(model)
    note(model, kept=kept)  # groups are called by the dense numbers of the layers that are left
    groups = find_groups(model)
    stated = {group.name: {record.dense_units(group), _units_before(group, before, record)} for group in groups}
    dense = config_counts(config, groups, lambda group: record.dense_units(group), stated)
    small = config_counts(config, groups, lambda group: group.units, stated)
    if any(setting(config, name) != value for name, value in dense.items()) and _builds_dense(
        model, dense, groups, record
    ):
        for name, value in dense.items():
            setattr(config, name, value)
    fits = stock and _builds_shapes(model, small)
    for name, value in small.items() if fits else ():
        setattr(config, name, value)
    note(model, format=FORMAT, library_version=__version__, stock=fits, kept=kept, load=STOCK if fits else IMPORT)
    if "standalone" in getattr(config, BLOCK):  # a model that was loaded so, and is saved so again
        note(model, standalone=cut_table(model))


def _units_before(group: Group, before: Record, record: Record) -> int:
    """Return how many units a group had before this cut."""
    if group.name in before:
        return len(before[group.name][0])
    parent = parent_in(before, group)
    if parent:  # all heads of the KV groups that were left
        return record.dense_units(group) * len(before[parent][0]) // before[parent][1]
    return record.dense_units(group)


def config_counts(
    config: Any, groups: Sequence[Group], units: Callable[[Group], int], stated: Mapping[str, set[int]]
) -> dict[str, int]:
    """Return config attributes for kinds whose every group has the same number of units.

    An attribute counts only if it states now what the dense model has, or what the model had before this cut.
    """
    result: dict[str, int] = {}
    there = {group.kind for group in groups}
    for kind, traits in KINDS.items():
        around = KINDS[traits.inside].config_counts if traits.inside in there else ()
        for name in traits.config_counts:
            if name in around:  # of KV groups, not of heads: MiMo's layers have KV heads of two numbers, heads of one
                continue
            tower = name.partition("_")[0]
            mine = [
                group
                for group in groups
                if group.kind == kind and (tower not in TOWER_COUNTS or group.name.startswith(f"{tower}."))
            ]
            counts = {units(group) for group in mine}
            known = {number for group in mine for number in stated[group.name]}
            value = setting(config, name)
            says = value in known if isinstance(value, int) else name in BY_DEFAULT and hasattr(config, name)
            if says and len(counts) == 1:
                result[name] = counts.pop()
    return result


def _builds_shapes(model: nn.Module, changes: Mapping[str, int]) -> bool:
    """Whether the stock class, built from the changed config, has exactly the live model's tensors."""
    try:
        stock = stock_twin(model, changes)
    except Exception:  # a class that refuses the small config cannot say the shape: the block then does
        return False
    mine, theirs = model.state_dict(), stock.state_dict()
    return mine.keys() == theirs.keys() and all(mine[key].shape == theirs[key].shape for key in mine)


def _builds_dense(model: nn.Module, changes: Mapping[str, int], groups: Sequence[Group], record: Record) -> bool:
    """Whether the stock class, built from the changed config, has the dense model's units.

    Of MiMo's layers some have twice the key/value heads that its config states: the number alone does not tell which.
    """
    try:
        built = find_groups(stock_twin(model, changes))
    except Exception:  # a class that refuses these counts does not mean them
        return False
    units = {(group.kind, group.slices[0].parameter): group.units for group in built if group.slices}
    mine = {(group.kind, group.slices[0].parameter): record.dense_units(group) for group in groups if group.slices}
    return all(units.get(key) == number for key, number in mine.items())


def stock_twin(model: Any, changes: Mapping[str, int], device: str = "meta") -> Any:
    """Return what the model's class builds from its config with these changes and without our block."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return build_twin(model, config, device)


def cut_table(model: Any) -> dict[str, Any]:
    """Return what a model that its class builds from the config must be told to be this one; JSON as it stands.

    Returns:
        ``shapes`` of tensors that are smaller, ``lengths`` of lists of modules that are shorter, ``numbers`` of modules
        that count units, by path, and ``arguments``: the heads of which attentions take a share of what all get.

    Raises:
        PruningError: More than that would have to be told.
    """
    twin = stock_twin(model, {})
    tensors = [_tensors(one) for one in (model, twin)]
    strange = sorted(tensors[0].keys() - tensors[1].keys())
    if strange:
        raise PruningError(
            f"A stock {type(model).__name__} must have every tensor of the model. Received: {strange[0]}"
        )
    shapes = {name: list(one.shape) for name, one in tensors[0].items() if one.shape != tensors[1][name].shape}
    live, numbers, lengths, arguments = dict(model.named_modules()), {}, {}, {}
    for path, module in twin.named_modules():
        if path not in live:
            continue
        if isinstance(module, nn.ModuleList) and len(live[path]) < len(module):
            lengths[path] = len(live[path])
        told = _numbers_told(live[path], module)
        numbers.update({path: told} if told else {})
        chosen = selected_heads(live[path])
        arguments.update({path: list(chosen)} if chosen else {})
    return {"shapes": shapes, "lengths": lengths, "numbers": numbers, "arguments": arguments}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _numbers_told(live: Any, dense: Any) -> dict[str, Any]:
    """Return the numbers in which a live module differs from the dense one; those of plain projections follow."""
    if isinstance(live, (nn.Linear, nn.Embedding)) or type(live).__name__ == "Conv1D":
        return {}
    told = _different(vars(live), vars(dense))
    if "num_attention_heads" in told and hasattr(live, "head_dim"):  # transformers 4 counts ViT's in this too
        told.setdefault("all_head_size", told["num_attention_heads"] * live.head_dim)
    mine, theirs = getattr(live, "config", None), getattr(dense, "config", None)
    if mine is not None and theirs is not None:
        told |= {f"config.{name}": value for name, value in _different(vars(mine), vars(theirs)).items()}
    return told


def _different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return whole numbers, and tuples of them, that differ; not zeros: what is emptied runs as wide as it was."""
    told = {}
    for name, value in mine.items():
        numbers = list(value) if isinstance(value, tuple) else [value]
        whole = not name.startswith("_") and all(type(one) is int for one in numbers)
        if whole and value and theirs.get(name) != value:
            told[name] = numbers if isinstance(value, tuple) else value
    return told
