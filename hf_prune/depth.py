"""Removing whole modules of a list: the layers of a model, and experts that are modules; what the config then says."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .architectures import find_groups
from .architectures.conventions import (
    EXPERT_COUNTS,
    FEED_FORWARD_WIDTHS,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    HEADS_PER_KV,
    KV_COUNTS,
    LAYER_LISTS,
)
from .architectures.layers import configs_of, layer_count
from .architectures.site import setting
from .errors import PruningError
from .parts import own_configs, transformers_part
from .plan import build_twin
from .sharding import bare_class
from .skipping import INDICES
from .structure import Group, Kept, units_gone, units_left

_WIDTHS = {*HEAD_COUNTS, *HEAD_WIDTHS, *HEADS_PER_KV, *KV_COUNTS, *FEED_FORWARD_WIDTHS, *EXPERT_COUNTS, *INDICES}
_WIDTHS |= {"nf", "nx", "expert_dim"}


def drop_modules(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Take removed modules out of their lists, number those behind them anew, and tell the config of layers."""
    lists = sorted((group for group in groups if group.modules), key=lambda group: -group.holder.count("."))
    for group in lists:  # inner lists first: their paths hold the numbers of the outer one
        gone, stays = units_gone(group, live_kept), units_left(group, live_kept)
        modules: Any = model.get_submodule(group.holder)
        if gone and group.traits.holds_places:
            own_configs(model)
            for config in configs_of(model, group.holder):
                _tell_depth(config, group, stays)
            for number, unit in enumerate(stays):
                _renumber(modules[unit], unit, number)
        for unit in reversed(gone):
            del modules[unit]


def check_depth(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Check that a stock class builds from the small config the very layers that stay.

    What a layer is may follow from its number (T5's relative bias, ModernBERT's local attention): then a model
    without that layer could not be loaded again.

    Raises:
        PruningError: It does not; nothing has been changed.
    """
    part = transformers_part(model)
    if part is not model:
        model, groups = part, find_groups(part)  # called the same there, and at other paths
    inner = {one.holder for one in groups if one.modules and not one.traits.holds_places}
    owned = {part.parameter for one in groups for part in one.slices}
    for group in groups:
        stays = units_left(group, live_kept)
        if not group.traits.holds_places or len(stays) == group.units:
            continue
        reason = _unsayable(model, group, stays, inner, owned)
        if reason:
            raise PruningError(
                f"A config of {bare_class(model).__name__} cannot say that only these of '{group.name}' stay: "
                f"{reason}. Received: {list(stays)}"
            )


def _tell_depth(config: Any, group: Group, stays: Sequence[int]) -> None:
    parts = group.name.split(".")
    stage = int(parts[parts.index("stages") + 1]) if "stages" in parts else None
    name = layer_count(config, parts[0], group.units, stage)
    if name is None:
        return
    if stage is None:
        setattr(config, name, len(stays))
    else:
        setattr(config, name, [len(stays) if i == stage else n for i, n in enumerate(getattr(config, name))])
    if name == "encoder_layers" and "num_hidden_layers" in vars(config):  # stated twice; transformers 5 believes this
        config.num_hidden_layers = len(stays)
    for listed, values in _layer_lists(config, group.units):
        setattr(config, listed, [values[i] for i in stays])
    if setting(config, "attention_types"):  # GPT-Neo's other way to say its attention_layers
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    _tell_backbone(config, group.units, len(stays))


def _tell_backbone(config: Any, before: int, left: int) -> None:
    """Name the stages of a backbone anew, where each layer is one; what it hands out is the last."""
    names = vars(config).get("stage_names")
    if names and len(names) == before + 1:
        config.stage_names = names[: left + 1]
        for name, value in (("_out_features", names[left]), ("_out_indices", left)):
            if vars(config).get(name):
                setattr(config, name, [value])


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    for module in layer.modules():
        for name in INDICES:
            if getattr(module, name, None) == old and not isinstance(getattr(module, name), bool):
                setattr(module, name, new)


def _unsayable(model: nn.Module, group: Group, stays: Sequence[int], inner: set[str], owned: set[str]) -> str:
    """Say why a stock class built from the small config has other layers than these; empty where it has the same.

    How long lists inside of layers are (`inner`, of experts), and how wide what units own (`owned`), does not count:
    the plan says it.
    """
    if not _keeps_attention(model, group, stays):
        return "caches need a layer of each sort"
    try:
        small = _small_config(model, group, stays)
        if hasattr(small, "validate"):  # as saving does on transformers 5
            small.validate()
        twin = build_twin(model, small)
    except Exception as error:  # whatever a class raises, it cannot be built
        return f"its class raises {type(error).__name__}: {error}"
    theirs = twin.get_submodule(group.holder)
    if len(theirs) != len(stays):
        return f"its class builds {len(theirs)} of them"
    around = _changed_around(model, twin, group.holder)
    if around:
        return around
    for number, unit in enumerate(stays):
        mine, built = model.get_submodule(group.modules[unit]), theirs[number]
        by_number = (
            name for name in _NUMBERED for one in mine.modules() if number != unit and getattr(one, name, False)
        )
        lists = tuple(f"{path.removeprefix(f'{group.modules[unit]}.')}." for path in inner)
        free = {name for name, _ in mine.named_parameters() if f"{group.modules[unit]}.{name}" not in owned}
        different = _difference(mine, built, lists) or next(by_number, "") or _other_shape(mine, built, free)
        if different:
            return f"layer {unit} would become another one at place {number} ({different})"
    return ""


def _other_shape(mine: nn.Module, built: nn.Module, names: Collection[str]) -> str:
    """Return which of these parameters has another shape: Fun-ASR's first layer reads wider inputs."""
    theirs = dict(built.named_parameters())
    found = ((name, one) for name, one in mine.named_parameters() if name in names and name in theirs)
    return next((name for name, one in found if one.shape != theirs[name].shape), "")


def _changed_around(model: nn.Module, twin: nn.Module, parent: str) -> str:
    """Say what beside a list of layers follows from their number, and would change with it; empty where nothing does.

    YOLOS has a position embedding for each layer but the last, BridgeTower connects layers of two towers.
    """
    theirs = dict(twin.named_modules())
    for path, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) and path != parent and path in theirs
        if listed and len(theirs[path]) < len(module):
            return f"{path} would be shorter too"
        own = any(part.isdigit() for part in path.split("."))
        tensors = {} if own else {**module._parameters, **module._buffers}  # those of layers say how they were pruned
        for name, tensor in tensors.items():
            built = getattr(theirs.get(path), name, None)
            if tensor is not None and torch.is_tensor(built) and built.shape != tensor.shape:
                return f"{path}.{name} would have another shape"
    return ""


