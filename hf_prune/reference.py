"""What a recipe's keys are and mean, from the settings themselves: as rows, as a page, as comments in a recipe."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from .recipe import Recipe

_WIDTH = 100


class Key(NamedTuple):
    """One key of a recipe.

    Args:
        path: Such as ``train.epochs``.
        type: What it takes.
        default: As YAML; empty where it must be given.
        meaning: From the docstring of its settings.
        inside: The settings that it holds, if it does.
    """

    path: str
    type: str
    default: str
    meaning: str
    inside: Any = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


def recipe_keys() -> list[Key]:
    """Return every key of a recipe, those of nested settings behind them, in the order of the settings.

    What stands elsewhere is not repeated: `dense` has the keys of `train`, a pruner's schedule those of `schedule`, and
    a pruner those of the ones before it that mean the same.

    Example:
        >>> next(key for key in recipe_keys() if key.path == "train.epochs").default
        '3'
    """
    seen = set[tuple[str, str]]()
    return [key for key in _walk(Recipe, "") if not _is_seen(key, seen)]


def _walk(kind: Any, prefix: str) -> Iterator[Key]:
    for key in _keys_of(kind, prefix):
        yield key
        if (key.inside is not None and key.path != "dense" and key.name != "schedule") or key.path == "schedule":
            yield from _walk(key.inside, f"{key.path}.")


def _is_seen(key: Key, seen: set[tuple[str, str]]) -> bool:
    """Whether an earlier pruner has this key; else it is noted."""
    if key.path.count(".") != 2 or not key.path.startswith("pruners."):
        return False
    told = key.name, key.meaning
    if told in seen:
        return True
    seen.add(told)
    return False


def _keys_of(kind: Any, prefix: str = "") -> list[Key]:
    """Return the keys of one level; a pruner's is explained by its class."""
    meanings, keys = _meanings(kind), []
    for name, one in _fields(kind).items():
        inside = _settings_in(one.annotation)
        meaning = meanings.get(name) or (_first_sentence(inside) if inside is not None else "")
        keys.append(Key(f"{prefix}{name}", _type_of(one.annotation), _default_of(one), meaning, inside))
    return keys


def _fields(kind: Any) -> dict[str, Any]:
    """Return pydantic's fields of a model or a dataclass."""
    return dict(getattr(kind, "model_fields", None) or getattr(kind, "__pydantic_fields__", {}))


def _settings_in(annotation: Any) -> Any:
    """Return the settings that a key holds: of a pruner, of a training; ``None`` where it is a plain value."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and (hasattr(one, "model_fields") or is_dataclass(one)):
            return one
    return None


def _type_of(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _type_of(one) for one in get_args(annotation))
    if _settings_in(annotation) is annotation or getattr(annotation, "__name__", "") == "Path":
        return "settings" if _settings_in(annotation) is annotation else "path"
    origin, inner = get_origin(annotation), [one for one in get_args(annotation) if one is not ...]
    if origin is not None and inner and getattr(origin, "__name__", "") in ("list", "tuple", "Sequence", "Collection"):
        return f"list of {_type_of(inner[0])}"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    name = getattr(origin or annotation, "__name__", str(annotation))
    return names.get(name, "mapping" if name in ("dict", "Mapping") else name)


def _default_of(field: Any) -> str:
    if field.default_factory is not None:
        value = field.default_factory()
    elif field.default in (PydanticUndefined, MISSING):
        return ""
    else:
        value = field.default
    if _settings_in(type(value)) is type(value):
        return "{}"
    return _flow(value)


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).split("\n...")[0].strip()


# what docstrings say
def _meanings(kind: Any) -> dict[str, str]:
    """Return what the docstrings of a class and of those that it is made from say of each key."""
    found: dict[str, str] = {}
    for one in kind.__mro__:
        documented = inspect.cleandoc(one.__dict__.get("__doc__") or "")
        section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", documented, re.MULTILINE)
        entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
        found = {**{name: " ".join(text.split()) for name, text in entries}, **found}
    return found


def _first_sentence(kind: Any) -> str:
    return (kind.__doc__ or "").strip().split("\n")[0]


# a page, and a recipe with comments
def recipe_table() -> str:
    """Return all keys of a recipe as a Markdown table."""
    rows = [
        (f"`{one.path}`", one.type, f"`{one.default}`" if one.default else "", one.meaning) for one in recipe_keys()
    ]
    cells = [" | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in row) for row in rows]
    return "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *(f"| {row} |" for row in cells)])


def commented(recipe: Recipe) -> str:
    """Return a recipe as YAML in which every key is explained; keys that have their defaults are comments.

    Args:
        recipe: The recipe.
    """
    plain = yaml.safe_load(recipe.yaml())
    head = [f"# {line}" for line in textwrap.wrap(_RUN, _WIDTH)]
    return "\n".join([*head, *_lines(Recipe, plain, "")]) + "\n"


_RUN = (
    "A recipe of hf-prune. Run it with: hf-prune run FILE [KEY=VALUE]...; check it with: hf-prune validate FILE. "
    "Keys behind a # are as they would be anyway."
)


def _lines(kind: Any, plain: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key in _keys_of(kind):
        yield from (f"{indent}# {line}" for line in textwrap.wrap(key.meaning, _WIDTH - len(indent)))
        value = plain.get(key.name)
        if key.name not in plain:
            yield f"{indent}# {key.name}: {key.default}"
        elif key.inside is not None and isinstance(value, dict):
            value = value or _first_default(key.inside)  # or nobody could take the # from a key below
            yield f"{indent}{key.name}:{'' if value else ' {}'}"
            yield from _lines(key.inside, value, f"{indent}  ")
        else:
            yield f"{indent}{key.name}: {_flow(value)}"


def _first_default(kind: Any) -> dict[str, Any]:
    """Return the first key of settings that has a default, with it."""
    found = next((key for key in _keys_of(kind) if key.default not in ("null", "")), None)
    return {} if found is None else {found.name: yaml.safe_load(found.default)}


if __name__ == "__main__":
    print(recipe_table())
