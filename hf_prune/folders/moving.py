"""Bringing files from one folder into another: by link, by rename, one by one, and what came in between."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from .places import copy_owner_and_mode, mounts_in

logger = logging.getLogger(__name__)
CONFIG = "config.json"  # without it no folder is taken for a model's


def files_in(folder: Path) -> set[Path]:
    """Return the files and links below a folder, relative to it."""
    found = (Path(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names))
    return {path.relative_to(folder) for path in found if path.is_symlink() or not path.is_dir()}


def inherit(staging: Path, target: Path, stale: Sequence[str]) -> None:
    """Link what the old folder holds and the new one was not given; copy where links do not work."""
    places = []
    for place, folders, names in os.walk(target):
        inside = Path(place).relative_to(target)
        for name in folders:
            old, new = Path(place, name), staging / inside / name
            if old.is_symlink():
                _link(old, new)
            elif not new.is_symlink():
                new.mkdir(exist_ok=True)
                places.append((old, new))
        for name in names:
            if not is_stale(inside / name, stale) and not os.path.lexists(staging / inside / name):
                _link(Path(place, name), staging / inside / name)
    for old, new in reversed(places):  # the innermost first, and filled: one may be closed to writing
        copy_owner_and_mode(old, new)


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except (FileExistsError, FileNotFoundError):  # another process has put a new folder there, which holds it too
        pass
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)
        copy_owner_and_mode(old, new)


def is_stale(inside: Path, patterns: Sequence[str]) -> bool:
    """Whether a file, named relative to its folder, is one of those that a new folder does not inherit."""
    return len(inside.parts) == 1 and any(inside.match(pattern) for pattern in patterns)


def bring_over(old: Path, new: Path, stale: Sequence[str], ours: Collection[Path]) -> None:
    """Bring what other processes wrote into the old folder, after it was inherited, into the one in its place.

    Where that fails, the old folder stays, under a name that everybody sees.

    Args:
        old: The folder that is about to be removed.
        new: The one that is there now.
        stale: Patterns of files that are to leave.
        ours: Files that the new folder was written with, relative to it: they win.
    """
    try:
        for inside in sorted(files_in(old) - set(ours)):
            if not is_stale(inside, stale) and not _is_same(old / inside, new / inside):
                logger.info("%s was written while its folder was saved: it is brought over.", inside)
                _make_folders(new, inside.parent, old)
                os.replace(old / inside, new / inside)
        for inside in _folders_in(old):
            _make_folders(new, inside, old)
    except OSError as error:
        left = new.with_name(f"{new.name}.left-{uuid.uuid4().hex[:8]}")
        os.rename(old, left)
        logger.warning("Written while its folder was saved, and could not be brought over (%s): see '%s'.", error, left)


def _folders_in(folder: Path) -> list[Path]:
    found = (Path(place, name) for place, folders, _ in os.walk(folder) for name in folders)
    return [path.relative_to(folder) for path in found if not path.is_symlink()]


def _make_folders(home: Path, inside: Path, like: Path) -> None:
    for part in [*reversed(inside.parents), inside]:
        if not os.path.lexists(home / part):
            (home / part).mkdir()
            copy_owner_and_mode(like / part, home / part)


def _is_same(old: Path, new: Path) -> bool:
    """Whether a file is there already: linked, or copied and not written since."""
    if not os.path.lexists(new):
        return False
    was, now = old.lstat(), new.lstat()
    linked = (was.st_dev, was.st_ino) == (now.st_dev, now.st_ino)
    return linked or (was.st_size, was.st_mtime_ns // 1000) == (now.st_size, now.st_mtime_ns // 1000)


def move_in(staging: Path, target: Path, stale: Sequence[str], ours: Collection[Path]) -> None:
    """Move finished files into a folder that must stay where it is; its config leaves first and comes last.

    Raises:
        OSError: Something is mounted over a file that must leave or be replaced; nothing was touched.
    """
    logger.info("%s cannot be replaced in one step: its files are, one by one.", target)
    leave = [path for path in target.iterdir() if is_stale(Path(path.name), stale) and not _is_folder(path)]
    fixed = {*mounts_in(target)} & {*leave, target / CONFIG, *(target / inside for inside in ours)}
    if fixed:
        raise OSError(errno.EBUSY, "something is mounted over a file that must be replaced", str(min(fixed)))
    (target / CONFIG).unlink(missing_ok=True)
    for old in leave:
        old.unlink()
    for inside in sorted(ours, key=lambda inside: inside == Path(CONFIG)):
        _open_way(target, inside.parent, staging)
        _put(staging / inside, target / inside)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _open_way(target: Path, inside: Path, staging: Path) -> None:
    """Make the folders on the way to a file; a link on it would lead out of the target, and is replaced."""
    for part in [*reversed(inside.parents), inside]:
        if part != Path() and (target / part).is_symlink():
            (target / part).unlink()
    _make_folders(target, inside, staging)


def _put(path: Path, place: Path) -> None:
    """Move a file into its place, also onto another volume, in one step."""
    try:
        os.replace(path, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
        try:
            shutil.copy2(path, beside, follow_symlinks=False)
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)
