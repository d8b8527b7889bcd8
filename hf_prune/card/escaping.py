"""What a stranger wrote stays text in a card: no markup, no HTML, no links, no way out of a table or a code block."""

from __future__ import annotations

import re
from typing import Any

_LONGEST = 1000  # characters of one value in running text
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;"}


class Safe(str):
    """Text that is Markdown already, made by us."""


def text(value: Any) -> Safe:
    """Return a value as Markdown that shows it as it stands, in one line."""
    if isinstance(value, Safe):
        return value
    plain = one_line(value)
    if re.search(r"(?i)://|www\.|mailto:|@", plain):  # such words become links by themselves, but not in code
        return code(plain)
    escaped = re.sub(r"[\\`*\[\]~$]|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", plain)
    escaped = re.sub(r"[<>&|]", lambda match: _ENTITIES[match[0]], escaped)
    return Safe(re.sub(r"^(\d*)([#+=.)-])(?=[\s#=-]|$)", r"\1\\\2", escaped))  # headings, lists, lines


def code(value: Any) -> Safe:
    """Return a value as code in running text or in a table, whatever backticks it holds."""
    plain = one_line(value).replace("|", "¦")  # a table would end its cell there, in code too
    fence = "`" * (_longest_run(plain) + 1)
    space = " " if plain.startswith("`") or plain.endswith("`") or not plain else ""
    return Safe(f"{fence}{space}{plain}{space}{fence}")


def block(value: Any, language: str, fence: int = 3) -> Safe:
    """Return a value as a block of code, between fences that are longer than any in it."""
    lines = "\n".join(_visible(line) for line in str(value).splitlines())
    marks = "`" * max(fence, _longest_run(lines) + 1)
    return Safe(f"{marks}{language}\n{lines}\n{marks}")


def one_line(value: Any) -> str:
    """Return a value as one line of printable characters, shortened where it is very long."""
    plain = " ".join(_visible(str(value)[: 2 * _LONGEST]).split())
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]} …"


def _visible(plain: str) -> str:
    return "".join(one if one.isprintable() or one == "\t" else " " for one in plain)


def _longest_run(plain: str) -> int:
    return max((len(run) for run in re.findall("`+", plain)), default=0)
