"""What a run has logged, as a table for plots: one row a log, also over kills and resumes."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "pruning_log.csv"


class TrainingLog:
    """A CSV file with a column for each number that was logged, and one for the step.

    Args:
        path: The file.

    Example:
        >>> TrainingLog(Path("out") / FILE).add({"step": 10, "loss": 0.5, "sparsity": 0.1})  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []

    def begin(self, step: int) -> None:
        """Go on behind a step: rows that a resumed run will write again, or of another run, are dropped."""
        self._write([row for row in self._read() if int(row["step"]) <= step] if step else [])

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; the first one names the columns, and a later one may bring more."""
        if set(row) <= set(self.columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        else:
            self._write([*self._read(), row])

    def _read(self) -> list[dict[str, Any]]:
        """Return all rows; one that a kill has cut off is none."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))

    def _write(self, rows: list[Any]) -> None:
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, self.columns, restval="")
            if rows:
                table.writeheader()
                table.writerows(rows)
        os.replace(partial, self.path)
