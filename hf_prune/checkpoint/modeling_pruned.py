"""A pruned model, for `trust_remote_code=True` where hf_prune is not installed; `import hf_prune` needs no such file.

The stock class of transformers is built dense, as ever, and then cut to the shapes that the weights beside this file
have: ``pruning_config["standalone"]`` in config.json states them. Nothing is downloaded, opened or run from here, and
no weight is computed: which units stay was decided before, and the files hold them.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch

RENAMED = (  # what transformers 4 and 5 call the same module of ViT and its kin
    (".attention.attention.query", ".attention.q_proj"),
    (".attention.attention.key", ".attention.k_proj"),
    (".attention.attention.value", ".attention.v_proj"),
    (".attention.output.dense", ".attention.o_proj"),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),
    ("encoder.layer.", "layers."),
)


class Pruned:
    """What a class inherits from, before the stock class, to be cut as soon as it is built."""

    _hf_prune_cut = True  # hf_prune, where it is there after all, must not cut it again

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the dense model, and cut it."""
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        table = (getattr(config, "pruning_config", None) or {}).get("standalone")
        if table:
            cut(self, table)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no, so that transformers 5 renames the tensors of files as it does for the stock class."""
        return False


def cut(model: Any, table: dict[str, Any]) -> None:
    """Give a dense model the shapes and numbers that a table states.

    Args:
        model: The model; its weights are drawn at random, or not there yet.
        table: ``shapes`` of tensors, ``lengths`` of lists of modules, ``numbers`` that modules compute with, and
            ``arguments``: of what the model computes for all heads of an attention, the share of those that stay.
    """
    modules = dict(model.named_modules())
    find = functools.partial(_find, modules, f"{model.base_model_prefix}.")
    for path, length in table["lengths"].items():
        del find(path)[length:]
    for name, shape in table["shapes"].items():
        path, _, kind = name.rpartition(".")
        _cut_tensor(find(path, kind), kind, shape)
    for path, numbers in table["numbers"].items():
        module = find(path, *(name.split(".")[0] for name in numbers))
        for name, value in numbers.items():
            _set_number(module, name, value)
    for path, (names, heads, total) in table["arguments"].items():
        module = find(path)
        parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]  # read here, so that it compiles
        module.forward = functools.partial(_with_heads, module, parameters, names, heads, total)


def _find(modules: dict[str, Any], prefix: str, path: str, *has: str) -> Any:
    """Return a module that has one of these attributes, whatever this version of transformers calls it."""
    older, newer = path, path
    for old, new in RENAMED:
        older, newer = older.replace(new, old), newer.replace(old, new)
    for name in (path, older, newer, f"{older}.attention", newer.removesuffix(".attention")):
        for one in (name, prefix + name, name.removeprefix(prefix)):
            if one in modules and (not has or any(hasattr(modules[one], attribute) for attribute in has)):
                return modules[one]
    raise ValueError(
        f"Another version of transformers wrote this folder, and this one has no module '{path}'. With hf_prune "
        "installed, `import hf_prune` loads it."
    )


def _cut_tensor(module: Any, kind: str, shape: list[int]) -> None:
    """Cut a tensor; a module that has lost all its weights then returns zeros, or its bias."""
    tensor = getattr(module, kind)
    transposed = type(module).__name__ in ("Conv1D", "Embedding")
    width = tensor.shape[-1 if transposed else 0]
    data = tensor.data[tuple(slice(length) for length in shape)].clone()
    # with memory of its own, or saving would take all empty tensors for one
    tensor.data = data if data.numel() else tensor.data.new_zeros(1)[:0].view(shape)
    if kind == "weight" and not data.numel():
        module._is_hf_initialized = True  # there is nothing to draw at random
        module.qconfig = None  # nor to quantize: torch's kernels refuse to
        if not isinstance(module.__dict__.get("forward"), functools.partial):
            module.forward = functools.partial(_run_emptied, module, width)
    for names in (("out_features", "in_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")):
        if kind == "weight" and all(hasattr(module, name) for name in names):
            vars(module).update(zip(names, shape))


def _set_number(module: Any, name: str, value: int) -> None:
    if name.startswith("config.") and hasattr(module, "config"):
        module.config = copy.copy(module.config)
        setattr(module.config, name.removeprefix("config."), value)
    elif hasattr(module, name):
        setattr(module, name, value)


def _run_emptied(module: Any, width: int, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    """Return what a module of zeros would: a norm hands zeros on, a projection of nothing leaves its bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if weight.ndim == 1:
        return hidden
    looks_up = not hidden.is_floating_point()  # an embedding
    constant = (weight if looks_up else hidden).new_zeros(width)
    if bias is not None and bias.numel():
        constant = constant + bias
    return constant.expand(*(hidden.shape if looks_up else hidden.shape[:-1]), width).contiguous()


def _with_heads(module: Any, parameters: Any, names: Any, heads: Any, total: int, *args: Any, **kwargs: Any) -> Any:
    """Run an attention with those heads' share of its arguments; where heads lie is an axis, rows or nowhere."""
    given = {**dict(zip(parameters, args)), **kwargs}
    for name, where in names.items():
        value = given.get(name)
        if torch.is_tensor(value) and where == "none":
            given[name] = None  # it makes its own
        elif torch.is_tensor(value):
            index, rows = torch.tensor(heads, device=value.device), where == "batch"
            value = value.view(-1, total, *value.shape[1:]) if rows else value
            axis = 1 if rows else int(where)
            chosen = value.index_select(axis, index) if value.shape[axis] == total else value
            given[name] = chosen.flatten(0, 1) if rows else chosen
    return type(module).forward(module, **given)
