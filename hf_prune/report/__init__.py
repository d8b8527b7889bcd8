"""What a run kept and what that brought: as a table, as JSON, as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from typing import Any

from .display import draw, plain_table
from .exports import export_rows, exports_table
from .figures import Figures
from .machine import environment
from .measurement import Measurement, compare_latency, count, measure, measure_pair, random_inputs

__all__ = [
    "Measurement",
    "Report",
    "compare_latency",
    "count",
    "environment",
    "export_rows",
    "measure",
    "measure_pair",
    "random_inputs",
]


class Report(Figures):
    """What a run kept, and what that brought, to print, to draw and to keep as JSON.

    Args:
        **figures: As in `Figures`: `kept`, `units`, `dense`, `pruned`, `metrics`, `settings`, `exports`.
    """

    def table(self) -> str:
        """Return dense against pruned as an aligned plain-text (Markdown) table of at most 100 columns."""
        return "\n\n".join(filter(None, (plain_table(self), exports_table(self.exports))))

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Show the table in a notebook's cell."""
        return f"<pre>{escape(self.table())}</pre>"

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

    def plot(self, path: str | Path) -> Path:
        """Draw what stayed of each layer against the dense outline, and return the path of the picture.

        Args:
            path: Where to write; the suffix chooses the format (png, svg, pdf).

        Raises:
            PruningError: The report has no groups to draw.
        """
        return draw(self, Path(path))


def _plain(value: Any) -> Any:
    """Say in JSON's types what json does not know: numpy and torch numbers and arrays, sets, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
