"""What joins a Trainer's checkpoints: parts, there before a checkpoint is whole, that say which files they go with."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, PruningError
from ..packing import pack, unpack

STATE = "pruning_state.safetensors"
ZIPPED = ("optimizer*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin", "adapter_model.bin")
_WRITTEN = ("*.safetensors", *ZIPPED)
_OF_OTHERS = "rng_state_*.pth"  # of several processes each writes its own, when it pleases
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SAMPLES, _BLOCK = 64, 4096
_PARTS, _FILES = "_hf_prune_parts", "hf_prune_files"


def join_checkpoints(state: Any, file: str, write: Callable[[Path], None]) -> None:
    """Let a Trainer call `write` with the folder of each checkpoint before its own state makes the folder whole.

    No event does: on_save comes when older checkpoints have been deleted already, and a kill in between would leave no
    such part at all. The pruning state comes last, whoever joins: it says which files the others have written.

    Args:
        state: The TrainerState of a run that begins.
        file: The part: one file, which `write_part` or `seal` writes.
        write: Writes it into a folder; or sees to it that it is written later, where processes must agree first.

    Raises:
        PruningError: Somebody else writes this file, such as a second callback.

    Example:
        >>> join_checkpoints(state, "gates.safetensors", lambda folder: ...)  # doctest: +SKIP
    """
    parts: dict[str, Callable[[Path], None]] = vars(state).setdefault(_PARTS, {})
    if file in parts:
        raise PruningError(
            f"A Trainer takes one callback that writes {file}: give all pruners to one PruningCallback. Received: two"
        )
    parts[file] = write
    plain = type(state).save_to_json

    def save_to_json(json_path: str) -> None:
        path = Path(json_path)
        if step_of(path.parent) is not None:
            for name in (path.name, *parts):  # of an earlier run in the same folder
                (path.parent / name).unlink(missing_ok=True)
            for _, add in sorted(parts.items(), key=lambda item: item[0] == STATE):
                add(path.parent)
        partial = path.with_suffix(".partial")
        plain(state, str(partial))
        _replace(partial, path)

    state.save_to_json = save_to_json


def leave_checkpoints(state: Any, file: str) -> None:
    """Write a part into no further checkpoint: what has ended belongs into none."""
    parts = vars(state).get(_PARTS, {})
    parts.pop(file, None)
    if not parts:
        vars(state).pop("save_to_json", None)


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint's name says; ``None``: it is no checkpoint's."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


# which files belong to one save
def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Return size and a checksum of samples of every file of tensors: what belongs to one save of a checkpoint."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != STATE and is_one_of(path, _WRITTEN)]
    return {path.name: _sample(path) for path in paths if path.is_file()}


def told_files(folder: Path) -> dict[str, Any]:
    """Return the files that the parts of a checkpoint were written beside, with their fingerprints then."""
    told: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        try:
            told |= read_plain(path)["files"] if path.name == STATE else json.loads(_metadata(path)[_FILES])
        except (CheckpointError, KeyError, ValueError, TypeError, RecursionError):
            continue  # weights tell none, and parts of older versions
    return told


def is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name fits any of these patterns."""
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _sample(path: Path) -> list[int]:
    """Read a few blocks only: gigabytes are saved while a GPU waits."""
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _BLOCK) * i // (_SAMPLES - 1))
            crc = zlib.crc32(file.read(_BLOCK), crc)
    return [size, crc]


# the files of parts
def write_part(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a part as one safetensors file, atomically, with the fingerprints of the files that are there before it.

    Args:
        tensors: What the part holds.
        path: The file, in the folder that `join_checkpoints` hands out.
    """
    files = {name: print_ for name, print_ in fingerprint(path.parent).items() if not fnmatch(name, _OF_OTHERS)}
    files.pop(path.name, None)
    _write(tensors, path, {_FILES: json.dumps(files)})


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a pruning state into a checkpoint that has all its other files, with their fingerprints."""
    write_state({**state, "files": fingerprint(folder)}, folder / STATE)


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a pruning state as one safetensors file, atomically: the old one or the new one is there at any moment."""
    plain, tensors = pack(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(tensors, path, {"state": json.dumps(plain)})


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    _replace(partial, path)


def _replace(partial: Path, path: Path) -> None:
    """Put a finished file in its place once it is on the disk."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    plain = read_plain(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return _of_old(plain, tensors) if "tensors" in plain else dict(unpack(plain, tensors))
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"The pruning state {path} cannot be read: {error}") from error


def _of_old(plain: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put together a flat state, of before sessions had parts: tensors one level deep."""
    state: dict[str, dict[str, Tensor]] = {key: {} for key in plain.pop("tensors")}
    for full, one in tensors.items():
        key, name = full.split("/", 1)
        state[key][name] = one
    return {**state, **plain}


def read_plain(path: Path) -> dict[str, Any]:
    """Read all of a pruning state but its tensors.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    from safetensors import SafetensorError

    if not path.is_file():  # a pipe would wait for ever
        raise CheckpointError(f"{path.name} is {'no file' if path.exists() else 'missing'}")
    try:
        plain = json.loads(_metadata(path)["state"])
    except (OSError, KeyError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"The pruning state {path} cannot be read: {error}") from error
    told = plain.get("clock", plain) if isinstance(plain, dict) else None  # flat states know no parts
    if not isinstance(told, dict) or not isinstance(told.get("steps"), int):
        raise CheckpointError(f"The pruning state {path} cannot be read: it does not say its steps")
    return dict(plain)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}
