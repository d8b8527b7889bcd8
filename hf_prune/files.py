"""Files: those that travel with the library, a stranger's read with care, ours written in one step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, PruningError, did_you_mean, shown, visible

_PACKAGE = Path(__file__).resolve().parent
_LARGEST_JSON, _DEEPEST_JSON = 2**26, 100  # bytes, levels: the plan of a large model is a few megabytes, and flat


def no_folder(name: str | Path) -> str:
    """Return that a model's name is no folder, and which one beside it may be meant; empty where it is one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return ""
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [one.parent.name for one in path.parent.glob("*/config.json")]
    return f"no such folder here.{did_you_mean(path.name, beside)}"


def no_model(what: str, name: str | Path, error: Exception) -> str:
    """Return that a model is neither a folder nor, as the Hub or its client says, to be had there.

    Args:
        what: The option or the key that names it.
        name: What it was given.
        error: What transformers raised.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    why = visible(textwrap.shorten(lines[0], 300, placeholder=" …", break_long_words=False, break_on_hyphens=False))
    here = no_folder(name)
    return f"{what} must be a Hub name or a local folder{here and ': '}{here or '.'} Received: '{name}' ({why})"


def shipped(folder: str) -> Path:
    """Return a folder of shipped files: inside the installed package, or beside it in a checkout.

    Args:
        folder: ``"recipes"`` or ``"model_cards"``.

    Raises:
        PruningError: The folder is in neither place, so the installation is incomplete.
    """
    for home in (_PACKAGE, _PACKAGE.parent):
        if (home / folder).is_dir():
            return home / folder
    raise PruningError(f"The folder '{folder}' must come with hf_prune: install it again. Received: none in {_PACKAGE}")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text, without holding the file in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends, what was written takes the place of `path` in one step.

    A link in that place is replaced and never written through, and an older file's mode stays.

    Example:
        >>> with new_file(folder / "README.md") as file:  # doctest: +SKIP
        ...     file.write_text("# A model")
    """
    path = Path(path)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # the suffix stays: it may choose a format
    try:
        yield partial
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                partial.chmod(path.stat().st_mode & 0o7777)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file as `new_file` does, and return its path."""
    with new_file(path) as file:
        file.write_text(text, "utf-8")
    return Path(path)


def try_writing(folder: Path) -> None:
    """Try to write into a folder that is there or is to be made; nothing stays. Rights alone do not tell of /proc.

    Raises:
        OSError: It cannot be done.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def without_config(folder: str | Path) -> str:
    """Say of a folder without config.json which of those in it hold a model, as a run's do; empty where it has one."""
    if not Path(folder).is_dir() or (Path(folder) / "config.json").is_file():
        return ""
    models = ", ".join(f"'{visible(str(one.parent))}'" for one in sorted(Path(folder).glob("*/config.json"))[:5])
    return f"it has no config.json{'; models are in ' * bool(models)}{models}"


def is_inside(folder: str | Path, path: str | Path) -> bool:
    """Whether a file really lies in a folder: no link leads out of it.

    The Hub's cache is made of links, ``models--…/snapshots/COMMIT/FILE`` to ``models--…/blobs/HASH``: these count too.
    """
    home, place = Path(folder).resolve(), Path(path).resolve()
    if home in place.parents:
        return place.is_file()
    snapshots = next((one for one in home.parents if one.name == "snapshots"), None)
    if snapshots is None or not re.match(r"(models|datasets|spaces)--", snapshots.parent.name):
        return False
    return snapshots.parent / "blobs" in place.parents and place.is_file()


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a stranger's JSON file that must hold a mapping.

    Raises:
        CheckpointError: It is too large or too deep, no JSON, or no mapping.
    """
    name = Path(path).name
    check_json_size(path)
    try:
        told = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown(str(error), 200)
        raise CheckpointError(f"{name} must be a JSON file. Received: {reason}") from None
    if not isinstance(told, dict):
        raise CheckpointError(f"{name} must hold a mapping. Received: {shown(told)}")
    check_depth(told, name)
    return told


def check_json_size(path: str | Path) -> None:
    """Check a stranger's JSON file before it is read; where there is none, there is nothing to check.

    Raises:
        CheckpointError: It is too large to be a config, or no regular file.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        return
    if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
        size = f"{path.stat().st_size >> 20} MB" if path.is_file() else "a pipe or a device"
        raise CheckpointError(f"{path.name} must be a file of at most {_LARGEST_JSON >> 20} MB. Received: {size}")


def check_depth(told: Any, name: str) -> None:
    """Check that a value from a file is not nested so deeply that copying or printing it fails.

    Raises:
        CheckpointError: It is.
    """
    level, depth = [told], 0
    while level:
        depth += 1
        if depth > _DEEPEST_JSON:
            raise CheckpointError(f"{name} must be nested at most {_DEEPEST_JSON} deep. Received: {shown(told)}")
        inner = [one for one in level if isinstance(one, (dict, list))]
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
