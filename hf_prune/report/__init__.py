"""What a run kept and what that brought: as a table, as JSON, as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, overload

from .display import check_picture, draw, html_table, plain_table, pruned_line, write_picture
from .exports import export_rows, exports_table
from .figures import Figures
from .grid import Grid, Timing, measure_grid
from .machine import environment
from .measurement import Measurement, count, measure, measure_pair
from .subjects import check_reads, evaluating, onnx_subject, random_inputs, torch_subject, torch_threads
from .timing import compare_latency, steadiest, thread_clock, wall_clock

__all__ = [
    "Grid",
    "Measurement",
    "Report",
    "Timing",
    "check_reads",
    "compare_latency",
    "count",
    "environment",
    "evaluating",
    "export_rows",
    "measure",
    "measure_grid",
    "measure_pair",
    "onnx_subject",
    "random_inputs",
    "steadiest",
    "thread_clock",
    "torch_subject",
    "torch_threads",
    "wall_clock",
]


class Report(Figures):
    """What a run kept, and what that brought, to print, to draw and to keep as JSON.

    Args:
        **figures: As in `Figures`: `kept`, `units`, `dense`, `pruned`, `metrics`, `settings`, `exports`.
    """

    def table(self) -> str:
        """Return dense against pruned as an aligned plain-text (Markdown) table of at most 100 columns."""
        return "\n\n".join(filter(None, (plain_table(self), exports_table(self.exports))))

    def summary(self) -> str:
        """Say in one line what was pruned.

        Example:
            >>> Report(kept={"layers.0.attention.heads": [0, 2]}, units={"layers.0.attention.heads": 12}).summary()
            'pruned 10 of 12 heads'
        """
        return pruned_line(self)

    def __str__(self) -> str:
        if not (self.metrics or self.units or self.dense or self.pruned):
            return "Report: nothing was pruned, counted or scored yet."
        summary = [self.summary()] if self.units or self.masked else []
        return "\n\n".join([*summary, self.table(), *map("Warning: {}".format, self.warnings)])

    def _repr_html_(self) -> str:
        """Show the table in a notebook's cell."""
        return html_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON knows."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=_plain))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that `to_dict` wrote; keys of a newer version are ignored."""
        known = {name: data[name] for name in (one.name for one in fields(cls)) if name in data}
        names = {one.name for one in fields(Measurement)}
        for which in ("dense", "pruned"):
            if known.get(which) is not None:
                known[which] = Measurement(**{key: value for key, value in known[which].items() if key in names})
        return cls(**known)

    @overload
    def plot(self) -> Any: ...

    @overload
    def plot(self, path: str | Path) -> Path: ...

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw what stayed of each layer against the dense outline.

        Args:
            path: Where to write; the suffix chooses the format (png, svg, pdf). By default nothing is written.

        Returns:
            The path of the picture; without `path` a ``matplotlib.figure.Figure``, which a notebook shows.

        Raises:
            PruningError: The report has no groups to draw, or matplotlib writes no such format.

        Example:
            >>> report.plot().savefig("kept.pdf")  # doctest: +SKIP
        """
        check_picture(path)
        figure = draw(self)
        return figure if path is None else write_picture(figure, path)


def _plain(value: Any) -> Any:
    """Say in JSON's types what json does not know: numpy and torch numbers and arrays, sets, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
