"""Files of rows and columns, as spreadsheets write them: what separates columns, and what the first line says."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PruningError, shown
from .lines import opened

_SEPARATORS = (",", ";", "\t", "|")  # of equal evidence the first
_HEAD = 2**16  # bytes that are looked at; `csv` refuses cells of twice as many
_BLOCK = 2**24  # bytes that are read at once
_LOOKED_AT = 1000  # rows
_SINGLE_WORDS = 0.05  # share of a text's rows up to which a single word above them is no row but their name
_TAG = re.compile(r"(?i:O|[BIESLU]-\S+)|[A-Z$.,:`'\"#-][A-Z0-9$.,:`'\"#|_-]*")  # of a name, or of a part of speech
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)*")  # datasets call a second 1 "1.1"
logger = logging.getLogger(__name__)


# before it is read
def check_encoding(path: Path) -> None:
    """Check that a file is in UTF-8: some readers would take others for it, and make other letters of them.

    Raises:
        PruningError: It is not, or cannot be read at all.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with opened(path) as file:
            for block in iter(lambda: file.read(_BLOCK), b""):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        own = "utf-16" if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
        raise PruningError(
            f"A file must be in UTF-8: save it as 'CSV UTF-8', or write a new one by iconv -f {own} -t utf-8, if it is "
            f"in {own}. Received: '{path}', with the bytes {error.object[error.start : error.start + 4]!r}"
        ) from None
    except Exception as error:  # a damaged archive, or one of a kind that is not installed: each has its own
        raise PruningError(f"A file must be readable: {error}. Received: '{path}'") from error


def options_of(path: Path) -> dict[str, Any]:
    """Return what the reader of a file must be told: what separates columns, and what quotes mean.

    Raises:
        PruningError: The first line does not name each column once, or there are more columns than names.
    """
    head = _head(path)
    separator = "\t" if ".tsv" in path.suffixes else max(_SEPARATORS, key=lambda one: _evidence(head, one))
    told = {"sep": separator, "skipinitialspace": True}
    if separator == "\t" and _has_plain_quotes(path):
        return {**told, "quoting": csv.QUOTE_NONE}
    _check_names(path, _rows(head, separator), separator)
    return told


def _head(path: Path) -> str:
    with opened(path) as file:
        return str(file.read(_HEAD).decode("utf-8-sig", errors="ignore"))  # its last letter may be cut


def _rows(head: str, separator: str) -> list[list[str]]:
    """Return the rows of a file's beginning, by what quotes and this separator mean; the last one may be cut."""
    try:
        rows = list(csv.reader(io.StringIO(head, newline=""), delimiter=separator, skipinitialspace=True))
    except csv.Error:
        return []
    return [row for row in rows if row]


def _evidence(head: str, separator: str) -> tuple[bool, float, int, float]:
    """Say how well it fits: there are columns, rows have as many as the first, they are many, and it is no comma."""
    rows = _rows(head, separator)
    width = len(rows[0]) if rows else 0
    same = sum(len(row) == width for row in rows) / max(1, len(rows))
    spaced = head.count(f"{separator} ") / max(1, head.count(separator))  # as between words
    return width > 1, same, width, -spaced


def _has_plain_quotes(path: Path) -> bool:
    """Whether quotes between tabs are part of texts: some are not closed, and every line has all its columns."""
    alone, widths = False, set()
    with opened(path) as file:
        for line in file:
            cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            widths.add(len(cells))
            alone = alone or any(one.startswith('"') and (len(one) < 2 or not one.endswith('"')) for one in cells)
    return alone and len(widths - {1}) == 1  # 1: an empty line


def _check_names(path: Path, rows: list[list[str]], separator: str) -> None:
    """Refuse what would be read wrong without a word: names that stand twice, or that are fewer than the columns."""
    names = [name.strip() for name in (rows[0] if rows else []) if name.strip()]
    twice = next((name for name in names if names.count(name) > 1 and not _NUMBER.fullmatch(name)), None)
    if twice is not None:
        raise PruningError(f"The first line of '{path.name}' must name each column once. Received: '{twice}' twice")
    if len(rows) > 1 and len(rows[1]) > len(rows[0]):
        raise PruningError(
            f"The first line of '{path.name}' must name every column: a text with '{separator}' in it stands in "
            f'"quotes". Received: {len(rows[0])} names, and {len(rows[1])} columns in the next line'
        )


