"""One registry type for scores, schedules, allocations and architectures, open to other packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import PruningError, did_you_mean

T = TypeVar("T")
ENTRY_POINTS = "hf_prune"  # other packages list modules here; importing one registers what it defines


class Registry(Generic[T]):
    """Names to things, filled by decorators; an unknown name lists what there is.

    Example:
        >>> shapes: Registry[int] = Registry("shape")
        >>> shapes.add("square", 4)
        4
        >>> shapes["square"]
        4
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Register under a name that is still free, and hand the thing back."""
        if name in self._entries:
            raise PruningError(
                f"A {self.what} named '{name}' is registered already: take another name. Received: '{name}'"
            )
        self._entries[name] = thing
        return thing

    def register(self, name: str) -> Callable[[T], T]:
        """Return the decorator form of `add`."""
        return lambda thing: self.add(name, thing)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            load_entry_points()
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise PruningError(
                f"No {self.what} is named '{name}'.{hint} Known: {', '.join(sorted(self._entries))}. Received: '{name}'"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a registered function has a parameter of this name, which it is then called with."""
    return name in inspect.signature(function).parameters


_loaded = False


def load_entry_points() -> None:
    """Import every module that other packages announce under the entry-point group ``hf_prune``; once a process."""
    global _loaded
    if not _loaded:
        _loaded = True
        for entry in entry_points(group=ENTRY_POINTS):
            entry.load()
