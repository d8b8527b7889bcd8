"""What runs where nothing is left: a layer hands its input on, a branch adds a constant, and caches stay in step.

A forward that is skipped is an attribute of the module itself, set from the shapes after every cut; no tensor and no
name of the model changes.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architectures.conventions import RESHAPE

_INPUTS = ("hidden_states", "hidden_state", "query_states", "query", "x", "input", "embeddings")
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")  # what modules call their layer's number


def skip_layer(layer: nn.Module) -> None:
    """Make a layer hand on the hidden states that it gets: what a removed layer means."""
    layer.forward = functools.partial(_hand_on, layer)


def skip_core(core: nn.Module, output: nn.Module) -> None:
    """Skip the module that computes units of which none are left.

    Args:
        core: For example an attention; it is skipped whole.
        output: Its output projection, inside the core or after it.
    """
    inside = output if any(module is output for module in core.modules()) else None
    core.forward = functools.partial(_nothing, core, inside)


def skip_projection(output: nn.Module, *, removed: bool = False) -> None:
    """Make an output projection that reads nothing return its bias; of a removed branch zero, masked or cut."""
    output.forward = functools.partial(_project_zero if removed else _project_nothing, output)


def skip_adapter(layer: nn.Module) -> None:
    """Let a projection that reads nothing answer alone: an adapter around it would still want to read."""
    layer.forward = functools.partial(_base_alone, layer)


def skip_channels(module: nn.Module) -> None:
    """Make a convolution, a batch norm or a position bias of which nothing is left run: torch's kernels refuse to."""
    if isinstance(module, (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm)):
        module.forward = functools.partial(_no_channels, module)  # type: ignore[method-assign]
    elif type(module).__name__.endswith("RelativePositionBias"):  # BEiT interpolates it before its attention runs
        module.forward = functools.partial(_no_bias, module)


def skip_block(core: nn.Module) -> None:
    """Skip a module that hands its result on itself and of which nothing is left: it returns zeros."""
    core.forward = functools.partial(_zeros, core)


def select_heads(core: nn.Module, arguments: Sequence[tuple[str, str]], units: Sequence[int], total: int) -> None:
    """Hand only those heads' share of an argument to an attention that has lost the others.

    Args:
        core: The attention.
        arguments: Names, and where heads lie: ``"0"``, ``"1"`` (an axis), ``"batch"`` (axis 0 holds rows x heads),
            ``"none"`` (the attention makes its own where it is given ``None``), `RESHAPE` (no argument: the forward's
            own code reshapes to the width of the hidden states, and gets the width of the heads that are left).
        units: Heads that stay, in numbers before this cut.
        total: Heads before this cut.
    """
    before = core.__dict__.get("forward")
    if isinstance(before, functools.partial) and before.func is _selected:
        _, _, old, total = before.args
        units = [old[unit] for unit in units]
    core.forward = functools.partial(_selected, core, tuple(arguments), tuple(units), total)


def selected_heads(core: nn.Module) -> tuple[dict[str, str], list[int], int] | None:
    """Return what `select_heads` was told of an attention: arguments, kept heads in dense numbers, dense heads."""
    forward = core.__dict__.get("forward")
    if not isinstance(forward, functools.partial) or forward.func is not _selected:
        return None
    _, arguments, units, total = forward.args
    return dict(arguments), list(units), total


def close_router(router: nn.Module, experts: Sequence[int]) -> None:
    """Make a router never choose these experts: their logits are minus infinity."""
    router.forward = functools.partial(_closed, router, tuple(experts))


def is_skipped(module: nn.Module) -> bool:
    """Whether the module's forward was replaced by one of this file's."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func in _FORWARDS


def is_only_masked(module: nn.Module) -> bool:
    """Whether the module is a masked layer, or the router of masked experts: after a cut there are none."""
    return is_skipped(module) and module.__dict__["forward"].func in (_hand_on, _closed)


def restore(module: nn.Module) -> None:
    """Give a skipped module its own forward back."""
    if is_skipped(module):
        del module.forward


def _hand_on(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    hidden = _input(args, kwargs)
    hidden = _reaching(layer, hidden)
    for module in {_number(module): module for module in layer.modules()}.values():  # self- and cross-attention: once
        _keep_cache(module, args, kwargs, hidden)
    return _packed(layer, hidden, args, kwargs)


def _reaching(module: nn.Module, value: Tensor) -> Tensor:
    """Return the value; under DDP, which waits for a gradient of every parameter, each gets one that is zero."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
        value = value + sum(0 * one.flatten()[0] for one in module.parameters() if one.numel() and one.requires_grad)
    return value


