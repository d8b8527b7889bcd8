"""Exported files beside torch: one row each, for a report's table and for a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch"}


def export_rows(exports: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table of exported files; scores have a column each.

    Args:
        exports: As in `Figures.exports`; what a row lacks is left empty.
    """
    scores = list(dict.fromkeys(name for row in exports for name in row.get("metrics") or {}))
    head = ["file", "size, MB", "latency, ms", *scores, "largest difference"]
    return head, [_cells(row, scores) for row in exports]


def exports_table(exports: Sequence[Mapping[str, Any]]) -> str:
    """Return the same as an aligned Markdown table; nothing where there are no files."""
    if not exports:
        return ""
    head, rows = export_rows(exports)
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    line = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(_aligned(cells, widths) for cells in (head, line, *rows))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths)
    return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"


def _cells(row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    how = " ".join(str(row[key]) for key in ("dtype", "quantize") if row.get(key))
    metrics = row.get("metrics") or {}
    return [
        f"{_RUNTIMES.get(row['runtime'], row['runtime'])}{f', {how}' if how else ''}",
        _number(row.get("size_mb"), "{:.4g}"),
        _number(row.get("latency_ms"), "{:.4g}"),
        *(_number(metrics.get(name), "{:.4f}") for name in scores),
        _number(row.get("max_difference"), "{:.2g}"),
    ]


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, (int, float)) else ""
