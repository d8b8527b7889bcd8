"""Tables that are Markdown, and aligned for whoever reads them as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells as a Markdown table that is aligned for plain text; the first column to the left."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    cells = [
        [line[0].ljust(widths[0]), *(one.rjust(width) for one, width in zip(line[1:], widths[1:]))] for line in lines
    ]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    header, *others = (f"| {' | '.join(line)} |" for line in cells)
    return [header, f"|{'|'.join(rule)}|", *others]
