"""Publish a pruned model: its files, its card and its numbers, in one commit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from .card import as_dict, model_card, without_tokens
from .errors import CheckpointError, PruningError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from transformers import PreTrainedModel

    from .report import Report

CARD, REPORT, PLOT = "README.md", "report.json", "kept_units.png"
# What training leaves in a folder. `training_args.bin` is a pickle and may hold a token.
_PRIVATE = (".*", "*/.*", "checkpoint-*", "runs/*", "training_args.bin", "trainer_state.json", "*.pt", "*.pth")
# A repository's older weights would be loaded instead of, or beside, the new ones.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


class PlannedFile(NamedTuple):
    """One file that a push would upload."""

    path: str
    size_bytes: int


def push_pruned(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    report: Report | Mapping[str, Any] | None = None,
    onnx: str | os.PathLike[str] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    card: Mapping[str, Any] | None = None,
) -> CommitInfo | list[PlannedFile]:
    """Upload a pruned model with its card, report, plot and ONNX files to the Hub, in one commit.

    One commit means that a failure leaves the repository as it was. Weights of an earlier push that the new ones
    replace go in the same commit, and so do older files under ``onnx/`` when `onnx` is given.

    Args:
        model: A live model, or a folder that `save_pruned` wrote. A README.md in the folder is kept as the card.
        repo_id: ``"namespace/name"``, or ``"name"`` for the token's user.
        tokenizer: Saved beside the model; any object with ``save_pretrained``, image processors too.
        report: What the card and report.json tell; by default the folder's report.json, where there is one.
        onnx: A folder whose files go under ``onnx/``.
        private: Whether a new repository is private; ``None`` leaves it to the account's default.
        token: By default the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: The branch, created where it is missing; by default ``main``.
        commit_message: Title of the commit.
        dry_run: Write and check everything, but send no request.
        card: More for `model_card`, for example ``{"license": "apache-2.0", "datasets": ["glue"]}``.

    Returns:
        The Hub client's `CommitInfo`; with `dry_run` the files that would go up, with their sizes.

    Raises:
        PruningError: A name is not valid, a folder is no model, or the Hub refused (with the client's error as cause).

    Example:
        >>> push_pruned(model, "me/small-bert", tokenizer=tokenizer, report=report)  # doctest: +SKIP
    """
    _check_name(repo_id)
    with TemporaryDirectory() as scratch:
        api = None if dry_run else _api(token)
        if api is not None and "/" not in repo_id:
            repo_id = f"{_asked(repo_id, api.whoami)['name']}/{repo_id}"
        files = _gather(model, Path(scratch), repo_id, tokenizer, report, onnx, card or {})
        if api is None:
            return [PlannedFile(name, path.stat().st_size) for name, path in sorted(files.items())]
        message = commit_message or "Upload a model pruned with hf_prune"
        return _asked(repo_id, _publish, api, repo_id, files, private, revision, message)


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="hf_prune")


def _check_name(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PruningError(f"repo_id must be 'namespace/name'. Received: {repo_id!r}.") from error


def _asked(repo_id: str, call: Any, *args: Any) -> Any:
    """Call the Hub's client; its two generations share no error type, so whatever it raises is chained."""
    try:
        return call(*args)
    except PruningError:
        raise
    except Exception as error:
        text = without_tokens(str(error)).strip()
        raise PruningError(
            f"Pushing to '{repo_id}' failed; files go up in one commit, so nothing is half-published. {text}"
        ) from error


def _publish(
    api: HfApi, repo_id: str, files: Mapping[str, Path], private: bool | None, revision: str | None, message: str
) -> CommitInfo:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise PruningError(f"'{repo_id}' exists and is public, but private=True was asked. Nothing was uploaded.")
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    older = api.list_repo_files(repo_id, revision=revision)
    operations = [
        *[CommitOperationDelete(path_in_repo=name) for name in older if name not in files and _replaced(name, files)],
        *[CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())],
    ]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _replaced(older: str, files: Mapping[str, Path]) -> bool:
    """Whether this push makes an older file stale: weights always, ONNX files where new ones come."""
    patterns = (*_WEIGHTS, "onnx/*") if any(name.startswith("onnx/") for name in files) else _WEIGHTS
    return any(fnmatch(older, pattern) for pattern in patterns)


def _gather(
    model: Any, scratch: Path, repo_id: str, tokenizer: Any, report: Any, onnx: Any, card: Mapping[str, Any]
) -> dict[str, Path]:
    """Return path in the repository -> local file; what does not exist yet is written under `scratch`."""
    folder, extra = _saved(model, scratch / "model", tokenizer), scratch / "extra"
    extra.mkdir()
    if tokenizer is not None and not folder.is_relative_to(scratch):
        tokenizer.save_pretrained(extra)
    files = _files_under(folder)
    if onnx is not None:
        files |= _files_under(Path(onnx), "onnx/")
    if report is None and REPORT in files:
        report = json.loads(files[REPORT].read_text("utf-8"))
    told = as_dict(report)
    if told.get("kept") and hasattr(report, "plot"):
        report.plot(extra / PLOT)
    if report is not None:
        (extra / REPORT).write_text(without_tokens(json.dumps(told, indent=2, default=str)), "utf-8")
    if CARD not in files:
        names = sorted({*files, *(path.name for path in extra.iterdir())})
        text = model_card(told, folder=folder, **{"repo_id": repo_id, **_card_files(names), **card})
        (extra / CARD).write_text(text, "utf-8")
    return files | _files_under(extra)


def _saved(model: Any, scratch: Path, tokenizer: Any) -> Path:
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"A folder to push must hold a saved model with its config.json. Received: {folder}.")
        return folder
    from .checkpoint import save_pruned

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
