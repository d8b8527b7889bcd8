"""What a run has logged, as a table for plots: one row a log, also over kills and resumes."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
FILE = "pruning_log.csv"
_MORE, _NO_STEP = "more than the columns", float("inf")


class TrainingLog:
    """A CSV file with a column for each number that was logged, and one for the step.

    No training ends for it: what cannot be written is missing in it, with one warning, and what cannot be read is
    moved out of the way.

    Args:
        path: The file.

    Example:
        >>> TrainingLog(Path("out") / FILE).add({"step": 10, "loss": 0.5, "sparsity": 0.1})  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.warned = False

    def begin(self, step: int) -> None:
        """Go on behind a step: rows that a resumed run will write again, or of another run, are dropped."""
        self._try(lambda: self._write([row for row in self._read() if _step(row) <= step] if step else []))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; the first one names the columns, and a later one may bring more."""
        self._try(lambda: self._add(row))

    def rows(self) -> list[dict[str, float]]:
        """Return the numbers of each row that has a step."""
        return [numbers_of(row) for row in self._read()]

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.columns = []  # the next row is written with the whole table: this one may have left a part of itself
            if not self.warned:
                logger.warning("%s cannot be written, training goes on without it: %s", self.path, error)
            self.warned = True

    def _add(self, row: Mapping[str, Any]) -> None:
        if set(row) <= set(self.columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        else:
            self._write([*self._read(), row])

    def _read(self) -> list[dict[str, Any]]:
        """Return all rows; one that a kill has cut off is none, and a file that is no such table has none."""
        if not self.path.is_file():
            return []
        try:
            text = self.path.read_text(encoding="utf-8")
            rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), restkey=_MORE))
            return [row for row in rows if _step(row) < _NO_STEP and _MORE not in row]
        except (UnicodeDecodeError, csv.Error) as error:
            aside = self.path.with_name(f"{self.path.stem}.unreadable{self.path.suffix}")
            logger.warning("%s is no table of ours (%s): it is now %s.", self.path, error, aside.name)
            os.replace(self.path, aside)
            return []

    def _write(self, rows: list[Any]) -> None:
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, self.columns, restval="")
                if rows:
                    table.writeheader()
                    table.writerows(rows)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def numbers_of(row: Mapping[Any, Any]) -> dict[str, float]:
    """Return those cells of a row that are finite numbers, under their columns' names."""
    found = {}
    for name, text in row.items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if isinstance(name, str) and math.isfinite(value):
            found[name] = value
    return found


def _step(row: Mapping[str, Any]) -> float:
    """Return a row's step; one without, in a file that something else has written to, is behind every step."""
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):
        return _NO_STEP
