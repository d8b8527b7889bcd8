"""What runs where nothing is left: a layer hands its input on, a branch adds a constant, and caches stay in step.

A forward that is skipped is an attribute of the module itself, set from the shapes after every cut; no tensor and no
name of the model changes. What is put there is an object with fields: all that must be read off signatures and source
text is read when it is put there, so that compilers can trace it, and copies of a model run the copy's modules.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    counted = {getattr(one, name): (one, name) for one in layer.modules() for name in [_number_name(one)] if name}
    _replace(layer, _HandOn(layer, *_read_forward(layer), tuple(counted.values())))  # self- and cross-attention: once


def skip_core(core: nn.Module, output: nn.Module) -> None:
    """Skip the module that computes units of which none are left.

    Args:
        core: For example an attention; it is skipped whole.
        output: Its output projection, inside the core or after it.
    """
    inside = output if any(module is output for module in core.modules()) else None
    _replace(core, _Nothing(core, *_read_forward(core), inside, _number_name(core)))


def skip_projection(output: nn.Module, *, removed: bool = False) -> None:
    """Make an output projection that reads nothing return its bias; of a removed branch zero, masked or cut."""
    axis = 1 if type(output).__name__ == "Conv1D" else 0  # transformers' transposed Linear
    _replace(output, (_ProjectZero if removed else _ProjectNothing)(output, axis))


def skip_adapter(layer: nn.Module) -> None:
    """Let a projection that reads nothing answer alone: an adapter around it would still want to read."""
    _replace(layer, _BaseAlone(layer))


def skip_channels(module: nn.Module) -> None:
    """Make a convolution, a batch norm or a position bias of which nothing is left run: torch's kernels refuse to."""
    if isinstance(module, (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm)):
        _replace(module, _NoChannels(module))
    elif type(module).__name__.endswith("RelativePositionBias"):  # BEiT interpolates it before its attention runs
        _replace(module, _NoBias(module))


def skip_block(core: nn.Module) -> None:
    """Skip a module that hands its result on itself and of which nothing is left: it returns zeros."""
    _replace(core, _Zeros(core, *_read_forward(core)))


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
    if isinstance(before, _Selected):
        units, total = [before.units[unit] for unit in units], before.total
    _replace(core, _Selected(core, _parameters(type(core).forward), tuple(arguments), tuple(units), total))


def selected_heads(core: nn.Module) -> tuple[dict[str, str], list[int], int] | None:
    """Return what `select_heads` was told of an attention: arguments, kept heads in dense numbers, dense heads."""
    forward = core.__dict__.get("forward")
    if not isinstance(forward, _Selected):
        return None
    return dict(forward.arguments), list(forward.units), forward.total


def close_router(router: nn.Module, experts: Sequence[int]) -> None:
    """Make a router never choose these experts: their logits are minus infinity."""
    _replace(router, _Closed(router, tuple(experts)))


def is_skipped(module: nn.Module) -> bool:
    """Whether the module's forward was replaced by one of this file's."""
    return isinstance(module.__dict__.get("forward"), _Replacement)


def is_only_masked(module: nn.Module) -> bool:
    """Whether the module is a masked layer, or the router of masked experts: after a cut there are none."""
    return isinstance(module.__dict__.get("forward"), (_HandOn, _Closed))


def restore(module: nn.Module) -> None:
    """Give a skipped module its own forward back."""
    if is_skipped(module):
        del module.forward
        module.__dict__.pop("qconfig", None)


def leave_unquantized(module: nn.Module) -> None:
    """Make `torch.ao.quantization` leave a module alone: its kernels refuse what is empty, or run what is skipped."""
    module.qconfig = None  # type: ignore[assignment]


def _replace(module: nn.Module, forward: _Replacement) -> None:
    module.forward = forward
    if isinstance(module, nn.Linear):
        leave_unquantized(module)


