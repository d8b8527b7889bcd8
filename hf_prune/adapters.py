"""LoRA adapters of PEFT: where they lie around projections, and merging them without losing zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import PruningError, UnsupportedModelError
from .structure import Group, Slice

_BASE, _DOWN, _UP = "base_layer", "lora_A", "lora_B"


def bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel; its adapters are still there."""
    inside = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    return inside() if inside is not None else model


def mark_changed(model: nn.Module) -> None:
    """Remember that a model is no longer what its name says: adapters saved for that name would be wrong."""
    for module in (bare(model), *(one for one in model.modules() if hasattr(one, "_hf_peft_config_loaded"))):
        module._hf_prune_changed = True  # type: ignore[assignment]


def is_changed(model: nn.Module) -> bool:
    """Whether pruning has changed a model, or what lies inside adapters, since it was loaded."""
    return getattr(bare(model), "_hf_prune_changed", False)


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return the modules that carry adapters, by path: each has the projection itself as its ``base_layer``."""
    return {path: module for path, module in model.named_modules() if is_adapted(module)}


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is an adapter around a projection."""
    return hasattr(type(module), "adapter_layer_names") and isinstance(getattr(module, _BASE, None), nn.Module)


def through_adapters(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return modules by path as they would be without adapters: projections under their own names."""
    around = [path for path, module in modules.items() if is_adapted(module)]
    inside = tuple(f"{path}." for path in around)
    bases: dict[str, Any] = {path: getattr(modules[path], _BASE) for path in around}
    return {path: bases.get(path, module) for path, module in modules.items() if not path.startswith(inside)}


def adapters_dropped(names: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """Return names of tensors, real to what they would be without adapters on these paths; adapters' own are left out.

    Args:
        names: As in ``named_parameters()``.
        paths: Of modules with adapters.
    """
    result: dict[str, str] = {}
    for name in names:
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if path is None:
            result[name] = name
        elif name.startswith(f"{path}.{_BASE}."):
            result[name] = f"{path}{name.removeprefix(f'{path}.{_BASE}')}"
    return result


def cut_with_adapters(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """Return the groups of a model without adapters as they are with them, in the names of the model's own tensors.

    A unit that a projection computes also owns its row of LoRA's B, one that it reads its column of A.

    Args:
        model: A model with adapters, inside a PeftModel or not.
        groups: With names from the bare model.

    Raises:
        UnsupportedModelError: Adapters other than LoRA's pairs of matrices lie around a projection that is cut.
    """
    base, layers = bare(model), adapted(bare(model))
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    return [_with_adapters(group, layers, prefix) for group in groups]


def _with_adapters(group: Group, layers: dict[str, Any], prefix: str) -> Group:
    at = len(group.slices) - group.outputs
    extra = [one for part in group.slices for one in _of_adapters(part, layers)]
    slices = [replace(_named(part, layers), parameter=prefix + _named(part, layers).parameter) for part in group.slices]
    extra = [replace(one, parameter=prefix + one.parameter) for one in extra]
    return replace(
        group,
        slices=(*slices[:at], *extra, *slices[at:]),  # what outputs read stays last
        counters=tuple(replace(one, module=prefix + one.module) for one in group.counters),
        core=prefix + group.core if group.core else "",
        modules=tuple(prefix + one for one in group.modules),
    )


def _named(part: Slice, layers: dict[str, Any]) -> Slice:
    path, _, name = part.parameter.rpartition(".")
    return replace(part, parameter=f"{path}.{_BASE}.{name}") if path in layers else part


def _of_adapters(part: Slice, layers: dict[str, Any]) -> list[Slice]:
    """Return what a unit owns of the adapters around a projection, next to these entries of its own weight or bias."""
    path, _, name = part.parameter.rpartition(".")
    if path not in layers:
        return []
    _check_lora(path, layers[path])
    out = 1 if type(getattr(layers[path], _BASE)).__name__ == "Conv1D" else 0
    side, dim = (_UP, 0) if part.dim == out or name == "bias" else (_DOWN, 1)
    names = [own for own, _ in getattr(layers[path], side).named_parameters()]
    wanted = "bias" if name == "bias" else "weight"
    return [
        replace(part, parameter=f"{path}.{side}.{own}", dim=dim, adapter=True)
        for own in names
        if own.rpartition(".")[2] == wanted
    ]


def _check_lora(path: str, layer: nn.Module) -> None:
    known = (f"{_BASE}.", f"{_DOWN}.", f"{_UP}.")
    strange = next((name for name, _ in layer.named_parameters() if not name.startswith(known)), None)
    if strange is not None or not hasattr(layer, _DOWN):
        raise UnsupportedModelError(
            "Units can be removed with LoRA's two matrices around a projection, and no other adapter: merge it first "
            f"(merge_and_unload). Received: {type(layer).__name__} at '{path}' with '{strange or 'no lora_A'}'"
        )


def sync_adapter(model: nn.Module, path: str) -> None:
    """Make the module around a projection that was cut say its shape too."""
    parent: Any = model.get_submodule(path.rpartition(".")[0])
    if path.endswith(f".{_BASE}") and is_adapted(parent):
        base: Any = getattr(parent, _BASE)
        for name, own in (("in_features", "nx"), ("out_features", "nf")):
            if hasattr(parent, name):
                setattr(parent, name, getattr(base, name, getattr(base, own, getattr(parent, name))))


def merge_adapters(model: Any) -> Any:
    """Merge LoRA's adapters into the weights, and keep the zeros that pruning has made there.

    PEFT's own ``merge_and_unload()`` adds a dense product of two small matrices to each weight, and a sparse model is
    dense again. Here what adapters would add to weights that are zero is dropped: evaluate the merged model.

    Args:
        model: A PeftModel.

    Returns:
        The transformers model, without adapters; save it with `save_pruned`.

    Raises:
        PruningError: The model is no PeftModel with adapters that can be merged.

    Example:
        >>> model = merge_adapters(trainer.model)  # doctest: +SKIP
        >>> save_pruned(model, "small")  # doctest: +SKIP
    """
    merge: Callable[[], Any] | None = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise PruningError(f"merge_adapters needs a PeftModel with merge_and_unload. Received: {type(model).__name__}")
    zeros = [(layer.base_layer, layer.base_layer.weight.detach() == 0) for layer in adapted(model).values()]
    merged = merge()
    with torch.no_grad():
        for module, zero in zeros:
            module.weight.masked_fill_(zero, 0)
    return merged
