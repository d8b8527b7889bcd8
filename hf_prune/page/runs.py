"""What a run has left in its folder, as far as it is there and sound."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..card import RECIPE, REPORT, as_dict, sound_report
from ..errors import CheckpointError, PruningError
from ..files import is_inside, read_json
from ..report import Report, Timing
from ..training_log import FILE as LOG
from ..training_log import numbers_of

SEARCH = "search.json"  # what `hf-prune search` leaves in its folder
LATENCY = "latency.json"  # what `hf-prune measure RUN --json` prints, kept in the run's folder
_LOG_PLACES = (LOG, f"checkpoints/{LOG}")
_LARGEST = 2**24  # bytes of a log or a recipe
_FORMATS = {".safetensors": "torch", ".onnx": "ONNX", ".xml": "OpenVINO", ".pte": "ExecuTorch"}
_BESIDE = (".bin", ".data", ".onnx_data", ".ptd")  # weights that such a file points to


class ModelFiles(NamedTuple):
    """One folder of weights: its name, format and size in megabytes (1e6 bytes)."""

    name: str
    format: str
    size_mb: float

    @property
    def dense(self) -> bool:
        """Whether it is the model before pruning."""
        return "dense" in self.name


@dataclass
class RunFolder:
    """A run as it can be shown.

    Args:
        folder: Where it lies.
        name: What it is called among others.
        report: What it kept and what that brought.
        log: One mapping of numbers for each row of its training log.
        files: Folders of weights.
        recipe: YAML text; empty where there is none.
        timings: Of a grid of inputs, where it was measured.
    """

    folder: Path
    name: str
    report: Report
    log: list[dict[str, float]] = field(default_factory=list)
    files: list[ModelFiles] = field(default_factory=list)
    recipe: str = ""
    timings: list[Timing] = field(default_factory=list)


def runs_in(folder: str | Path) -> list[Path]:
    """Return the folders of runs that a folder stands for: of a search, its trials that ended; else itself.

    Raises:
        PruningError: None of a search's trials has ended.
    """
    folder = Path(folder).expanduser()
    if not is_inside(folder, folder / SEARCH):
        return [folder]
    trials = sorted(path.parent for path in folder.glob(f"trials/*/{REPORT}") if is_inside(folder, path))
    if not trials:
        raise PruningError(f"RUN may be a search of which a trial has ended. Received: '{folder}', with none")
    return trials


def read_run(folder: str | Path) -> RunFolder:
    """Read a folder that `hf-prune run` wrote; what it lacks is left out.

    Args:
        folder: The run's output folder, with its report.json.

    Raises:
        PruningError: It is no such folder, or its run has not ended.
    """
    folder = Path(folder).expanduser()
    if not is_inside(folder, folder / REPORT):
        unfinished = any((folder / place).is_file() for place in _LOG_PLACES)
        why = "whose run has not ended" if unfinished else "a folder without one" if folder.is_dir() else "no folder"
        raise PruningError(
            f"RUN must be a folder that hf-prune run wrote, with its {REPORT}. Received: '{folder}', {why}"
        )
    try:
        told = as_dict(read_json(folder / REPORT))
    except CheckpointError as error:
        raise PruningError(f"RUN must hold a report that can be read: {error}") from None
    report = sound_report(told)
    if not (report.units or report.metrics or report.pruned):
        raise PruningError(f"{REPORT} must say what was kept, scored or counted. Received: '{folder / REPORT}'")
    recipe = report.settings.get("recipe_yaml") or _text(folder, f"model/{RECIPE}")
    name = folder.resolve().name
    files = sorted(_model_files(folder), key=lambda one: (not one.dense, one.format != "torch", one.name))
    return RunFolder(folder, name, report, _log(folder), files, recipe, _timings(folder))


def _text(folder: Path, name: str) -> str:
    path = folder / name
    readable = is_inside(folder, path) and path.stat().st_size <= _LARGEST
    return path.read_text("utf-8", errors="replace") if readable else ""


def _log(folder: Path) -> list[dict[str, float]]:
    """Return the numbers of each row that has a step, in the order of steps."""
    text = next(filter(None, (_text(folder, place) for place in _LOG_PLACES)), "")
    try:
        rows = [numbers_of(row) for row in csv.DictReader(text.splitlines())]
    except csv.Error:
        return []
    return sorted((row for row in rows if "step" in row), key=lambda row: row["step"])


def _model_files(run: Path) -> Iterator[ModelFiles]:
    for folder in sorted(path for path in run.iterdir() if path.is_dir() and not path.is_symlink()):
        files = [path for path in folder.iterdir() if is_inside(folder, path)]
        formats = [_FORMATS[path.suffix] for path in files if path.suffix in _FORMATS]
        weights = [path for path in files if path.suffix in (*_FORMATS, *_BESIDE)]
        if formats:
            yield ModelFiles(folder.name, formats[0], sum(path.stat().st_size for path in weights) / 1e6)


def _timings(folder: Path) -> list[Timing]:
    path = folder / LATENCY
    if not is_inside(folder, path):
        return []
    try:
        rows = read_json(path).get("timings")
        return [Timing.from_dict(row) for row in rows] if isinstance(rows, list) else []
    except PruningError:  # a redirected command that has failed leaves an empty file
        return []
