"""The folder of a run: what marks it, and what a run may write over."""

from __future__ import annotations

from pathlib import Path

from .card import REPORT
from .errors import CheckpointError, PruningError
from .files import read_json, try_writing

RUN = ".hf_prune_run"  # an empty file that only a run writes, into its output folder


def check_run_folder(output: Path) -> None:
    """Make sure that the run can write, and that it overwrites nothing but an earlier run.

    Raises:
        PruningError: It cannot, or it would.
    """
    if output.is_dir() and any(output.iterdir()) and not _is_a_run(output):
        raise PruningError(
            f"output must be a new folder or that of an earlier run. Received: '{output}', which holds other files"
        )
    try:
        try_writing(output)
    except OSError as error:
        raise PruningError(
            f"output must be a folder that can be written. Received: '{output}' ({error.strerror})"
        ) from error


def _is_a_run(output: Path) -> bool:
    """Whether a folder is an earlier run's: it has the run's mark or, from an older version, its report."""
    if (output / RUN).is_file():
        return True
    try:
        told = read_json(output / REPORT)
    except (OSError, CheckpointError):
        return False
    settings = told.get("settings")
    return "kept" in told and isinstance(settings, dict) and "recipe_yaml" in settings
