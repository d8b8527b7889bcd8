"""What a module's own forward takes and returns: read off its signature and its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_INPUTS = ("hidden_states", "hidden_state", "query_states", "query", "x", "input", "embeddings")
INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")  # what modules call their layer's number


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by the names of the forward's parameters."""
    return {**dict(zip(names, args)), **kwargs}


def hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among a forward's arguments."""
    named = [kwargs[name] for name in _INPUTS if torch.is_tensor(kwargs.get(name))]
    positional = [value for value in args if torch.is_tensor(value)]
    others = [value for value in kwargs.values() if torch.is_tensor(value)]
    found: Tensor = (positional + named + others)[0]
    return found


def number_name(module: nn.Module) -> str | None:
    """Return what a module calls its layer's number; the number itself changes when other layers leave."""
    return next((name for name in INDICES if isinstance(getattr(module, name, None), int)), None)


def read_forward(module: nn.Module) -> tuple[tuple[str, ...], tuple[type, tuple[str, ...]] | None]:
    """Return the names of what a module's own forward takes, and of what it returns."""
    forward = type(module).forward
    return parameter_names(forward), _returned_names(inspect.unwrap(forward))


def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a method takes beside its object."""
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
