"""Tables: Markdown that is aligned for whoever reads it as plain text, and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

from .files import write_text


def aligned(lines: Sequence[Sequence[str]], *, words: bool = False) -> list[str]:
    """Return lines of cells as a Markdown table that is aligned for plain text.

    Args:
        lines: Cells of each line; the first one holds the titles.
        words: Whether all columns are words, and to the left; else all but the first are numbers.
    """
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    left = [words or column == 0 for column in range(len(widths))]
    cells = [
        [one.ljust(width) if to_left else one.rjust(width) for one, width, to_left in zip(line, widths, left)]
        for line in lines
    ]
    rule = ["-" * (width + 2) if to_left else "-" * (width + 1) + ":" for width, to_left in zip(widths, left)]
    header, *others = (f"| {' | '.join(line)} |" for line in cells)
    return [header, f"|{'|'.join(rule)}|", *others]


def write_csv(path: str | Path, kind: type[Any], rows: Iterable[Any]) -> Path:
    """Write dataclass instances of a kind, a line each under the names of its fields, and return the path."""
    out = StringIO()
    writer = csv.DictWriter(out, [one.name for one in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, out.getvalue())
