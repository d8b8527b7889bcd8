"""Patterns: which single weights may leave together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .allocation import select_weights
from .registry import Registry

PatternFunction = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]


@dataclass(frozen=True)
class Pattern:
    """A registered pattern.

    Args:
        name: Its name.
        function: From values by parameter (larger = keep) and how many weights stay in all to masks, True = keep.
        sharded: Whether parts of tensors can be decided on by themselves; only single weights can.
    """

    name: str
    function: PatternFunction
    sharded: bool = False


PATTERNS: Registry[Pattern] = Registry("pattern")


def register_pattern(name: str, *, sharded: bool = False) -> Callable[[PatternFunction], PatternFunction]:
    """Register a pattern under the name that `WeightPruner.pattern` takes.

    Example:
        >>> @register_pattern("rows")
        ... def rows(values, keep):
        ...     means = {name: value.mean(1, keepdim=True).expand_as(value) for name, value in values.items()}
        ...     return select_weights(means, keep)
    """

    def register(function: PatternFunction) -> PatternFunction:
        PATTERNS.add(name, Pattern(name, function, sharded))
        return function

    return register


@register_pattern("unstructured", sharded=True)
def unstructured(values: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Any weight may go."""
    return select_weights(values, keep)
