"""Settings that check themselves: pydantic dataclasses whose errors read like ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from .errors import PruningError, did_you_mean

T = TypeVar("T")


@dataclass_transform()
def settings(*, frozen: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a class a checked dataclass: a `PruningError` names the field and what was received."""

    def decorate(cls: type[T]) -> type[T]:
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        made: Any = dataclass(cls, frozen=frozen, config=config)
        checked = made.__init__

        @functools.wraps(checked)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            try:
                checked(self, *args, **kwargs)
            except ValidationError as error:
                raise PruningError(f"{cls.__name__}: {explain(error, made.__dataclass_fields__)}") from None

        made.__init__ = __init__
        return made  # type: ignore[no-any-return]

    return decorate


def explain(
    error: ValidationError,
    known: Iterable[str] = (),
    known_at: Callable[[tuple[Any, ...]], Iterable[str]] | None = None,
) -> str:
    """Say every problem of a validation error in one line each: key path, rule, what was received, what was meant.

    Args:
        error: What pydantic raised.
        known: Keys that exist at the top.
        known_at: From the path of a mapping to the keys that exist there, for nested settings.
    """
    return "; ".join(_explain_one(problem, list(known), known_at) for problem in error.errors())


def _explain_one(problem: Any, known: list[str], known_at: Callable[[tuple[Any, ...]], Iterable[str]] | None) -> str:
    path = tuple(part for part in problem["loc"] if not isinstance(part, str) or "[" not in part)
    key = ".".join(str(part) for part in path)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = list(known_at(path[:-1])) if known_at else known
        return f"unknown key '{key}'.{did_you_mean(str(path[-1]), names)} Known: {', '.join(names)}"
    message = problem["msg"].removeprefix("Value error, ")
    received = "" if "Received" in message else f" Received: {problem['input']!r:.80}"
    return f"{key}: {message.rstrip('.')}.{received}" if received else f"{key}: {message}"
