"""Saves that are killed at chosen moments, and disks that run full: what is left in the folder afterwards?

Shared by `test_folders.py` (a few) and `benchmarks/kills.py` (hundreds). A save runs in a forked process, so that a
kill costs no import; it is a real SIGKILL, and the folder is read by this process.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from models import build_bert
from transformers.utils import logging

from hf_prune import PruningError, folders, load_pruned, save_pruned, shrink

NOTE = "notes.txt"  # a file of the user's, in a folder that is saved over again and again


@dataclass(frozen=True)
class Version:
    """One of the two models that take turns, and what its folder must be."""

    model: Any
    shard_size: str
    files: frozenset[str]

    def save(self, folder: Path) -> None:
        save_pruned(self.model, folder, max_shard_size=self.shard_size)

    def save_inside(self, folder: Path) -> None:
        """Save into the current folder, which cannot be exchanged for another."""
        os.chdir(folder)
        self.save(Path("."))

    def save_plainly(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder loads as this model, bit by bit, and holds no file of the other one."""
        loaded = load_pruned(folder, dtype=torch.float32)
        mine, theirs = self.model.state_dict(), loaded.state_dict()
        same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        return same and names_in(folder) - {"README.md"} == self.files | {NOTE}  # which plain saving writes


def names_in(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir() if not path.name.startswith("."))


def two_versions(scratch: Path, layers: int = 4, hidden: int = 128) -> tuple[Version, Version]:
    """Return two BERTs, cut differently: one is a single file, the other has shards and an index."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 2000, "num_hidden_layers": layers}
    made = []
    for seed, size in enumerate(("5GB", "1MB")):
        model = shrink(build_bert(seed=seed, **sizes), {"layers.0.mlp.neurons": range(seed, 50)})
        save_pruned(model, scratch / str(seed), max_shard_size=size)
        made.append(Version(model, size, names_in(scratch / str(seed))))
    return made[0], made[1]


@contextmanager
def without_exchange() -> Iterator[None]:
    """Take the system call away that macOS, Windows and NFS do not have."""
    real, folders._exchange = folders._exchange, lambda *_: False
    try:
        yield
    finally:
        folders._exchange = real


def run_killed(save: Callable[[], None], delay: float | None) -> tuple[float, bool]:
    """Run a save in a forked process and kill it; return how long it ran, and whether it had ended by itself."""
    ready, starts = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(starts, b"x")
            save()
            os._exit(0)
        finally:
            os._exit(1)
    os.read(ready, 1)
    start = time.perf_counter()
    watch = os.pidfd_open(child)
    ended = bool(select.select([watch], [], [], delay)[0])
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    for one in (ready, starts, watch):
        os.close(one)
    if ended and status != 0:
        raise RuntimeError(f"A save that was not killed failed with status {status}")
    return seconds, os.WIFEXITED(status)


def kill_saves(
    versions: tuple[Version, Version], folder: Path, kills: int, save: Any = Version.save, seed: int = 0
) -> dict[str, Any]:
    """Save two versions in turn over one another, each save killed at a moment of its own, and look at what is there.

    Moments are spread evenly over 0 to 1.1 times what a save takes, in random order.

    Returns:
        Counts: ``old``, ``new`` (which version the folder was, whole), ``broken`` (neither), ``half_written`` (a kill
        that left a half-written folder beside), ``ended`` (the save was faster than its kill); ``save_ms``, a median.
    """
    if save is Version.save_plainly:  # which leaves a single file beside shards: two single files, to be fair
        versions = (versions[0], replace(versions[1], shard_size="5GB", files=versions[0].files))
    logging.disable_progress_bar()  # bars share a lock with this process, which a kill would hold for ever
    versions[0].save(folder)
    (folder / NOTE).write_text("mine")
    seconds = sorted(run_killed(lambda one=versions[i % 2]: save(one, folder), None)[0] for i in range(1, 6))[2]
    now, counts, draw = 1, Counter[str](), random.Random(seed)
    for i in draw.sample(range(kills), kills):
        target = versions[1 - now]
        _, ended = run_killed(lambda target=target: save(target, folder), 1.1 * seconds * (i + 0.5) / kills)
        counts["ended"] += ended
        counts["half_written"] += bool(left_overs(folder))
        what = state_of(folder, versions[now], target)
        counts[what] += 1
        if what == "broken":
            shutil.rmtree(folder)
            versions[now].save(folder)
            (folder / NOTE).write_text("mine")
        now = 1 - now if what == "new" else now
    versions[now].save(folder)
    logging.enable_progress_bar()
    assert not left_overs(folder), "the last save removes what killed ones left"
    names = ("old", "new", "broken", "half_written", "ended")
    return {"kills": kills, "save_ms": round(1e3 * seconds, 1), **{name: counts[name] for name in names}}


def left_overs(folder: Path) -> list[Path]:
    return [*folder.parent.glob(f".{folder.name}.*"), *folder.glob(f".{folder.name}.*")]


def state_of(folder: Path, old: Version, new: Version) -> str:
    """Say which version a folder is; ``broken`` where it is neither, or does not load."""
    for name, version in (("old", old), ("new", new)):
        try:
            if version.is_in(folder):
                return name
        except (OSError, ValueError):
            continue
    return "broken"


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """Mount a file system in memory of so many bytes; yields whether this process may."""
    place.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(place)], check=True)


def fill_disks(versions: tuple[Version, Version], scratch: Path, disks: int) -> dict[str, Any] | None:
    """Save a second version where the disk has room for a little, for half of it … for all of it.

    Returns:
        Counts of ``refused`` (a clear error, the old folder loads), ``saved`` and ``broken``; ``None`` where nobody may
        mount a disk.
    """
    old, new = versions
    size = [sum(path.stat().st_size for path in (scratch / str(i)).iterdir()) for i in range(2)]
    counts: Counter[str] = Counter()
    for i in range(disks):
        with small_disk(scratch / f"disk{i}", size[0] + 100_000 + size[1] * i // (disks - 1)) as mounted:
            if not mounted:
                return None
            folder = scratch / f"disk{i}" / "model"
            old.save(folder)
            (folder / NOTE).write_text("mine")
            counts[_save_on_full(folder, old, new)] += 1
    return {"disks": disks, **{name: counts[name] for name in ("refused", "saved", "broken")}}


def _save_on_full(folder: Path, old: Version, new: Version) -> str:
    try:
        new.save(folder)
    except PruningError as error:
        clear = str(folder) in str(error) and "untouched" in str(error) and "No space left" in str(error)
        return "refused" if clear and not left_overs(folder) and old.is_in(folder) else "broken"
    return "saved" if new.is_in(folder) else "broken"
