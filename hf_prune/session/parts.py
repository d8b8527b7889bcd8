"""What a session is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from ..errors import PruningError


class Part(Protocol):
    """A part of a session: it owns its state, and nobody else writes it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


@contextmanager
def all_or_nothing(parts: Mapping[str, Part]) -> Iterator[None]:
    """Let parts take up a state; where it does not fit, all are as they were.

    Raises:
        PruningError: It does not fit.
    """
    held = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        for name, part in parts.items():
            part.load_state_dict(held[name])
        if isinstance(error, PruningError):
            raise
        raise PruningError(
            f"The pruning state must be whole, of this version or an older one. Received: {error!r}"
        ) from error


@contextmanager
def or_close(close: Callable[[], None]) -> Iterator[None]:
    """Give the model back as it came, without hooks, where the block raises: training ends there."""
    try:
        yield
    except BaseException:
        close()
        raise
