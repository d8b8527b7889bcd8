"""Settings that check themselves: pydantic dataclasses whose errors read like ours, and YAML read with care."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from .errors import Problem, PruningError, RecipeError, did_you_mean, shown, visible

T = TypeVar("T")
_LARGEST_YAML = 2**18  # bytes: a recipe has one or two thousand
_MOST_NODES, _DEEPEST = 20_000, 50  # with every alias written out
_PROBLEMS = 8  # that one message names


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
                problems = problems_of(error, made.__dataclass_fields__, places=_in_order(made))
                refused = PruningError(f"{cls.__name__}: {'; '.join(map(str, problems))}")
                refused.problems = tuple(problems)
                raise refused from None

        made.__init__ = __init__
        return made  # type: ignore[no-any-return]

    return decorate


def renamed(old: str, new: str) -> Callable[[type[T]], type[T]]:
    """Let a class take an argument by its older name too, with a warning, until version 0.3.

    Args:
        old: The name before.
        new: The name now, by which it is given as a keyword or by place.

    Returns:
        A decorator for a class.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = cls.__init__

        @functools.wraps(made)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if old in kwargs:
                told = f"{cls.__name__}: '{old}' is called '{new}' now, and the older name goes in version 0.3"
                warnings.warn(told, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            made(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate


def briefly(told: Any) -> str:
    """Return the `repr` of checked settings with only what is not a default; of others the class alone."""
    fields = getattr(type(told), "__pydantic_fields__", {})
    shown = {name: getattr(told, name) for name, one in fields.items() if getattr(told, name) != one.default}
    return f"{type(told).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _in_order(made: Any) -> list[str]:
    return [one.name for one in made.__dataclass_fields__.values() if one.init and not one.kw_only]


def problems_of(
    error: ValidationError,
    known: Iterable[str] = (),
    known_at: Callable[[tuple[Any, ...]], Iterable[str]] | None = None,
    places: Sequence[str] = (),
) -> list[Problem]:
    """Return every problem of a validation error: key path, and the rule, what was received, what was meant.

    Args:
        error: What pydantic raised.
        known: Keys that exist at the top.
        known_at: From the path of a mapping to the keys that exist there, for nested settings.
        places: Keys that may be given without their names, in order.
    """
    problems = error.errors(include_url=False)
    for problem in problems:
        at, *rest = problem["loc"] or ("",)
        if isinstance(at, int) and at < len(places):
            problem["loc"] = (places[at], *rest)
    told = [_explain_one(problem, list(known), known_at) for problem in problems[:_PROBLEMS]]
    more = len(problems) - len(told)
    return [*told, *([Problem(None, f"and {more} more")] if more else [])]


def _explain_one(
    problem: Any, known: list[str], known_at: Callable[[tuple[Any, ...]], Iterable[str]] | None
) -> Problem:
    path = tuple(part for part in problem["loc"] if not isinstance(part, str) or "[" not in part)
    key = visible(".".join(str(part)[:80] for part in path))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = list(known_at(path[:-1])) if known_at else known
        hint = did_you_mean(key.rpartition(".")[2], names)
        return Problem(
            None, f"unknown key '{key}'.{_nested(visible(str(path[-1])[:80]), names) or hint} Known: {', '.join(names)}"
        )
    if problem["type"] in ("model_type", "dataclass_type") and known_at and (names := list(known_at(path))):
        return Problem(key, f"must be a mapping with keys of {', '.join(names)}. Received: {shown(problem['input'])}")
    message = problem["msg"].removeprefix("Value error, ")
    given = getattr(problem["input"], "kwargs", problem["input"])  # of what a setting is missing from, all that came
    if problem["type"] == "missing" and isinstance(given, Mapping):
        there = visible(", ".join(str(one) for one in given)[:200])
        return Problem(key, f"must be given. Received: {there or 'nothing'}")
    received = "" if "Received" in message else f" Received: {shown(given)}"
    return Problem(key or None, f"{message.rstrip('.')}.{received}" if received else message)


def _nested(key: str, names: list[str]) -> str:
    """Return how a key with points in it is written in YAML; with points it is so on the command line alone."""
    first, _, rest = key.partition(".")
    return f" In YAML it is {first}: {{{rest}: …}}." if rest and first in names else ""


def read_yaml(text: str, what: str) -> Any:
    """Read YAML that a stranger may have written: plain values only, of a size that nothing can multiply.

    Args:
        text: The YAML.
        what: What it is, for the error.

    Raises:
        RecipeError: It is no YAML, too long, nested too deeply, or its aliases (``&a``, ``*a``, ``<<``) make more of
            it than stands there.
    """
    if len(text) > _LARGEST_YAML:
        raise RecipeError(f"{what} must have at most {_LARGEST_YAML:,} characters. Received: {len(text):,}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}, _DEEPEST) > _MOST_NODES:
            raise RecipeError(f"must have at most {_MOST_NODES:,} values, aliases written out. Received: more")
        return loader.construct_document(node)
    except RecipeError as error:
        raise RecipeError(f"{what} {error}") from None
    except RecursionError:
        raise RecipeError(f"{what} must be nested at most {_DEEPEST} deep. Received: deeper") from None
    except Exception as error:  # odd dates, numbers and tags make PyYAML raise whatever it likes
        raise RecipeError(f"{what} is not valid YAML: {visible(str(error)[:300])}") from None


def _written_out(node: Any, sizes: dict[int, int], levels: int) -> int:
    """Return how many values a node is, with aliases written out; each node is counted once."""
    if levels < 0:
        raise RecipeError(f"must be nested at most {_DEEPEST} deep. Received: deeper")
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_NODES + 1  # what holds itself never ends
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_written_out(part, sizes, levels - 1) for part in parts)
    return sizes[id(node)]
