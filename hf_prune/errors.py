"""What can go wrong, by name, and how we suggest what would have worked."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PruningError(ValueError):
    """Something about pruning cannot be done as asked; every error of this library is one."""


class UnsupportedModelError(PruningError):
    """The model has no structure that we can cut exactly."""


class CheckpointError(PruningError):
    """A folder's plan does not fit its model, or the folder cannot be read safely."""


class RecipeError(PruningError):
    """A recipe has an unknown key, a wrong type or a value out of range."""


def did_you_mean(received: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known name, or an empty string."""
    close = get_close_matches(received, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
