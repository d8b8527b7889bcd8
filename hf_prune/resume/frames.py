"""What only a Trainer's own frames tell: the folder that it resumes from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ..architectures import find_groups
from ..dense import note_dense
from ..errors import CheckpointError, PruningError
from ..plan import BLOCK, Record, check_block, close_kept, decode_units, read_record
from ..removal import cut
from ..stock import write_record
from .joining import STATE, read_plain
from .whole import state_fault_of


def resumed_folder(args: Any, step: int) -> Path:
    """Return the folder that training resumes from: what the Trainer was given, or what its step says."""
    given = next((folder for frame in _frames() if (folder := _folder_given(frame))), None)
    return given or Path(args.output_dir) / f"checkpoint-{step}"


def fit_shapes(model: Any, *_: Any) -> None:
    """Cut a model to the plan of the checkpoint whose weights a Trainer is about to load into it.

    A pre-hook of the model's `load_state_dict`: no event of a Trainer comes before that.

    Raises:
        CheckpointError: The checkpoint has units that the model has lost, or no state that says how it was pruned.
    """
    loading = next((frame for frame in _frames() if frame.f_code.co_name == "_load_from_checkpoint"), None)
    folder = None if loading is None else _folder_given(loading)
    if folder is None:
        return  # another load: the best model's shapes are there already
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
        plain = read_plain(folder / STATE)
        entries = plain.get("live", plain)["record"]  # flat states know no parts
        return Record({name: (list(kept), dense) for name, (kept, dense) in entries.items()})
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError):  # a stranger's state may say anything
        path = folder / "config.json"
        block = json.loads(path.read_text(encoding="utf-8")).get(BLOCK) if path.is_file() else None
        if block is None:
            return Record()
        check_block(block)
        return Record({name: decode_units(name, text) for name, text in block.get("kept", {}).items()})


def _folder_given(frame: FrameType) -> Path | None:
    """Return the folder that a Trainer's method was given, whatever it is called there; ``None``: it was given none."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    values = [frame.f_locals.get(name) for name in names]
    if not values or not hasattr(values[0], "callback_handler"):
        return None
    return next((Path(one) for one in values[1:] if isinstance(one, (str, os.PathLike)) and os.path.isdir(one)), None)


def _frames() -> Iterator[FrameType]:
    """Yield the calls that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
