"""Which files a push takes along, and those that it writes for the occasion."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..card import (
    CARD,
    PLOT,
    RECIPE,
    REPORT,
    as_dict,
    draw_plot,
    earlier_facts,
    find_report,
    inherited_license,
    may_replace,
    model_card,
    read_config,
)
from ..errors import CheckpointError
from ..files import without_config
from ..secrets import without_secrets
from .choosing import choose, refuse_tokens, without_foreign_code

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


class PlannedFile(NamedTuple):
    """One file that a push would upload."""

    path: str
    size_bytes: int


class Plan(list[PlannedFile]):
    """The files that a push would upload.

    Args:
        files: Path in the repository and size of each.
        left: What stays at home: name -> why.
        repo_id: The repository.
        card: Its README, as it would be there.
    """

    def __init__(
        self, files: Iterable[PlannedFile], left: Mapping[str, str], repo_id: str = "", card: str = ""
    ) -> None:
        super().__init__(files)
        self.left, self.repo_id, self.card = dict(left), repo_id, card


class Gathered(NamedTuple):
    """What a push takes along: path in the repository -> local file; what stays, and why; the model's own folder."""

    files: dict[str, Path]
    left: dict[str, str]
    folder: Path


def gather(
    model: Any,
    scratch: Path,
    repo_id: str,
    tokenizer: Any,
    report: Any,
    onnx: Any,
    card: Mapping[str, Any],
    api: HfApi | None,
) -> Gathered:
    """Choose the files of a model's folder, and write what does not exist yet under `scratch`."""
    folder, extra = _saved(model, scratch / "model", tokenizer), scratch / "extra"
    extra.mkdir()
    if tokenizer is not None and not folder.is_relative_to(scratch):
        tokenizer.save_pretrained(extra)
    files, left = choose(folder)
    if onnx is not None:
        exported = choose(Path(onnx), "onnx/")
        files, left = files | exported.files, left | exported.left
    told = as_dict(report) or find_report(folder) or {}
    _write_report(told, files, extra)
    if not told and REPORT in files:
        del files[REPORT]
        left[REPORT] = "not a report"
    _write_configs(files, folder, extra)
    older = files[CARD].read_text("utf-8") if CARD in files else ""
    if not older or may_replace(older):
        names = sorted({*files, *(path.name for path in extra.iterdir())})
        facts = {"repo_id": repo_id, **_card_files(names), **earlier_facts(older), **card}
        facts = _with_license(facts, told, folder, api)
        (extra / CARD).write_text(model_card(told, folder=folder, **facts), "utf-8")
    written = choose(extra)
    files |= written.files
    refuse_tokens(files)
    return Gathered(files, {name: why for name, why in (left | written.left).items() if name not in files}, folder)


def onnx_beside(folder: Path) -> Path | None:
    """Return the ONNX export that the same run wrote beside a saved model, where there is one."""
    home = folder.absolute().parent
    ours = not (folder / REPORT).is_file() and find_report(folder) is not None
    onnx = home / "onnx"
    return onnx if ours and onnx.is_dir() and not onnx.is_symlink() else None


def _write_report(told: Mapping[str, Any], files: Mapping[str, Path], extra: Path) -> None:
    """Write report.json, the plot and the recipe that the report knows and the folder lacks."""
    if not told:
        return
    (extra / REPORT).write_text(without_secrets(json.dumps(told, indent=2, default=str)), "utf-8")
    draw_plot(told, extra / PLOT)
    recipe = (told.get("settings") or {}).get("recipe_yaml")
    if isinstance(recipe, str) and RECIPE not in files:
        (extra / RECIPE).write_text(without_secrets(recipe), "utf-8")


def _write_configs(files: Mapping[str, Path], folder: Path, extra: Path) -> None:
    """Write those configs again that lead to code elsewhere: whoever trusts our code must not run a stranger's."""
    for name in _CONFIGS:
        own = without_foreign_code(folder, name) if files.get(name) == folder / name else None
        if own is not None and (own.get("pruning_config") or {}).get("digests"):
            raise CheckpointError(
                "auto_map must name files of the folder itself: save the model again with save_pruned. "
                f"Received: other code in {name}, which has a digest"
            )
        if own is not None:
            (extra / name).write_text(json.dumps(own, indent=2) + "\n", "utf-8")


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
        if why := without_config(folder) if folder.is_dir() else "there is no such folder":
            raise CheckpointError(f"A folder to push must hold a saved model. Received: '{folder}': {why}.")
        return folder
    from ..checkpoint import save_pruned

    save_pruned(model, scratch, tokenizer=tokenizer)
    return scratch


def _card_files(names: Sequence[str]) -> dict[str, Any]:
    models = [name for name in names if name.endswith(".onnx")]
    return {"plot": PLOT if PLOT in names else None, "onnx": models, "tokenizer": "tokenizer_config.json" in names}
