"""What can go wrong, by name, and how we suggest what would have worked."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """What is wrong with one setting: its key, or ``None`` where the text names it, and the text."""

    key: str | None
    text: str

    def __str__(self) -> str:
        return self.text if self.key is None else f"{self.key}: {self.text}"


class PruningError(ValueError):
    """Something about pruning cannot be done as asked; every error of this library is one."""

    problems: tuple[Problem, ...] = ()  # where settings were refused: what the message says, one by one


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


class _Short(reprlib.Repr):
    """A `repr` whose cost is bounded, whatever a stranger's file has made of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset, self.maxstring = 3, 4, 4, 4, 4, 80

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length():,} bits"

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(value[key], level - 1)}" for key in [*value][:4]]
        return "{" + ", ".join([*shown, *(["..."] if len(value) > 4 else [])]) + "}" if level > 0 else "{...}"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxstring])


_SHORT = _Short()


def shown(value: object, length: int = 80) -> str:
    """Return `repr` of a value that came from a file, cut to a length at a cost that does not grow with the value.

    Example:
        >>> shown([[[[["deep"] * 9] * 9] * 9] * 9] * 9, 40)
        '[[[[...], [...], [...], [...], ...], [[.'
    """
    try:
        return visible(_SHORT.repr(value)[:length])
    except Exception:  # a stranger's class may raise whatever it likes
        return f"a {type(value).__name__}"


def visible(text: str) -> str:
    """Return text without characters that move a terminal's cursor, hide or turn text, or cannot be encoded."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
