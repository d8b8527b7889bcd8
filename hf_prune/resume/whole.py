"""Which checkpoints of a Trainer are whole: those that are not are passed over."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .joining import STATE, ZIPPED, fingerprint, is_one_of, read_plain, step_of, told_files

logger = logging.getLogger(__name__)
ASIDE = "_incomplete-"  # no glob of checkpoints finds it, and Trainer pushes nothing that begins with "_" to the Hub
_TRAINERS = (("*.safetensors", "*.bin"), ("optimizer*",), ("scheduler.pt",), ("rng_state*.pth",))


# which checkpoint
def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, and set incomplete newer ones aside.

    A process that was killed while it saved leaves an incomplete folder. It is renamed to ``_incomplete-checkpoint-N``,
    with a warning. A Trainer with a `PruningCallback`, or one that distils, does this by itself for
    ``resume_from_checkpoint=True``.

    Args:
        output_dir: The Trainer's; it need not exist.

    Returns:
        The folder; ``None``: there is none, and training starts at the beginning.

    Example:
        >>> trainer.train(resume_from_checkpoint=latest_checkpoint("out"))  # doctest: +SKIP
    """
    lacking: dict[Path, str] = {}
    _, needs = _RESUMED.get(os.path.abspath(output_dir), (None, {STATE}))
    for folder in _checkpoints(Path(output_dir)):
        fault, lack = fault_of(folder), _lack_of(folder, needs)
        if fault is None and lack is None:
            for newer, why in lacking.items():
                set_aside(newer, why)
            return folder
        if fault is None and all(any(_present(folder, one) for one in needed) for needed in _TRAINERS):
            lacking[folder] = str(lack)
        else:
            set_aside(folder, str(fault or lack))
    return next(iter(lacking), None)  # nothing better is left: its zeros may tell its masks


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    found = [(step, path) for path in output_dir.glob("checkpoint-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


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


def resume_from_whole_ones(args: Any, *needs: str) -> None:
    """Let ``resume_from_checkpoint=True`` of a Trainer with these arguments pass over incomplete checkpoints.

    The Trainer picks the folder before any event, and its constructor is too early: another process may be writing.

    Args:
        args: The Trainer's.
        needs: Files of parts without which a checkpoint is passed over, where another has them.
    """
    from transformers import trainer

    place = os.path.abspath(args.output_dir)
    known, others = _RESUMED.get(place, (None, set()))
    _RESUMED[place] = args, {*needs, *(others if known is args else ())}
    original = getattr(trainer, "get_last_checkpoint", None)
    if original is None or hasattr(original, "_hf_prune"):
        return

    @functools.wraps(original)
    def get_last_checkpoint(folder: str) -> str | None:
        args, _ = _RESUMED.get(os.path.abspath(folder), (None, None))
        if args is None:
            return original(folder)  # type: ignore[no-any-return]
        with args.main_process_first(local=args.save_on_each_node, desc="checking checkpoints"):
            latest = latest_checkpoint(folder)
        return None if latest is None else str(latest)

    get_last_checkpoint._hf_prune = True  # type: ignore[attr-defined]
    trainer.get_last_checkpoint = get_last_checkpoint


_RESUMED: dict[str, tuple[Any, set[str]]] = {}  # output folders of Trainers that we join, and what these need


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
    if step_of(folder) not in (None, step):
        return f"trainer_state.json is of step {step}"
    for path in sorted(folder.iterdir()):
        if path.name != STATE and _is_cut_off(path):
            return f"{path.name} is cut off"
    there = fingerprint(folder)
    for name, print_ in told_files(folder).items():
        if there.get(name) != print_:
            return f"{name} is {'of another save' if name in there else 'missing'}"
    return None


def check_resumable(folder: Path) -> None:
    """Refuse to resume from a checkpoint that is not whole.

    Raises:
        CheckpointError: Says which file is missing, cut off or of another save.
    """
    fault = fault_of(folder)
    if fault is not None:
        raise CheckpointError(f"{folder} is not whole: {fault}. Resume from an older checkpoint.")


def _lack_of(folder: Path, needs: Collection[str]) -> str | None:
    """Return which part a checkpoint lacks; ``None``: it has all of them."""
    for name in sorted(needs):
        lack = state_fault_of(folder) if name == STATE else None if (folder / name).is_file() else f"{name} is missing"
        if lack is not None:
            return lack
    return None


def state_fault_of(folder: Path) -> str | None:
    """Return why the pruning state of a checkpoint cannot be read; ``None``: it can."""
    try:
        read_plain(folder / STATE)
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
    return is_one_of(path, ZIPPED) and path.is_file() and not zipfile.is_zipfile(path)
