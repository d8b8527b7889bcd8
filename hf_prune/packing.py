"""Nested state of plain values and tensors, as a text and tensors by name: what safetensors can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

_TENSOR, _ITEMS, _TUPLE = "__tensor__", "__items__", "__tuple__"  # how JSON says what it cannot


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Part a state into what JSON can say, and its tensors.

    Args:
        state: Mappings (also with keys that are no texts, as optimizers have), lists, tuples, numbers, texts, ``None``
            and tensors, nested as you like.

    Returns:
        The plain state, in which tensors are named, and the tensors by name.

    Raises:
        CheckpointError: It holds something else.

    Example:
        >>> pack({"steps": 3, "moments": {0: torch.zeros(2)}})[0]
        {'steps': 3, 'moments': {'__items__': [[0, {'__tensor__': 'moments/0'}]]}}
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, (), tensors), tensors


def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if torch.is_tensor(value):
        name = "/".join(path)
        while name in tensors:  # of the keys 1 and "1", or "a/b" and "a" with "b"
            name += "'"
        tensors[name] = value.detach().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        items = [(key, _pack(one, (*path, str(key)), tensors)) for key, one in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("__") for key, _ in items)
        return dict(items) if plain else {_ITEMS: [[_pack(key, path, {}), one] for key, one in items]}
    if isinstance(value, (list, tuple)):
        several = [_pack(one, (*path, str(i)), tensors) for i, one in enumerate(value)]
        return {_TUPLE: several} if isinstance(value, tuple) else several
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"A pruning state holds plain values and tensors. Received: {type(value).__name__} at {'/'.join(path)}"
    )


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `pack` has parted.

    Raises:
        CheckpointError: A tensor is missing.
    """
    if isinstance(plain, list):
        return [unpack(one, tensors) for one in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        if plain[_TENSOR] not in tensors:
            raise CheckpointError(f"A pruning state must hold all of its tensors. Received: no {plain[_TENSOR]!r}")
        return tensors[plain[_TENSOR]]
    if _ITEMS in plain:
        return {unpack(key, tensors): unpack(one, tensors) for key, one in plain[_ITEMS]}
    if _TUPLE in plain:
        return tuple(unpack(one, tensors) for one in plain[_TUPLE])
    return {key: unpack(one, tensors) for key, one in plain.items()}
