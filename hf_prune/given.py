"""What a caller gives: of the wrong kind it is an error that says what would have worked, and nothing is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import PruningError, shown


def check_given(name: str, value: Any, kinds: type | tuple[type, ...], would: str) -> None:
    """Check the kind of an argument.

    Args:
        name: Of the argument.
        value: What was given.
        kinds: What it may be.
        would: What that is, in words with an example.

    Raises:
        PruningError: It is of another kind.
    """
    if not isinstance(value, kinds):
        raise PruningError(f"{name} must be {would}. Received: {told(value)}")


def told(value: Any) -> str:
    """Say in short what was given: a class by its name, something plain as it is, anything else by its class."""
    if isinstance(value, type):
        return f"class {value.__name__}"
    plain = value is None or isinstance(value, (str, int, float, list, tuple))
    return shown(value, 60) if plain else type(value).__name__


def check_model(model: Any) -> None:
    """Check that something is a live model, not its name or its class."""
    from torch import nn

    name = f"{model!r:.60}" if isinstance(model, str) else "name"
    check_given("model", model, nn.Module, f"a live model, such as AutoModelForCausalLM.from_pretrained({name})")


def check_data(data: Any) -> None:
    """Check that data could be batches: any iterable, but not one batch, a tensor or a name."""
    from torch import Tensor

    if isinstance(data, Mapping):
        raise PruningError(f"data must be several batches: pass data=[batch]. Received: one with {sorted(data)}")
    if isinstance(data, (Tensor, str, bytes)) or not hasattr(data, "__iter__"):
        raise PruningError(
            f"data must be batches, dicts of tensors with labels, such as a DataLoader. Received: {told(data)}"
        )


def check_batch(batch: Any) -> None:
    """Check that a batch says which input is which."""
    from torch import Tensor

    rule = "A batch must be a dict of tensors, such as {'input_ids': …, 'labels': …}"
    if not isinstance(batch, Mapping):
        raise PruningError(f"{rule}. Received: {told(batch)}")
    if not any(isinstance(value, (Tensor, Mapping)) for value in batch.values()):
        kinds = {name: type(value).__name__ for name, value in batch.items()}
        raise PruningError(f"{rule}; a data collator makes them of rows. Received: {kinds}")
