"""Which files a push takes along, and those that it writes for the occasion."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..card import (
    CARD,
    PLOT,
    RECIPE,
    REPORT,
    as_dict,
    earlier_facts,
    find_report,
    inherited_license,
    may_replace,
    model_card,
    read_config,
    without_tokens,
)
from ..errors import CheckpointError, PruningError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What training leaves in a folder. `training_args.bin` is a pickle and may hold a token.
_PRIVATE = (".*", "*/.*", "checkpoint-*", "runs/*", "training_args.bin", "trainer_state.json", "*.pt", "*.pth")


class PlannedFile(NamedTuple):
    """One file that a push would upload."""

    path: str
    size_bytes: int


def gather(
    model: Any,
    scratch: Path,
    repo_id: str,
    tokenizer: Any,
    report: Any,
    onnx: Any,
    card: Mapping[str, Any],
    api: HfApi | None,
) -> dict[str, Path]:
    """Return path in the repository -> local file; what does not exist yet is written under `scratch`."""
    folder, extra = _saved(model, scratch / "model", tokenizer), scratch / "extra"
    extra.mkdir()
    if tokenizer is not None and not folder.is_relative_to(scratch):
        tokenizer.save_pretrained(extra)
    files = _files_under(folder)
    if onnx is not None:
        files |= _files_under(Path(onnx), "onnx/")
    told = as_dict(report) or find_report(folder) or {}
    _write_report(told, files, extra)
    older = files[CARD].read_text("utf-8") if CARD in files else ""
    if not older or may_replace(older):
        names = sorted({*files, *(path.name for path in extra.iterdir())})
        facts = {"repo_id": repo_id, **_card_files(names), **earlier_facts(older), **card}
        facts = _with_license(facts, told, folder, api)
        (extra / CARD).write_text(model_card(told, folder=folder, **facts), "utf-8")
    return files | _files_under(extra)


def onnx_beside(folder: Path) -> Path | None:
    """Return the ONNX export that the same run wrote beside a saved model, where there is one."""
    home = folder.absolute().parent
    ours = not (folder / REPORT).is_file() and find_report(folder) is not None
    return home / "onnx" if ours and (home / "onnx").is_dir() else None


def _write_report(told: Mapping[str, Any], files: Mapping[str, Path], extra: Path) -> None:
    """Write report.json, the plot and the recipe that the report knows and the folder lacks."""
    from ..report import Report

    if not told:
        return
    (extra / REPORT).write_text(without_tokens(json.dumps(told, indent=2, default=str)), "utf-8")
    if told.get("kept"):
        Report.from_dict(told).plot(extra / PLOT)
    recipe = (told.get("settings") or {}).get("recipe_yaml")
    if recipe and RECIPE not in files:
        (extra / RECIPE).write_text(without_tokens(recipe), "utf-8")


def _with_license(facts: dict[str, Any], told: Mapping[str, Any], folder: Path, api: HfApi | None) -> dict[str, Any]:
    """Add the dense model's license where nobody has named one; a dry run asks nobody on the Hub."""
    settings = told.get("settings") or {}
    if facts.get("license") or settings.get("license"):
        return facts
    recorded = (read_config(folder).get("pruning_config") or {}).get("base_model")
    base = facts.get("base_model") or settings.get("base_model") or recorded
    if api is None and not Path(base or "").is_dir():
        return facts
    token = api.token if api is not None and isinstance(api.token, str) else None
    return {**facts, **inherited_license(base, token=token)}


def _saved(model: Any, scratch: Path, tokenizer: Any) -> Path:
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"A folder to push must hold a saved model with its config.json. Received: {folder}.")
        return folder
    from ..checkpoint import save_pruned

    save_pruned(model, scratch, tokenizer=tokenizer)
    return scratch


def _files_under(folder: Path, prefix: str = "") -> dict[str, Path]:
    if not folder.is_dir():
        raise PruningError(f"The files to push must lie in a folder. Received: {folder}.")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {prefix + n: path for n, path in found.items() if not any(fnmatch(n, pattern) for pattern in _PRIVATE)}


def _card_files(names: Sequence[str]) -> dict[str, Any]:
    models = [name for name in names if name.endswith(".onnx")]
    return {"plot": PLOT if PLOT in names else None, "onnx": models, "tokenizer": "tokenizer_config.json" in names}
