"""A report that may be a stranger's, with only what has the types of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_COUNTS = ("parameters", "nonzero", "prunable_macs", "macs", "batch", "length", "threads")
_MOST = 2**53  # larger numbers are no counts, and JSON's readers disagree about them


def sound(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report's fields; what is not of the type that a report has is left out.

    Args:
        told: ``Report.to_dict()``, or what a file said.
    """
    kept, units = _mapping(told.get("kept")), _mapping(told.get("units"))
    metrics = {str(name): _numbers(value) for name, value in _mapping(told.get("metrics")).items()}
    known = {which: _measured(told[which]) for which in ("dense", "pruned") if _mapping(told.get(which))}
    return {
        **{key: value for key, value in known.items() if "parameters" in value},
        "kept": {str(name): value for name, value in kept.items() if _are_units(value)},
        "units": {str(name): value for name, value in units.items() if _is_count(value)},
        "metrics": {name: value for name, value in metrics.items() if value},
        "settings": _settings(_mapping(told.get("settings"))),
        "exports": _exports(told.get("exports")),
    }


def _exports(told: Any) -> list[dict[str, Any]]:
    """Return rows of exported files, of which texts are short ones."""
    rows = [one for one in told if isinstance(one, Mapping)] if isinstance(told, (list, tuple)) else []
    return [_export(one) for one in rows[:20] if isinstance(one.get("runtime"), str)]


def _export(told: Mapping[str, Any]) -> dict[str, Any]:
    texts = {
        key: told[key][:30] for key in ("runtime", "folder", "dtype", "quantize") if isinstance(told.get(key), str)
    }
    figures = {key: told[key] for key in ("size_mb", "latency_ms", "max_difference") if is_number(told.get(key))}
    return {**texts, **figures, "metrics": _numbers(told.get("metrics"))}


def _measured(told: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: told[name] for name in _COUNTS if _is_count(told.get(name))}
    if is_number(told.get("size_mb")):
        found["size_mb"] = told["size_mb"]
    return {**found, "latency_ms": _numbers(told.get("latency_ms"))}


def _settings(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of which each that is looked into is what it must be."""
    mappings = ("rows", "splits", "data_revision")
    found = {key: value for key, value in told.items() if key not in mappings}
    found["rows"] = {key: value for key, value in _mapping(told.get("rows")).items() if _is_count(value)}
    splits = _mapping(told.get("splits")).items()
    found["splits"] = {key: [value] if isinstance(value, str) else _texts(value) for key, value in splits}
    revisions = _mapping(told.get("data_revision")).items()
    found["data_revision"] = {str(key): value for key, value in revisions if isinstance(value, str)}
    for key in ("recipe_yaml", "command", "recipe", "data_config"):
        if not isinstance(found.get(key), str):
            found.pop(key, None)
    return found


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, (list, tuple)) else []


def _numbers(value: Any) -> dict[str, float]:
    return {str(name): number for name, number in _mapping(value).items() if is_number(number)}


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be shown."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _are_units(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_count(one) for one in value)
