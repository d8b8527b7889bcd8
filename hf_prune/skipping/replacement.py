"""What stands in for a forward: an object with fields, which returns what the forward would have returned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .forwards import by_name

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


@dataclass(eq=False, repr=False)
class Replacement(ABC):
    """What a module runs in place of its class's forward; each says in one line what of, and what it returns."""

    module: nn.Module

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(eq=False, repr=False)
class Packing(Replacement):
    """One that returns a value the way the module's own forward does.

    Args:
        module: The module.
        names: Of its forward's parameters.
        returned: What its forward returns: a tuple's (a list's) names; ``None``: a bare value.
    """

    names: tuple[str, ...]
    returned: tuple[type, tuple[str, ...]] | None

    def packed(self, value: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return a value bare, or as a tuple whose other entries are unknown.

        An entry that the forward was itself given (T5's position bias, on its way to the next layer) is handed on.
        """
        if self.returned is None:
            return value
        kind, names = self.returned
        given = by_name(self.names, args, kwargs)
        unknown: dict[str, Any] = {"router_tuple": (value.new_zeros(1),)}  # of Switch without experts
        biases = [name for name in names[1:] if name.endswith("position_bias")]  # T5's, which it may call anything
        theirs = [name for name in given if name.endswith("position_bias")]
        unknown.update({name: given[their] for name, their in zip(biases, theirs)})
        values = [value, *(given.get(name, unknown.get(name)) for name in names[1:])]
        return values if kind is list else tuple(values)

    def lengthen_cache(self, module: nn.Module, number: str, given: Mapping[str, Any], hidden: Tensor) -> None:
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