@dataclass(eq=False, repr=False)
class _Replacement(ABC):
    """What a module runs in place of its class's forward."""

    module: nn.Module

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(eq=False, repr=False)
class _Packing(_Replacement):
    """One that returns a value the way the module's own forward does.

    Args:
        module: The module.
        names: Of its forward's parameters.
        returned: What its forward returns: a tuple's (a list's) names; ``None``: a bare value.
    """

    names: tuple[str, ...]
    returned: tuple[type, tuple[str, ...]] | None

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args)), **kwargs}

    def packed(self, value: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return a value bare, or as a tuple whose other entries are unknown.

        An entry that the forward was itself given (T5's position bias, on its way to the next layer) is handed on.
        """
        if self.returned is None:
            return value
        kind, names = self.returned
        given = self.arguments(args, kwargs)
        unknown: dict[str, Any] = {"router_tuple": (value.new_zeros(1),)}  # of Switch without experts
        biases = [name for name in names[1:] if name.endswith("position_bias")]  # T5's, which it may call anything
        theirs = [name for name in given if name.endswith("position_bias")]
        unknown.update({name: given[their] for name, their in zip(biases, theirs)})
        values = [value, *(given.get(name, unknown.get(name)) for name in names[1:])]
        return values if kind is list else tuple(values)

    def keep_cache(self, module: nn.Module, number: str, given: Mapping[str, Any], hidden: Tensor) -> None:
        """Tell a cache how long the sequence is: models read it off their first layer."""
        found = [given[name] for name in _CACHES if given.get(name) is not None]
        if not found or given.get("key_value_states") is not None:
            return
        cache = getattr(found[0], "self_attention_cache", found[0])
        if not hasattr(cache, "update"):
            return
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)  # without entries its length would be 0
        try:
            cache.update(nothing, nothing, getattr(module, number))
        except (AttributeError, NotImplementedError):  # a state of another sort, which has no length
            return


@dataclass(eq=False, repr=False)
class _HandOn(_Packing):
    counted: tuple[tuple[nn.Module, str], ...]  # modules that know their layer's number, and what they call it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _reaching(self.module, _input(args, kwargs))
        given = self.arguments(args, kwargs)
        for module, number in self.counted:
            self.keep_cache(module, number, given, hidden)
        return self.packed(hidden, args, kwargs)


@dataclass(eq=False, repr=False)
class _Nothing(_Packing):
    output: nn.Module | None
    number: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, given = _input(args, kwargs), self.arguments(args, kwargs)
        if self.number is not None and kwargs.get("encoder_hidden_states") is None:
            self.keep_cache(self.module, self.number, given, hidden)
        if self.output is None:
            value = hidden.new_zeros((*hidden.shape[:-1], 0))
        else:
            value = self.output.forward(hidden)
            if given.get("residual") is not None:  # BLOOM's attention adds it itself
                value = value + given["residual"]
        return self.packed(_reaching(self.module, value), args, kwargs)


@dataclass(eq=False, repr=False)
class _ProjectNothing(_Replacement):
    axis: int  # of the weight, along which what comes out lies

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Any = self.module
        width, bias = output.weight.shape[self.axis], getattr(output, "bias", None)
        constant: Tensor = hidden.new_zeros(width) if bias is None or not bias.numel() else bias.to(hidden.dtype)
        if isinstance(output, CONVOLUTIONS):
            sizes = _sizes(output, hidden)
            return constant.view(-1, *[1 for _ in sizes]).expand(len(hidden), width, *sizes).contiguous()
        return constant.expand(*hidden.shape[:-1], width).contiguous()  # what comes after may write into it


class _ProjectZero(_ProjectNothing):
    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _reaching(self.module, torch.zeros_like(super().__call__(hidden).detach()))


class _BaseAlone(_Replacement):
    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.module.base_layer(hidden)  # type: ignore[operator]
        return _reaching(self.module, result)


class _NoChannels(_Replacement):
    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_zeros(len(hidden), 0, *_sizes(self.module, hidden))


class _NoBias(_Replacement):
    def __call__(self, *args: Any, **kwargs: Any) -> float:
        return 0.0


class _Zeros(_Packing):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.packed(torch.zeros_like(_input(args, kwargs)), args, kwargs)


@dataclass(eq=False, repr=False)
class _Selected(_Replacement):
    names: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]
    units: tuple[int, ...]
    total: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args)), **kwargs}
        for name, where in self.arguments:
            if torch.is_tensor(given.get(name)):
                given[name] = None if where == "none" else self.share(given[name], where)
        with _FreeWidths() if RESHAPE in self.arguments else contextlib.nullcontext():
            return type(self.module).forward(self.module, **given)

    def share(self, value: Tensor, where: str) -> Tensor:
        """Return what is of the heads that stay."""
        index = torch.tensor(self.units, dtype=torch.long, device=value.device)
        if where == "batch":
            return value.view(-1, self.total, *value.shape[1:]).index_select(1, index).flatten(0, 1)
        return value.index_select(int(where), index) if value.shape[int(where)] == self.total else value


@dataclass(eq=False, repr=False)
class _Closed(_Replacement):
    experts: tuple[int, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _ClosedLogits(self.experts):
            return type(self.module).forward(self.module, *args, **kwargs)


def _reaching(module: nn.Module, value: Tensor) -> Tensor:
    """Return the value; under DDP, which waits for a gradient of every parameter, each gets one that is zero."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
        value = value + sum(0 * one.flatten()[0] for one in module.parameters() if one.numel() and one.requires_grad)
    return value


def _sizes(module: nn.Module, hidden: Tensor) -> list[int]:
    """Return height and width after a convolution (a norm keeps them)."""
    sizes = list(hidden.shape[2:])
    if not isinstance(module, CONVOLUTIONS) or module.padding == "same":
        return sizes
    pads = [0] * len(sizes) if isinstance(module.padding, str) else module.padding
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(module.dilation, module.kernel_size)]
    return [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(sizes, pads, reach, module.stride)]


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


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among a forward's arguments."""
    named = [kwargs[name] for name in _INPUTS if torch.is_tensor(kwargs.get(name))]
    positional = [value for value in args if torch.is_tensor(value)]
    others = [value for value in kwargs.values() if torch.is_tensor(value)]
    found: Tensor = (positional + named + others)[0]
    return found


def _number_name(module: nn.Module) -> str | None:
    """Return what a module calls its layer's number; the number itself changes when other layers leave."""
    return next((name for name in INDICES if isinstance(getattr(module, name, None), int)), None)


def _read_forward(module: nn.Module) -> tuple[tuple[str, ...], tuple[type, tuple[str, ...]] | None]:
    """Return the names of what a module's own forward takes, and of what it returns."""
    forward = type(module).forward
    return _parameters(forward), _returned_names(inspect.unwrap(forward))


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


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