def _keeps_attention(model: nn.Module, group: Group, stays: Sequence[int]) -> bool:
    """Whether a hybrid model keeps a layer with attention and one with a state, where it says which those are."""
    for config in configs_of(model, group.holder):
        for _, kinds in _layer_lists(config, group.units):
            states = {i for i, kind in enumerate(kinds) if any(word in str(kind) for word in ("linear", "mamba"))}
            full = {i for i, kind in enumerate(kinds) if "attention" in str(kind)} - states
            if any(places and not places & {*stays} for places in (states, full)):
                return False
    return True


def _layer_lists(config: Any, units: int) -> list[tuple[str, Sequence[Any]]]:
    """Return what a config states for each layer in turn, by name."""
    names = dict.fromkeys([*LAYER_LISTS, *(name for name in vars(config) if "layer" in name)])
    values = [(name, setting(config, name)) for name in names]
    return [(name, value) for name, value in values if isinstance(value, (list, tuple)) and len(value) == units]


def _is_width(module: nn.Module, name: str) -> bool:
    """Whether a whole number may differ between two layers that are alike: a width, or the layer's own number."""
    return name in _WIDTHS or type(module).__module__.startswith("torch.")


def _small_config(model: nn.Module, group: Group, stays: Sequence[int]) -> Any:
    """Return a copy of the root config with the small depth."""
    root = copy.deepcopy(model.config)
    for config in configs_of(model, group.holder):
        for mine, theirs in _pairs(model.config, root):
            if mine is config:
                _tell_depth(theirs, group, stays)
    return root


def _pairs(config: Any, twin: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a config and its copy, and so for the configs inside."""
    yield config, twin
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _pairs(value, getattr(twin, name))


_MODES = ("training", "gradient_checkpointing")  # of a run, not of a layer
_NUMBERED = ("scale_attn_by_inverse_layer_idx",)  # switches under which a forward computes with the layer's number


def _difference(mine: nn.Module, built: nn.Module, lists: tuple[str, ...]) -> str:
    """Return the first setting or tensor in which two layers differ; widths and numbers of layers do not count."""
    other = {path: module for path, module in built.named_modules() if not path.startswith(lists)}
    for path, module in mine.named_modules():
        if path.startswith(lists):
            continue
        if bare_class(module) is not type(other.pop(path, None)):
            return path or str(bare_class(module).__name__)
        for name, value in vars(module).items():
            says = isinstance(value, (bool, str, float)) or (isinstance(value, int) and not _is_width(module, name))
            other_value = vars(built.get_submodule(path)).get(name)
            if says and not name.startswith("_") and name not in _MODES and other_value != value:
                return f"{path}.{name}".lstrip(".")
    tensors = [{name for name, _ in one.named_parameters() if not name.startswith(lists)} for one in (mine, built)]
    return next(iter(other), "") or next(iter(sorted(tensors[0] ^ tensors[1])), "")
