"""What a stranger's config may ask to be built: as much as its weight files can fill, before any of it is built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from ..architectures.conventions import LAYER_COUNTS
from ..errors import CheckpointError, shown
from ..plan import BLOCK

_SIZE = re.compile(r"size|dim|layers|heads|position|experts|width|depth|length|^(n|num|d|max)_")
_LAYERS = {name for row in LAYER_COUNTS.values() for name in row}
_REMOVED = 1024  # layers that a plan may say were there
# Modules and parameters that any folder may ask for, and for each of its tensors: loading registers some again, and
# one that was pruned hard has few tensors left of many.
_PARTS, _PER_TENSOR = 2**15, 16
_parts: ContextVar[list[int] | None] = ContextVar("modules and parameters that may still be built", default=None)


def check_sizes(config: Mapping[str, Any], tensors: int, room: float) -> None:
    """Check what a config says of sizes, wherever in it.

    Args:
        config: The written config.
        tensors: How many tensors with entries the files hold.
        room: How many parameters a model of these files may have.

    Raises:
        CheckpointError: It has more layers than there are tensors for, or a size that no such model can have.
    """
    layers = max(tensors, _removed_layers(config))
    for kind, name, numbers in _counts(config):
        total = sum(max(number, 0) for number in numbers)
        if name in _LAYERS and total > layers and numbers != [_default(kind, name)]:
            raise CheckpointError(
                f"A model cannot have more layers than tensors, {tensors}. Received: {shown(total)} layers"
            )
        if _SIZE.search(name) and max(numbers, default=0) > room and numbers != [_default(kind, name)]:
            raise CheckpointError(
                f"config.{name:.80} must fit weights of {tensors} tensors. Received: {shown(max(numbers))}"
            )


def _removed_layers(config: Mapping[str, Any]) -> int:
    """Return how many layers the dense model had, as the plan says: those that left have no tensors."""
    block = config.get(BLOCK)
    kept = block.get("kept") if isinstance(block, dict) else None
    texts = [text for name, text in kept.items() if name.endswith("layers")] if isinstance(kept, dict) else []
    ends = [re.search(r"of (\d{1,4})$", text) for text in texts if isinstance(text, str)]
    return min(sum(int(end[1]) for end in ends if end), _REMOVED)


def _default(kind: str, name: str) -> Any:
    """Return what transformers' own config of a model type says where nothing is said: some numbers are no sizes."""
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    made = CONFIG_MAPPING[kind]
    told = inspect.signature(made.__init__).parameters.get(name)  # transformers 5 has class attributes, too
    return getattr(made, name, None) if told is None else told.default


def _counts(value: Any, name: str = "", kind: str = "") -> Iterator[tuple[str, str, list[int]]]:
    """Yield model type and key of each number of a config, and its whole numbers, those of lists in lists together."""
    if isinstance(value, Mapping):
        kind = str(value.get("model_type", kind))
        for key, inner in value.items():
            if key != BLOCK:
                yield from _counts(inner, str(key), kind)
    elif isinstance(value, (list, tuple)):
        yield kind, name, list(_numbers(value))
        for inner in value:
            if isinstance(inner, (Mapping, list, tuple)):
                yield from _counts(inner, "" if isinstance(inner, (list, tuple)) else name, kind)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield kind, name, [value]


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


@contextmanager
def bounded_parts(tensors: int) -> Iterator[None]:
    """Stop a constructor that makes more modules and parameters than files of so many tensors can be for.

    A config has many keys that multiply modules, and code of its own may have others: what counts is what is built.
    """
    token = _parts.set([_PARTS + _PER_TENSOR * tensors])
    hooks = [
        nn.modules.module.register_module_module_registration_hook(_count),
        nn.modules.module.register_module_parameter_registration_hook(_count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _parts.reset(token)


def _count(*_: Any) -> None:
    left = _parts.get()  # another thread's models are not ours to count
    if left is None:
        return
    left[0] -= 1
    if left[0] < 0:
        raise CheckpointError(
            "config.json must describe a model that the weight files can fill. Received: one of far more modules"
        )