def _nothing(core: nn.Module, output: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
    hidden = _input(args, kwargs)
    if kwargs.get("encoder_hidden_states") is None:
        _keep_cache(core, args, kwargs, hidden)
    value = hidden.new_zeros((*hidden.shape[:-1], 0)) if output is None else output.forward(hidden)
    residual = _arguments(type(core).forward, args, kwargs).get("residual")
    if output is not None and residual is not None:  # BLOOM's attention adds it itself
        value = value + residual
    return _packed(core, _reaching(core, value), args, kwargs)


def _project_zero(output: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    value = _project_nothing(output, hidden, *args, **kwargs).detach()
    return _reaching(output, torch.zeros_like(value))


def _project_nothing(output: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    bias = getattr(output, "bias", None)
    weight: Tensor = output.weight  # type: ignore[assignment]
    width = weight.shape[1] if type(output).__name__ == "Conv1D" else weight.shape[0]  # transformers' transposed Linear
    constant = hidden.new_zeros(width) if bias is None or not bias.numel() else bias.to(hidden.dtype)
    if isinstance(output, CONVOLUTIONS):
        sizes = _sizes(output, hidden)
        return constant.view(-1, *(1 for _ in sizes)).expand(len(hidden), width, *sizes).contiguous()
    return constant.expand(*hidden.shape[:-1], width).contiguous()  # what comes after may write into it


def _base_alone(layer: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    result: Tensor = layer.base_layer(hidden)  # type: ignore[operator]
    return _reaching(layer, result)


def _no_channels(module: nn.Module, hidden: Tensor) -> Tensor:
    return hidden.new_zeros(len(hidden), 0, *_sizes(module, hidden))


def _no_bias(module: nn.Module, *_: Any, **__: Any) -> float:
    return 0.0


def _sizes(module: nn.Module, hidden: Tensor) -> list[int]:
    """Return height and width after a convolution (a norm keeps them)."""
    sizes = list(hidden.shape[2:])
    if not isinstance(module, CONVOLUTIONS) or module.padding == "same":
        return sizes
    pads = [0] * len(sizes) if isinstance(module.padding, str) else module.padding
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(module.dilation, module.kernel_size)]
    return [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(sizes, pads, reach, module.stride)]


def _zeros(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _packed(core, torch.zeros_like(_input(args, kwargs)), args, kwargs)


def _selected(
    core: nn.Module,
    arguments: tuple[tuple[str, str], ...],
    units: tuple[int, ...],
    total: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    given = _arguments(type(core).forward, args, kwargs)
    for name, where in arguments:
        value = given.get(name)
        if not torch.is_tensor(value):
            continue
        index = torch.tensor(units, device=value.device)
        if where == "none":
            given[name] = None
        elif where == "batch":
            given[name] = value.view(-1, total, *value.shape[1:]).index_select(1, index).flatten(0, 1)
        elif value.shape[int(where)] == total:
            given[name] = value.index_select(int(where), index)
    with _FreeWidths() if RESHAPE in arguments else contextlib.nullcontext():
        return type(core).forward(core, **given)


class _FreeWidths(TorchFunctionMode):
    """While an attention runs, the last size in each of its reshapes follows from the others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func in (Tensor.reshape, Tensor.view)
            and len(args) > 2
            and not any(isinstance(size, int) and size == -1 for size in args[1:])
        ):
            args = (*args[:-1], -1)
        return func(*args, **(kwargs or {}))


def _closed(router: nn.Module, experts: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    with _ClosedLogits(experts):
        return type(router).forward(router, *args, **kwargs)


class _ClosedLogits(TorchFunctionMode):
    """While a router runs, its Linear gives minus infinity for closed experts."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        super().__init__()
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return result
        return result.index_fill(-1, torch.tensor(self.experts, device=result.device), -torch.inf)


_FORWARDS = (
    *(_hand_on, _nothing, _project_nothing, _project_zero, _base_alone),
    *(_no_channels, _no_bias, _zeros, _closed, _selected),
)


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among a forward's arguments."""
    named = [kwargs[name] for name in _INPUTS if torch.is_tensor(kwargs.get(name))]
    positional = [value for value in args if torch.is_tensor(value)]
    others = [value for value in kwargs.values() if torch.is_tensor(value)]
    found: Tensor = (positional + named + others)[0]
    return found


def _keep_cache(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], hidden: Tensor) -> None:
    """Tell a cache how long the sequence is: models read it off their first layer."""
    given = _arguments(type(module).forward, args, kwargs)
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    index = _number(module)
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None or index is None or not hasattr(cache, "update") or given.get("key_value_states") is not None:
        return
    nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)  # a cache without entries says its length is 0
    with contextlib.suppress(AttributeError, NotImplementedError):  # a state of another sort, which has no length
        cache.update(nothing, nothing, index)


def _number(module: nn.Module) -> int | None:
    return next((getattr(module, name) for name in INDICES if isinstance(getattr(module, name, None), int)), None)


def _packed(module: nn.Module, value: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return a value the way the module's own forward does: bare, or as a tuple whose other entries are unknown.

    An entry that the forward was itself given (T5's position bias, on its way to the next layer) is handed on.
    """
    returned = _returned_names(inspect.unwrap(type(module).forward))
    if returned is None:
        return value
    kind, names = returned
    given = _arguments(type(module).forward, args, kwargs)
    unknown: dict[str, Any] = {"router_tuple": (value.new_zeros(1),)}  # of Switch without experts
    biases = [name for name in names[1:] if name.endswith("position_bias")]  # T5's, which it may call anything
    theirs = [name for name in given if name.endswith("position_bias")]
    unknown |= {name: given[their] for name, their in zip(biases, theirs)}
    return kind((value, *(given.get(name, unknown.get(name)) for name in names[1:])))


def _arguments(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [*inspect.signature(forward).parameters][1:]
    return {**dict(zip(names, args)), **kwargs}


@functools.cache
def _returned_names(forward: Callable[..., Any]) -> tuple[type, tuple[str, ...]] | None:
    """Read off a forward's source what its last return hands back: a tuple's (a list's) names; ``None``: neither."""
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    last = max((one for one in ast.walk(tree) if isinstance(one, ast.Return) and one.value), key=lambda one: one.lineno)
    return _entries(tree, last.value, last.lineno)


def _entries(tree: Any, value: Any, line: int) -> tuple[type, tuple[str, ...]] | None:
    """Return the names of an expression's entries as of a line; what is behind the known ones are position biases."""
    if isinstance(value, (ast.Tuple, ast.List)):
        names = tuple(node.id if isinstance(node, ast.Name) else "" for node in value.elts)
        return (tuple if isinstance(value, ast.Tuple) else list), names
    if isinstance(value, ast.IfExp):
        return _entries(tree, value.orelse, line)  # `if output_attentions`
    if isinstance(value, ast.Name):
        found = [
            one
            for one in ast.walk(tree)
            if isinstance(one, ast.Assign) and one.lineno < line and ast.unparse(one.targets[0]) == value.id
        ]
        always = [one for one in found if one in tree.body]  # rather than under a condition
        assigned = max(always or found, key=lambda one: one.lineno, default=None)
        return _entries(tree, assigned.value, assigned.lineno) if assigned else None
    if isinstance(value, ast.BinOp):
        left, right = (_entries(tree, side, line) for side in (value.left, value.right))
        if left is None:
            return right and (right[0], ("", *right[1]))
        biases = [one.arg for one in tree.args.args if one.arg.endswith("position_bias")]
        behind = right[1] if right else (*biases, *biases[1:])  # LongT5 has weights between the two
        return left[0], (*left[1], *behind)
    return None
