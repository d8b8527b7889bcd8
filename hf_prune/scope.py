"""Which parameters of a model may lose single weights: those of linear, convolutional and recurrent modules."""

from __future__ import annotations

from torch import nn

from .adapters import adapted

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def weights_by_module(model: nn.Module, embeddings: bool) -> dict[str, list[str]]:
    """Return the parameters that may lose weights by the module that holds them; a tied one under its first name."""
    found: dict[str, list[str]] = {}
    seen = set[int]()
    inside = tuple(f"{path}.lora_" for path in adapted(model))
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue  # an adapter, which is merged into a weight
        for name, parameter in module.named_parameters(recurse=False):
            if _is_weight(module, name, embeddings) and id(parameter) not in seen:
                seen.add(id(parameter))
                found.setdefault(path, []).append(f"{path}.{name}" if path else name)
    return found


def _is_weight(module: nn.Module, name: str, embeddings: bool) -> bool:
    if isinstance(module, _RECURRENT):
        return name.startswith("weight_")
    matrix = isinstance(module, _MATRICES) or type(module).__name__ == "Conv1D"  # transformers' transposed Linear
    return name == "weight" and (matrix or (embeddings and isinstance(module, nn.Embedding)))


def default_scope(model: nn.Module, weights: dict[str, list[str]]) -> list[str]:
    """Return the weights inside numbered layers; where there are none, all but those of the last module."""
    lists = tuple(f"{path}." for path, module in model.named_modules() if path and isinstance(module, nn.ModuleList))
    inside = [name for path, names in weights.items() if path.startswith(lists) for name in names]
    return inside or [name for names in list(weights.values())[: max(1, len(weights) - 1)] for name in names]
