"""What can be named in a recipe, from the registries: as rows that a table or JSON shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import PruningError, did_you_mean

Rows = list[dict[str, str]]


def listed(what: str) -> Rows:
    """Return everything of a sort, a row each, with the same columns.

    Args:
        what: One of `LISTS`.

    Raises:
        PruningError: There is no such list.

    Example:
        >>> [row["schedule"] for row in listed("schedules")][:2]
        ['cubic', 'linear']
    """
    from .registry import load_entry_points

    if what not in LISTS:
        raise PruningError(f"Lists are {', '.join(LISTS)}.{did_you_mean(what, LISTS)} Received: '{what}'")
    load_entry_points()
    return LISTS[what]()


def show_rows(rows: Rows) -> None:
    """Show rows as a table: in a terminal as wide as it is, to a pipe with whole lines."""
    terminal = Console().is_terminal
    table = Table(*(rows[0] if rows else ["nothing"]), box=HEAVY_HEAD if terminal else None, pad_edge=terminal)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    Console(width=None if terminal else 10_000).print(table)


def _scores() -> Rows:
    from .scores import SCORES

    return [
        {
            "score": name,
            "of": of,
            "needs": ", ".join(score.needs),
            "masks": "reversible" if score.reversible else "final",
            "what": _first_line(score.function),
            "paper": score.paper,
        }
        for name in sorted(SCORES)
        for of, score in SCORES[name].items()
    ]


def _schedules() -> Rows:
    from .schedules import SCHEDULES

    return _documented("schedule", SCHEDULES)


def _allocations() -> Rows:
    from .allocation import ALLOCATIONS

    return _documented("allocation", ALLOCATIONS)


def _rules() -> Rows:
    from .rules import RULES

    return [
        {
            "rule": name,
            "may return": "yes" if RULES[name].returns else "no",
            "of": "weights, units" if RULES[name].units else "weights",
            "what": _first_line(RULES[name].function),
        }
        for name in RULES
    ]


def _patterns() -> Rows:
    from .patterns import PATTERNS

    return _documented("pattern", PATTERNS)


def _budgets() -> Rows:
    from .session import BUDGETS

    return _documented("budget", BUDGETS)


def _guards() -> Rows:
    from .session import GUARDS

    return _documented("guard", GUARDS)


def _regularisations() -> Rows:
    from .session import REGULARISERS

    return [
        {
            "regularisation": name,
            "of": "units" if REGULARISERS[name].needs_units else "weights, units",
            "what": _first_line(REGULARISERS[name].function),
        }
        for name in REGULARISERS
    ]


def _evidence() -> Rows:
    from .evidence import EVIDENCE

    return _documented("need", EVIDENCE)


def _pruners() -> Rows:
    from .pruners import PRUNERS

    return [
        {
            "pruner": name,
            "class": PRUNERS[name].made.__name__,
            "with": ", ".join(f"{key}={value}" for key, value in PRUNERS[name].settings.items()),
            "what": _first_line(PRUNERS[name].made),
        }
        for name in PRUNERS
    ]


def _tasks() -> Rows:
    from .recipe import METRICS_OF
    from .recipe_tasks import RECIPE_TASKS

    return [
        {
            "task": name,
            "models": f"...{task.head or 'Model'}",
            "metrics": ", ".join(METRICS_OF.get(name, ["accuracy"])),
            "reads": task.reads,
        }
        for name, task in RECIPE_TASKS.items()
    ]


def _metrics() -> Rows:
    from .metrics import METRICS

    return [{"metric": name, "what": METRICS[name]} for name in METRICS]


def _formats() -> Rows:
    from .exporting import FORMATS

    return [{"format": name, "title": one.title, "runtime": one.runtime} for name, one in FORMATS.items()]


def _architectures() -> Rows:
    from .architectures import ARCHITECTURES
    from .architectures.conventions import FEED_FORWARDS, FUSED, QUERY_KEY_VALUE

    found = [("attention", _CONVENTION, ", ".join(names)) for names in QUERY_KEY_VALUE]
    found += [("attention", _CONVENTION, name) for name, _ in FUSED]
    found += [("feed-forward", _CONVENTION, f"{', '.join(block.up)}, {block.down}") for block in FEED_FORWARDS]
    found += [(name, "its own function", _first_line(ARCHITECTURES[name])) for name in sorted(ARCHITECTURES)]
    return [dict(zip(("what", "by", "children"), one)) for one in found]


_CONVENTION = "naming convention"


def _recipes() -> Rows:
    from .recipe import shipped_recipes

    found = {name: path.read_text(encoding="utf-8").splitlines() for name, path in shipped_recipes().items()}
    return [
        {"recipe": name, "what": " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))}
        for name, lines in found.items()
    ]


def _keys() -> Rows:
    from .reference import recipe_keys

    return [
        {"key": key.path, "takes": key.type, "default": key.default, "meaning": key.meaning} for key in recipe_keys()
    ]


def _documented(what: str, registry: Any) -> Rows:
    return [{what: name, "what": _first_line(registry[name])} for name in registry]


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


LISTS: Mapping[str, Callable[[], Rows]] = {
    "scores": _scores,
    "schedules": _schedules,
    "allocations": _allocations,
    "rules": _rules,
    "patterns": _patterns,
    "budgets": _budgets,
    "guards": _guards,
    "regularisations": _regularisations,
    "evidence": _evidence,
    "pruners": _pruners,
    "tasks": _tasks,
    "metrics": _metrics,
    "formats": _formats,
    "architectures": _architectures,
    "recipes": _recipes,
    "keys": _keys,
}