def is_conll(path: Path) -> bool:
    """Whether each line has a word and its tag, and sentences have an empty line between them."""
    head = re.sub(r"-DOCSTART-.*\s*", "", _head(path)).strip()
    lines = [line.rstrip() for line in head.split("\n")[:-1]][:_LOOKED_AT]  # the last one may be cut
    rows = [one.split("\t" if "\t" in one else None) for one in lines if one]
    columns = len(rows[0]) if rows else 0
    sentences = len(rows) > 2 and 0 < 2 * lines.count("") <= len(rows)  # of two words or more, on the whole
    return sentences and columns > 1 and all(len(row) == columns and _TAG.fullmatch(row[-1]) for row in rows)


# when it is read
def tidied(rows: Any, name: str) -> Any:
    """Return the rows of a file without those that are empty, and with names that have no spaces around them.

    Args:
        rows: What `datasets` has read.
        name: Of the file.

    Raises:
        PruningError: The first line stands among the rows again.
    """
    import pyarrow.compute as pc

    columns = [rows.data.column(one) for one in rows.column_names]
    texts = all("string" in getattr(kind, "dtype", "") for kind in rows.features.values())
    if len(columns) > 1 and texts:
        again = reduce(pc.and_, (pc.equal(column, one) for column, one in zip(columns, rows.column_names)))
        if pc.any(again).as_py():
            raise PruningError(
                f"The first line of '{name}' must stand in it once: where it names the columns, take out the other "
                "ones; where it is a row of data, write names such as text,label above it. "
                f"Received: {', '.join(map(shown, rows.column_names))}"
            )
    if columns and len(rows) and min(one.null_count for one in columns):
        filled = np.flatnonzero(reduce(pc.or_, (pc.is_valid(column) for column in columns)))
        if len(filled) < len(rows):
            logger.warning(f"{len(rows) - len(filled)} empty rows of '{name}' are left out.")
            rows = rows.select(filled).flatten_indices()  # or the empty ones would still be counted
    clean = {one: one.strip() for one in rows.column_names if one != one.strip()}
    return rows if {*clean.values()} & {*rows.column_names} else rows.rename_columns(clean)


def is_headless(rows: Any, columns: Iterable[str]) -> bool:
    """Whether the names of columns look like a row of data.

    Args:
        rows: The rows of a file whose first line was taken for names.
        columns: Names to look at: a number above numbers is none; a text that stands below itself again is none
            either, unless the name of any column is unlike what stands below it.
    """
    if rows.column_names == [str(number) for number in range(len(rows.column_names))]:  # as pandas does
        return False
    columns = list(columns)
    if any(_is_value(rows, one) for one in columns):
        return True
    again = any(_stands_again(rows, one) for one in columns)
    return again and not any(_is_name(rows, one) for one in rows.column_names)


def _kind(rows: Any, column: str) -> str:
    return str(getattr(rows.features[column], "dtype", ""))


def _is_value(rows: Any, column: str) -> bool:
    """Whether a name is a number above numbers."""
    kind = _kind(rows, column)
    return ("int" in kind or "float" in kind) and _NUMBER.fullmatch(column) is not None


def _stands_again(rows: Any, column: str) -> bool:
    return "string" in _kind(rows, column) and rows[column][:_LOOKED_AT].count(column) > 1


def _is_name(rows: Any, column: str) -> bool:
    """Whether a name is unlike its column: no number above numbers, or a single word above texts of several."""
    kind = _kind(rows, column)
    if "string" not in kind:
        return any(one in kind for one in ("int", "float")) and _NUMBER.fullmatch(column) is None
    values = [value.split() for value in rows[column][:_LOOKED_AT] if value]
    single = sum(len(words) < 2 for words in values)
    return re.fullmatch(r"\w[\w.-]*", column) is not None and single <= _SINGLE_WORDS * len(values)
