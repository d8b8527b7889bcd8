"""What must not be moved or removed with a folder: volumes mounted in it, processes that stand in it, its ownership."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
_MOUNTS, _PROCESSES = Path("/proc/self/mountinfo"), Path("/proc")


def mounts_in(folder: Path) -> list[Path]:
    """Return the mount points at and below a folder, files that something is mounted over among them.

    The system's table names all of this process's, also those of the same device (``mount --bind``); where there is no
    such table, and for what it does not list (a file system's own subvolumes), a folder on another device is one.
    """
    found = {place for place in _listed() if place == folder or folder in place.parents}
    return sorted(found | set(_other_devices(folder)))


def _listed() -> Iterator[Path]:
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        escaped = line.split(b" ")[4]  # blanks and line ends in a name are written as \040 and the like
        yield Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda digits: bytes([int(digits[1], 8)]), escaped)))


def _other_devices(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    if os.path.ismount(folder):
        yield folder
    device = folder.stat().st_dev
    for place, names, _ in os.walk(folder):
        for name in list(names):
            path = Path(place, name)
            with contextlib.suppress(OSError):  # gone by now
                if path.lstat().st_dev != device:
                    names.remove(name)
                    yield path


def somebody_stands_in(folder: Path) -> bool:
    """Whether a folder, or one below it, is the current folder of a process, as far as the system lets us see."""
    here = []
    with contextlib.suppress(OSError):  # ours may have been removed
        here.append(Path.cwd())
    with contextlib.suppress(OSError):
        for process in _PROCESSES.glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):  # another user's, or gone
                here.append(Path(os.readlink(process)))
    return any(folder == one or folder in one.parents for one in here)


def remove_tree(folder: Path) -> None:
    """Remove a folder and what is in it, but never what is mounted in it: such a folder stays, with a warning."""
    if folder.is_symlink() or not folder.is_dir():
        return
    mounts = mounts_in(folder)
    if mounts:
        logger.warning("'%s' stays, because something is mounted in it: %s", folder, ", ".join(map(str, mounts[:4])))
        return
    for place, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            os.chmod(place, 0o700)  # a folder that is closed to writing could not be emptied
    shutil.rmtree(folder, ignore_errors=True)


def copy_owner_and_mode(old: Path, new: Path) -> None:
    """Give a new folder or file the owner, group, mode (setgid and sticky too) and attributes of the old one.

    What this process may not give is left as it is.
    """
    with contextlib.suppress(OSError, NotImplementedError, AttributeError):  # Windows has no owners
        was = old.stat(follow_symlinks=False)
        for owner, group in ((was.st_uid, was.st_gid), (-1, was.st_gid)):
            with contextlib.suppress(PermissionError):
                os.chown(new, owner, group, follow_symlinks=False)
                break
    with contextlib.suppress(OSError, NotImplementedError):
        shutil.copystat(old, new, follow_symlinks=False)  # after the owner: a change of owner takes setgid away
