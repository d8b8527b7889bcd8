"""Checkpoints that survive a kill: which of them are whole, what state of pruning they hold, and of what shapes."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .architectures import find_groups
from .dense import note_dense
from .errors import CheckpointError, PruningError
from .plan import BLOCK, Record, check_block, close_kept, decode_units, read_record
from .removal import cut
from .stock import write_record

logger = logging.getLogger(__name__)
STATE = "pruning_state.safetensors"
ASIDE = "_incomplete-"  # no glob of checkpoints finds it, and Trainer pushes nothing that begins with "_" to the Hub
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ZIPPED = ("optimizer*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin", "adapter_model.bin")
_WRITTEN = ("*.safetensors", *_ZIPPED)
_NEEDED = (("*.safetensors", "*.bin"), ("optimizer*",), ("scheduler.pt",), ("rng_state*.pth",))
_SAMPLES, _BLOCK = 64, 4096


# which checkpoint
def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, and set incomplete newer ones aside.

    A process that was killed while it saved leaves an incomplete folder. It is renamed to ``_incomplete-checkpoint-N``,
    with a warning. A Trainer with a `PruningCallback` does this by itself for ``resume_from_checkpoint=True``.

    Args:
        output_dir: The Trainer's; it need not exist.

    Returns:
        The folder; ``None``: there is none, and training starts at the beginning.

    Example:
        >>> trainer.train(resume_from_checkpoint=latest_checkpoint("out"))  # doctest: +SKIP
    """
    without_state: list[Path] = []
    for folder in _checkpoints(Path(output_dir)):
        fault = fault_of(folder)
        if fault is not None:
            set_aside(folder, fault)
        elif state_fault_of(folder) is None:
            for newer in without_state:
                set_aside(newer, str(state_fault_of(newer)))
            return folder
        elif all(any(_present(folder, one) for one in needed) for needed in _NEEDED):
            without_state.append(folder)
        else:
            set_aside(folder, str(state_fault_of(folder)))
    return without_state[0] if without_state else None  # nothing better is left: its zeros may tell its masks


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _step(path))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def _step(folder: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(folder.name)


def _present(folder: Path, pattern: str) -> bool:
    return any(path.name not in (STATE, "training_args.bin") for path in folder.glob(pattern))


def set_aside(folder: Path, why: str) -> None:
    """Rename a checkpoint that is not whole, so that nothing resumes from it; an older one of its step is replaced."""
    aside = folder.with_name(ASIDE + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    logger.warning(
        f"{folder} is not whole: {why}. It was renamed to {aside.name} and can be deleted; training resumes from the "
        "checkpoint before it."
    )


def resume_from_whole_ones(args: Any) -> None:
    """Let ``resume_from_checkpoint=True`` of a Trainer with these arguments pass over incomplete checkpoints.

    The Trainer picks the folder before any event, and its constructor is too early: another process may be writing.
    """
    from transformers import trainer

    _RESUMED[os.path.abspath(args.output_dir)] = args
    original = getattr(trainer, "get_last_checkpoint", None)
    if original is None or hasattr(original, "_hf_prune"):
        return

    @functools.wraps(original)
    def get_last_checkpoint(folder: str) -> str | None:
        args = _RESUMED.get(os.path.abspath(folder))
        if args is None:
            return original(folder)  # type: ignore[no-any-return]
        with args.main_process_first(local=args.save_on_each_node, desc="checking checkpoints"):
            latest = latest_checkpoint(folder)
        return None if latest is None else str(latest)

    get_last_checkpoint._hf_prune = True  # type: ignore[attr-defined]
    trainer.get_last_checkpoint = get_last_checkpoint


_RESUMED: dict[str, Any] = {}  # output folders of Trainers that have our callback


# whether it is whole
def fault_of(folder: Path) -> str | None:
    """Return which file of a checkpoint is missing, cut off or of another save; ``None``: it is whole.

    Whether it has a pruning state is another question: `state_fault_of`.
    """
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except OSError:
        return "trainer_state.json, which a Trainer writes last, is missing"
    except (ValueError, KeyError, TypeError):
        return "trainer_state.json is cut off"
    if (match := _step(folder)) and int(match[1]) != step:
        return f"trainer_state.json is of step {step}"
    for path in sorted(folder.iterdir()):
        if path.name != STATE and _is_cut_off(path):
            return f"{path.name} is cut off"
    told = {} if state_fault_of(folder) else _read_plain(folder / STATE).get("files", {})
    there = fingerprint(folder)
    for name, print_ in told.items():
        if there.get(name) != print_:
            return f"{name} is {'of another save' if name in there else 'missing'}"
    return None


def state_fault_of(folder: Path) -> str | None:
    """Return why the pruning state of a checkpoint cannot be read; ``None``: it can."""
    try:
        _read_plain(folder / STATE)
    except CheckpointError as error:
        return str(error)
    return None


def _is_cut_off(path: Path) -> bool:
    """Whether a file of tensors ends too early; both formats tell from a few bytes."""
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return False
        except (OSError, SafetensorError):
            return True
    return _is_one_of(path, _ZIPPED) and path.is_file() and not zipfile.is_zipfile(path)


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Return size and a checksum of samples of every file of tensors: what belongs to one save of a checkpoint."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != STATE and _is_one_of(path, _WRITTEN)]
    return {path.name: _sample(path) for path in paths if path.is_file()}


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _sample(path: Path) -> list[int]:
    """Read a few blocks only: gigabytes are saved while a GPU waits."""
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _BLOCK) * i // (_SAMPLES - 1))
            crc = zlib.crc32(file.read(_BLOCK), crc)
    return [size, crc]


# what it holds
def complete_checkpoints(state: Any, write: Callable[[Path], None]) -> None:
    """Let a Trainer call `write` with the folder of each checkpoint before its own state makes the folder whole.

    No event does: on_save comes when older checkpoints have been deleted already, and a kill in between would leave no
    state of pruning at all.

    Args:
        state: The TrainerState of a run that begins.
        write: Adds the pruning state to a folder.
    """
    plain = type(state).save_to_json

    def save_to_json(json_path: str) -> None:
        path = Path(json_path)
        if _step(path.parent):
            path.unlink(missing_ok=True)  # of an earlier run in the same folder
            write(path.parent)
        partial = path.with_suffix(".partial")
        plain(state, str(partial))
        _replace(partial, path)

    state.save_to_json = save_to_json


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a pruning state as one safetensors file, atomically: the old one or the new one is there at any moment."""
    from safetensors.torch import save_file

    named = {key: value for key, value in state.items() if _holds_tensors(value)}
    tensors = {f"{key}/{name}": one.contiguous() for key, value in named.items() for name, one in value.items()}
    plain = {key: value for key, value in state.items() if key not in named}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"state": json.dumps({**plain, "tensors": sorted(named)})})
    _replace(partial, path)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(torch.is_tensor(one) for one in value.values())


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

    plain = _read_plain(path)
    state: dict[str, dict[str, Tensor]] = {key: {} for key in plain.pop("tensors")}
    try:
        with safe_open(path, "pt") as file:
            for full in file.keys():  # noqa: SIM118  not a dict
                key, name = full.split("/", 1)
                state[key][name] = file.get_tensor(full)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The pruning state {path} cannot be read: {error}") from error
    return {**state, **plain}


def _read_plain(path: Path) -> dict[str, Any]:
    """Read all of a pruning state but its tensors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # a pipe would wait for ever
        raise CheckpointError(f"{path.name} is {'no file' if path.exists() else 'missing'}")
    try:
        with safe_open(path, "pt") as file:
            plain = json.loads((file.metadata() or {})["state"])
    except (OSError, KeyError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"The pruning state {path} cannot be read: {error}") from error
    sound = isinstance(plain, dict) and isinstance(plain.get("steps"), int) and isinstance(plain.get("tensors"), list)
    if not sound:
        raise CheckpointError(f"The pruning state {path} cannot be read: it does not say its steps")
    return dict(plain)


# from a Trainer's own frames
def resumed_folder(args: Any, step: int) -> Path:
    """Return the folder that training resumes from: what the Trainer was given, or what its step says."""
    given = _local_of("_inner_training_loop", "resume_from_checkpoint")
    return Path(given) if isinstance(given, (str, Path)) else Path(args.output_dir) / f"checkpoint-{step}"


def fit_shapes(model: Any, *_: Any) -> None:
    """Cut a model to the plan of the checkpoint whose weights a Trainer is about to load into it.

    A pre-hook of the model's `load_state_dict`: no event of a Trainer comes before that.

    Raises:
        CheckpointError: The checkpoint has units that the model has lost, or no state that says how it was pruned.
    """
    given = _first_given_to("_load_from_checkpoint")
    if not isinstance(given, (str, Path)):
        return  # another load: the best model's shapes are there already
    folder = Path(given)
    record, live = _record_of(folder), read_record(model)
    if not record or record == live:
        return
    lacking = state_fault_of(folder)
    if lacking is not None:
        raise CheckpointError(
            f"{folder} is smaller than the model, and does not say how far pruning was: {lacking}. Resume from an "
            "older checkpoint, or start again."
        )
    groups = find_groups(model)
    try:
        kept = close_kept(groups, live.to_live(groups, {name: units for name, (units, _) in record.items()}))
    except PruningError as error:
        raise CheckpointError(f"{folder} does not fit the model, which must not be smaller: {error}") from error
    note_dense(model, groups, live)
    cut(model, groups, kept)
    write_record(model, record)


def _record_of(folder: Path) -> Record:
    """Return what a checkpoint's model has lost, by its pruning state, or by its config where that cannot be read."""
    try:
        entries = _read_plain(folder / STATE)["record"]
        return Record({name: (list(kept), dense) for name, (kept, dense) in entries.items()})
    except CheckpointError:
        path = folder / "config.json"
        block = json.loads(path.read_text(encoding="utf-8")).get(BLOCK) if path.is_file() else None
        if block is None:
            return Record()
        check_block(block)
        return Record({name: decode_units(name, text) for name, text in block.get("kept", {}).items()})


def _first_given_to(function: str) -> Any:
    """Return what the innermost call of a method was given first, whatever it is called there."""
    frame = _frame_of(function)
    return None if frame is None else frame.f_locals.get(frame.f_code.co_varnames[1])  # after self


def _local_of(function: str, name: str) -> Any:
    """Return a local variable of the innermost call of a function: of some things only a Trainer's own frame tells."""
    frame = _frame_of(function)
    return frame.f_locals.get(name) if frame is not None else None


def _frame_of(function: str) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame
