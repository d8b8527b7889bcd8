"""What a card tells in numbers: dense against pruned, and under which conditions that was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from ..report import export_rows
from .facts import Known
from .sound import is_number


class _Row(NamedTuple):
    what: str
    dense: str
    pruned: str
    change: str


_FIGURES = (
    ("Parameters", "parameters", "{:,}"),
    ("Prunable MACs per {per}", "prunable_macs", "{:,}"),
    ("MACs of the whole model at {at}", "macs", "{:,}"),
    ("Weights on disk, MB", "size_mb", "{:.4g}"),
)
_NOTHING = 0.01  # a share that is not worth a word
_RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}


def numbers(known: Known) -> dict[str, Any]:
    """Return the template's figures: rows of the table, conditions, what is kept."""
    told = known.told
    dense, pruned = told.get("dense") or {}, told.get("pruned") or {}
    kept, units = told.get("kept") or {}, told.get("units") or {}
    scores = _score_rows(known.metrics)
    timed = _latency_rows(dense.get("latency_ms") or {}, pruned.get("latency_ms") or {})
    counts = {name: f"{len(numbers)} of {units[name]}" for name, numbers in kept.items() if name in units}
    per = "patch" if (known.task or "").startswith("image") else "token"
    return {
        "rows": [*scores, *_figure_rows(dense, pruned, per), *timed],
        # Counts hold anywhere; only what was run on some input, somewhere, needs its conditions told.
        "conditions": _conditions(pruned or dense, known.settings) if timed else "",
        "scored_on": _scored_on(known.settings) if scores else "",
        "timed": bool(timed),
        "scored": bool(scores),
        "exports": export_rows(told["exports"]) if told.get("exports") else None,
        "removed": bool(dense and pruned and pruned["parameters"] < dense["parameters"]),
        "zeros": f"{_zeros(pruned):.0%}" if _added_zeros(told) else None,
        "kept": counts or _planned(known.plan.get("kept")),
        "summary": _summary(kept, units),
    }


def _planned(kept: Any) -> dict[str, Any]:
    return dict(kept) if isinstance(kept, Mapping) else {}


def removed_share(told: Mapping[str, Any]) -> float:
    """Return the sparsity for the tag, in [0, 1): of the prunable MACs where units went, else of the weights."""
    before, after = ((told.get(which) or {}).get("prunable_macs") for which in ("dense", "pruned"))
    gone = 1 - after / before if before and after is not None else 0.0
    share = gone if gone > _NOTHING else _added_zeros(told)
    return share if share > _NOTHING else 0.0


def _added_zeros(told: Mapping[str, Any]) -> float:
    """Return the share of zero weights, in [0, 1]; 0 where pruning added none.

    A few are in every model (fresh biases, the padding row); only what pruning added is worth a word.
    """
    dense, pruned = told.get("dense") or {}, told.get("pruned") or {}
    return _zeros(pruned) if _zeros(pruned) - _zeros(dense) > _NOTHING else 0.0


def _score_rows(metrics: Mapping[str, Mapping[str, float]]) -> list[_Row]:
    rows = []
    for name, value in metrics.items():
        dense, pruned = value.get("dense"), value.get("pruned")
        change = f"{round(pruned - dense, 4):+g}" if finite(dense) and finite(pruned) else ""
        rows.append(_Row(name, _cell(dense, "{:.4g}"), _cell(pruned, "{:.4g}"), change))
    return [row for row in rows if row.dense or row.pruned]


def _figure_rows(dense: Mapping[str, Any], pruned: Mapping[str, Any], per: str) -> list[_Row]:
    rows = []
    for what, key, form in _FIGURES:
        before, after = dense.get(key), pruned.get(key)
        change = f"{after / before - 1:+.0%}" if before and after is not None else ""
        rows.append(
            _Row(what.format(per=per, at=_input(pruned or dense)), _cell(before, form), _cell(after, form), change)
        )
    return [row for row in rows if row.dense or row.pruned]


def _latency_rows(dense: Mapping[str, float], pruned: Mapping[str, float]) -> list[_Row]:
    rows = []
    for runtime in dict.fromkeys([*dense, *pruned]):
        before, after = dense.get(runtime), pruned.get(runtime)
        change = f"{before / after:.2f}x speed" if before and after else ""
        what = f"Latency, {_RUNTIMES.get(runtime, runtime)}, ms"
        rows.append(_Row(what, _cell(before, "{:.4g}"), _cell(after, "{:.4g}"), change))
    return rows


def _conditions(measured: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    threads = measured.get("threads")
    parts = [_input(measured)] if measured.get("batch") else []
    parts += [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
    parts += [words(settings["hardware"])] if settings.get("hardware") and parts else []
    return ", ".join(parts)


def _scored_on(settings: Mapping[str, Any]) -> str:
    """Return such as ``2,693 rows (validation and test)``."""
    rows, splits = (settings.get("rows") or {}).get("evaluation"), (settings.get("splits") or {}).get("evaluation")
    return (f"{rows:,} rows" + (f" ({' and '.join(splits)})" if splits else "")) if rows else ""


def _input(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {measured[key]}" for key in ("batch", "length") if measured.get(key))


def _zeros(measured: Mapping[str, Any]) -> float:
    """Share of weights that are zero, in [0, 1]."""
    parameters, nonzero = measured.get("parameters"), measured.get("nonzero")
    return 1 - nonzero / parameters if parameters and nonzero is not None else 0.0


def _summary(kept: Mapping[str, Sequence[int]], units: Mapping[str, int]) -> str:
    """Return such as ``20 of 72 heads and 3,021 of 9,216 neurons``."""
    stay: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for name, numbers in kept.items():
        if name in units:
            unit = name.rsplit(".", 1)[-1].replace("_", " ")
            stay[unit] += len(numbers)
            whole[unit] += units[name]
    return " and ".join(f"{stay[unit]:,} of {whole[unit]:,} {unit}" for unit in whole)


def words(value: Any) -> str:
    """Say a setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items() if item is not None)
    return ", ".join(map(words, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(value: Any, form: str) -> str:
    return form.format(value) if finite(value) else ""


def finite(value: Any) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return is_number(value)
