"""Removing whole modules of a list: the layers of a model, and experts that are modules; what the config then says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .architectures.conventions import LAYER_LISTS
from .architectures.layers import configs_of, layer_count
from .errors import PruningError
from .plan import BLOCK
from .skipping import INDICES
from .structure import Group, Kept


def drop_modules(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Take removed modules out of their lists, number those behind them anew, and tell the config of layers."""
    lists = sorted((group for group in groups if group.modules), key=lambda group: -group.modules[0].count("."))
    for group in lists:  # inner lists first: their paths hold the numbers of the outer one
        stays = live_kept.get(group.name)
        if stays is None or len(stays) == group.units:
            continue
        parent = group.modules[0].rpartition(".")[0]
        modules: Any = model.get_submodule(parent)
        if group.kind == "layer":
            for config in configs_of(model, parent):
                _tell(config, group, stays)
        for unit in reversed(range(group.units)):
            if unit not in stays:
                del modules[unit]
        for number, module in enumerate(modules if group.kind == "layer" else ()):
            _renumber(module, stays[number], number)


def check_depth(model: nn.Module, groups: Sequence[Group], live_kept: Kept) -> None:
    """Check that a stock class builds from the small config the very layers that stay.

    What a layer is may follow from its number (T5's relative bias, ModernBERT's local attention): then a model
    without that layer could not be loaded again.

    Raises:
        PruningError: It does not; nothing has been changed.
    """
    for group in groups:
        stays = live_kept.get(group.name, range(group.units))
        if group.kind != "layer" or len(stays) == group.units:
            continue
        reason = _unsayable(model, group, stays)
        if reason:
            raise PruningError(
                f"A config of {type(model).__name__} cannot say that only these of '{group.name}' stay: {reason}. "
                f"Received: {list(stays)}"
            )


def _tell(config: Any, group: Group, stays: Sequence[int]) -> None:
    parts = group.name.split(".")
    stage = int(parts[parts.index("stages") + 1]) if "stages" in parts else None
    name = layer_count(config, parts[0], group.units, stage)
    if name is None:
        return
    if stage is None:
        setattr(config, name, len(stays))
    else:
        setattr(config, name, [len(stays) if i == stage else n for i, n in enumerate(getattr(config, name))])
    for listed in LAYER_LISTS:
        values = getattr(config, listed, None)
        if isinstance(values, (list, tuple)) and len(values) == group.units:
            setattr(config, listed, [values[i] for i in stays])


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    for module in layer.modules():
        for name in INDICES:
            if getattr(module, name, None) == old and not isinstance(getattr(module, name), bool):
                setattr(module, name, new)


def _unsayable(model: nn.Module, group: Group, stays: Sequence[int]) -> str:
    """Say why a stock class built from the small config has other layers than these; empty where it has the same."""
    parent = group.modules[0].rpartition(".")[0]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            root = copy.deepcopy(model.config)
            twin = type(model)(_small_config(model, root, group, stays))
    except Exception as error:  # whatever a class raises, it cannot be built
        return f"its class raises {type(error).__name__}: {error}"
    theirs = twin.get_submodule(parent)
    if len(theirs) != len(stays):  # type: ignore[arg-type]
        return f"its class builds {len(theirs)} of them"  # type: ignore[arg-type]
    for number, unit in enumerate(stays):
        mine, built = model.get_submodule(group.modules[unit]), theirs[number]  # type: ignore[index]
        by_number = (name for name in _NUMBERED for one in mine.modules() if number != unit and getattr(one, name, False))
        different = _difference(mine, built) or next(by_number, "")
        if different:
            return f"layer {unit} would become another one at place {number} ({different})"
    return ""


def _small_config(model: nn.Module, root: Any, group: Group, stays: Sequence[int]) -> Any:
    """Return a copy of the root config with the small depth, without our block."""
    parent = group.modules[0].rpartition(".")[0]
    for config in configs_of(model, parent):
        for mine, theirs in _pairs(model.config, root):
            if mine is config:
                _tell(theirs, group, stays)
    if hasattr(root, BLOCK):
        delattr(root, BLOCK)
    return root


def _pairs(config: Any, twin: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a config and its copy, and so for the configs inside."""
    yield config, twin
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _pairs(value, getattr(twin, name))


_MODES = ("training", "gradient_checkpointing")  # of a run, not of a layer
_NUMBERED = ("scale_attn_by_inverse_layer_idx",)  # switches under which a forward computes with the layer's number


def _difference(mine: nn.Module, built: nn.Module) -> str:
    """Return the first setting or tensor in which two layers differ; widths and numbers of layers do not count."""
    other = dict(built.named_modules())
    for path, module in mine.named_modules():
        if type(module) is not type(other.pop(path, None)):
            return path or type(module).__name__
        for name, value in vars(module).items():
            if (
                isinstance(value, (bool, str, float))
                and not name.startswith("_")
                and name not in _MODES
                and vars(built.get_submodule(path)).get(name) != value
            ):
                return f"{path}.{name}".lstrip(".")
    return next(iter(other), "") or next(iter({*dict(mine.named_parameters())} ^ {*dict(built.named_parameters())}), "")
