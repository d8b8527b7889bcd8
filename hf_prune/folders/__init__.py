"""Folders that are written whole or not at all: filled beside their place, flushed, and put there in one step."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import sys
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .moving import bring_over, files_in, inherit, move_in
from .places import copy_owner_and_mode, mounts_in, remove_tree, somebody_stands_in

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES)  # by another folder; the last is Windows'
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # old kernels, and file systems such as NFS
_STAYS = (errno.EBUSY, errno.EXDEV)  # mount points that hide, and folders of a container's image


@contextmanager
def whole_folder(path: str | Path, *, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends; if it raises, `path` is as it was.

    A process that is killed leaves the old folder or the new one, and at most a hidden folder ``.NAME.saving-…`` that
    the next save removes. Where a system cannot exchange two folders (macOS, Windows, NFS), the old one is set aside as
    ``.NAME.previous`` for a moment: `put_back` repairs what a kill in that moment leaves. A folder that must stay where
    it is (a mount point, one with something mounted in it, a process's current directory) gets the finished files one
    by one: a kill between two of them leaves it without config.json, so that nothing takes it for whole.

    Nothing is removed but stale files and those that new ones replace: what other processes write into the old folder
    meanwhile is brought over, links stay links and are never followed, and folders keep their owner and mode.

    Args:
        path: The folder, which may exist or not. A link to a folder stays a link.
        stale: Patterns of files that the new folder does not inherit from the old one; it inherits all others.

    Raises:
        OSError: `path` is a file, or the folder cannot be written.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
    put_back(target)
    _sweep(target)
    home = target if _must_stay(target) else target.parent
    staging, lock = _new_staging(home, target)
    try:
        yield staging
        _flush(staging)
        ours = files_in(staging)
        if home == target:
            move_in(staging, target, stale, ours)
        else:
            inherit(staging, target, stale)
            _take_place(staging, target, stale, ours)
    finally:
        remove_tree(staging)  # half a new folder, or by now the old one
        if lock is not None:
            os.close(lock)


def put_back(path: str | Path) -> None:
    """Give a folder its place back that a killed save had set aside: only where nothing can exchange two folders."""
    target = Path(path).resolve()
    if _aside(target).is_dir() and not target.exists():
        os.rename(_aside(target), target)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _must_stay(target: Path) -> bool:
    """Whether a folder cannot be exchanged for another: with mounts, a process's place, or no room beside it."""
    if not target.is_dir():
        return False
    return bool(mounts_in(target)) or somebody_stands_in(target) or not os.access(target.parent, os.W_OK)


def _new_staging(home: Path, target: Path) -> tuple[Path, int | None]:
    """Make a folder that no other save takes for a left-over: it is locked as long as this process lives."""
    while True:
        staging = home / f".{target.name}.saving-{uuid.uuid4().hex[:8]}"
        staging.mkdir()  # with the usual permissions, unlike what tempfile makes
        lock = _lock(staging, wait=True)
        if staging.is_dir():  # no other save was faster to sweep it away
            if target.is_dir() and home != target:
                copy_owner_and_mode(target, staging)
            return staging, lock


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Return a descriptor that locks a folder until it is closed or the process is gone; ``None``: not to be had."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _sweep(target: Path) -> None:
    """Remove what killed saves left: staging folders that no living process locks, and an old folder set aside."""
    pattern = f".{glob.escape(target.name)}.saving-*"
    for left in [*target.parent.glob(pattern), *target.glob(pattern)]:
        lock = _lock(left)
        if lock is not None:
            remove_tree(left)
            os.close(lock)
    if target.exists():
        remove_tree(_aside(target))


def _flush(folder: Path) -> None:
    """Wait until a folder's files are on the disk: a rename must not get there before them."""
    for place, _, names in os.walk(folder):
        for path in (*(Path(place, name) for name in names), Path(place)):
            _flush_one(path)


def _flush_one(path: Path) -> None:
    if os.name == "nt" or path.is_symlink():  # Windows flushes no folder, and no file that was opened to read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(staging: Path, target: Path, stale: Sequence[str], ours: Collection[Path]) -> None:
    """Put a finished folder where another may be, in one step; in two, or file by file, where that is not possible."""
    try:
        old = staging if target.is_dir() and _exchange(staging, target) else _replace(staging, target, stale, ours)
    except OSError as error:
        if error.errno not in _STAYS:
            raise
        inner = target / staging.name
        os.rename(staging, inner)  # if not even that is possible, nothing has been touched yet
        try:
            move_in(inner, target, stale, ours)
        finally:
            remove_tree(inner)
    else:
        bring_over(old, target, stale, ours)
        remove_tree(old)
    _flush_one(target.parent)


def _replace(staging: Path, target: Path, stale: Sequence[str], ours: Collection[Path]) -> Path:
    """Put a folder in place by renaming; again while another process puts one there in between.

    Returns:
        Where the old folder lies now, if there was one.
    """
    aside = _aside(target)
    for _ in range(10):
        try:
            os.rename(staging, target)  # there is none, or an empty one
            break
        except OSError as error:
            if error.errno not in _TAKEN or not target.is_dir():
                put_back(target)
                raise
        if aside.is_dir():
            bring_over(aside, staging, stale, ours)
            remove_tree(aside)
        os.rename(target, aside)  # killed after this, `put_back` brings it again
    else:
        put_back(target)
        raise FileExistsError(errno.EEXIST, "other processes write the same folder", str(target))
    return aside


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; false where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))
