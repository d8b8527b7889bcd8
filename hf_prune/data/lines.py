"""Which line of a file a row is, and which line cannot be read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import PruningError, shown

_NAMED = 3  # rows in a message
_HEADERS = {".csv": 1, ".tsv": 1, ".jsonl": 0}  # lines above the rows, where a line is a row
_EMPTY = b' \t\r\n,;|"'  # a line of these alone is no row of a sheet


def opened(path: Path) -> Any:
    """Return a file to read bytes from, unpacked where it is an archive."""
    import fsspec

    return fsspec.open(str(path), "rb", compression="infer")


# rows that are read
def rows_told(places: Sequence[int], count: int, file: Path | None) -> str:
    """Return where rows stand: the lines of their file, or which rows they are, counted from 1.

    Args:
        places: Of the rows, from 0 on.
        count: How many rows the file has.
        file: The one that they come from; ``None``: several, or one of another kind.
    """
    lines = None if file is None else _lines_of_rows(file, count)
    numbers = [lines[at] if lines else at + 1 for at in places[:_NAMED]]
    told = ", ".join([*map(str, numbers), *(["…"] if len(places) > _NAMED else [])])
    several = "s" * (len(places) > 1)
    return f"line{several} {told} of '{file.name}'" if file and lines else f"row{several} {told}, counted from 1"


def _lines_of_rows(file: Path, count: int) -> list[int] | None:
    """Return the line of each row; ``None`` where a line is no row, as where a text has a line break in it."""
    header = next((_HEADERS[one] for one in file.suffixes[-2:] if one in _HEADERS), None)
    if header is None:
        return None
    with opened(file) as lines:
        filled = [number for number, line in enumerate(lines, 1) if line.strip(_EMPTY)]
    return filled[header:] if len(filled) == count + header else None


def check_tags(dataset: Any, words: str, labels: str, file: Path | None = None) -> None:
    """Check that each row has a label for each of its words.

    Args:
        dataset: The rows.
        words: The column with lists of words.
        labels: The column with lists of labels.
        file: The one that all rows come from.

    Raises:
        PruningError: One has not; says which.
    """
    import pyarrow.compute as pc

    table = dataset.select_columns([words, labels]).with_format("arrow")[:]
    sizes = [pc.list_value_length(table[one]).to_pylist() for one in (words, labels)]
    wrong = [at for at, (first, second) in enumerate(zip(*sizes, strict=True)) if first != second]
    if wrong:
        first, second = (one[wrong[0]] for one in sizes)
        raise PruningError(
            f"data.label: each row must have as many labels as words. Received: {second} labels of {first} words, "
            f"{shown(table[words][wrong[0]].as_py())}, in {rows_told(wrong[:1], len(dataset), file)}"
        )


# files that cannot be read
def with_line(reason: str, path: Path, kind: str, separator: str) -> str:
    """Return what is wrong in which line of a file; empty where it is not known.

    Args:
        reason: What its reader says, which counts rows from 0, and some of them anew in each part of the file.
        path: The file.
        kind: Its format.
        separator: Of columns.
    """
    if not (kind == "json" or (kind == "csv" and "EOF inside string" in reason)):
        return ""
    with opened(path) as file:
        text = file.read().decode("utf-8-sig", errors="replace")
    return _open_quote(text, separator) if kind == "csv" else _broken_json(text)


def _broken_json(text: str) -> str:
    whole = _json_error(text)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if whole is None or not lines:
        return ""
    if all(_json_error(line) for _, line in lines[:2]):  # one value over several lines
        return _told(whole.lineno, whole)
    wrong = next(((number, error) for number, line in lines if (error := _json_error(line))), None)
    return _told(*wrong) if wrong else ""  # every line may be a value by itself


def _told(line: int, error: json.JSONDecodeError) -> str:
    return f"line {line} is not valid JSON (cut off?): {error.msg}, at character {error.colno}"


def _json_error(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    except (RecursionError, ValueError):  # too deep, or a number of too many digits: not ours to explain
        return None
    return None


def _open_quote(text: str, separator: str) -> str:
    """Return which line opens a quote that nothing closes."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    begins = 1
    try:
        for _ in rows:
            begins = rows.line_num + 1
    except csv.Error as error:
        ends = "end of data" in str(error) or "field limit" in str(error)
        return f"the quote that line {begins} opens is not closed" if ends else ""
    return ""
