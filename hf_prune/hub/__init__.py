"""Publish a pruned model: its files, its card and its numbers, in one commit that is read back and compared."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from ..card import CARD, model_card
from ..errors import PruningError
from ..secrets import without_tokens
from .checking import compare
from .gathering import Plan, PlannedFile, gather, onnx_beside
from .sending import chained, publish

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from transformers import PreTrainedModel

    from ..report import Report

__all__ = ["Plan", "PlannedFile", "model_card", "onnx_beside", "push_pruned"]
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


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
    verify: bool = True,
    card: Mapping[str, Any] | None = None,
) -> CommitInfo | Plan:
    """Upload a pruned model with its card, report, recipe, plot and ONNX files to the Hub, in one commit.

    Only files go up that are known to be a model's: configs, safetensors, tokenizers and processors, chat templates,
    ONNX files, sentence-transformers' modules, code that the config names, license, card, report, recipe and plot. All
    else stays at home, links out of the folder too, and text with an access token in it is refused.

    One commit means that a failure leaves the repository as it was. Weights of an earlier push that the new ones
    replace go in the same commit, and so do older files under ``onnx/`` when `onnx` is given. Passing failures (5xx,
    429, a lost connection) are tried again, a few times; a commit whose answer got lost is not sent twice. Where
    somebody else's commit comes in between, the Hub refuses ours.

    Args:
        model: A live model, or a folder that `save_pruned` wrote. A README.md that a hand has written or changed is
            kept as the card; one of ours is written again, with the repository's name in it.
        repo_id: ``"namespace/name"``, or ``"name"`` for the token's user.
        tokenizer: Saved beside the model; any object with ``save_pretrained``, image processors too.
        report: What the card and report.json tell; by default the folder's report.json, or the one of the run that
            wrote the folder.
        onnx: A folder whose files go under ``onnx/``.
        private: Whether a new repository is private; ``None`` leaves it to the account's default.
        token: By default the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: The branch, created where it is missing; by default ``main``.
        commit_message: Title of the commit.
        dry_run: Write and check everything, but send no request.
        verify: Download the commit again into an empty cache, and compare every file's SHA-256 and the loaded tensors.
        card: Fields of `CardFacts`, for example ``{"license": "apache-2.0", "datasets": ["glue"]}``.

    Returns:
        The Hub client's `CommitInfo`; with `dry_run` a list of the files that would go up, with their sizes; as its
        `left` what would stay, with the reason; and as its `card` the README.

    Raises:
        CheckpointError: A folder is no model, or what came back differs from what went up.
        PruningError: A name is not valid, a file holds a token, or the Hub refused: the client's error is the cause,
            unless it holds a token.

    Example:
        >>> push_pruned(model, "me/small-bert", tokenizer=tokenizer, report=report)  # doctest: +SKIP
    """
    _check_name(repo_id)
    with TemporaryDirectory() as scratch:
        api = None if dry_run else _api(token)
        if api is not None and "/" not in repo_id:
            repo_id = f"{_asked(f'Pushing to {repo_id!r} failed.', api, api.whoami)['name']}/{repo_id}"
        files, left, folder = gather(model, Path(scratch), repo_id, tokenizer, report, onnx, card or {}, api)
        _warn_of(left)
        if api is None:
            sizes = [PlannedFile(name, path.stat().st_size) for name, path in sorted(files.items())]
            return Plan(sizes, left, repo_id, files[CARD].read_text("utf-8"))
        message = commit_message or "Upload a model pruned with hf_prune"
        failed = f"Pushing to {repo_id!r} failed; files go up in one commit, so nothing is half-published."
        done = _asked(failed, api, lambda: publish(api, repo_id, files, private, revision, message))
        if verify:
            unread = f"{done.commit_url} is published, but could not be read back to compare it."
            _asked(unread, api, lambda: compare(api, repo_id, done.oid, files, folder))
        return done


def _warn_of(left: Mapping[str, str]) -> None:
    for name, why in left.items():
        logger.log(logging.INFO if why == "not a model's file" else logging.WARNING, "%s stays here: %s", name, why)


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="hf_prune")


def _check_name(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if without_tokens(str(repo_id)) != str(repo_id):  # arguments that were mixed up
        raise PruningError("repo_id must be 'namespace/name', and token=… the access token. Received: an access token.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PruningError(f"repo_id must be 'namespace/name'. Received: {repo_id!r}.") from error


def _asked(what: str, api: HfApi, call: Callable[[], Result]) -> Result:
    """Call the Hub's client; its two generations share no error type, so whatever it raises is chained.

    A chained error is shown as it is, in every log: one that holds a token is not chained.
    """
    from huggingface_hub import get_token

    try:
        return call()
    except PruningError:
        raise
    except Exception as error:
        secrets = (api.token if isinstance(api.token, str) else None, get_token())
        chain = "\n".join(f"{one!r} {one}" for one in chained(error))
        message = PruningError(f"{what} {without_tokens(str(error), *secrets).strip()}")
        cause = error if without_tokens(chain, *secrets) == chain else None
    raise message from cause
