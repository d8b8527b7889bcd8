"""Send one commit to the Hub: nothing half-published, nothing twice, passing failures tried again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PruningError
from ..files import sha256_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
# A repository's older weights would be loaded instead of, or beside, the new ones.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_TRIES = 4
_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_PASSING = {408, 425, 429, 500, 502, 503, 504}
# `requests` and `httpx` (the client's two generations) share no base class; these names cover both and the sockets
_BROKEN = {"ConnectionError", "Timeout", "TransportError", "ChunkedEncodingError", "IncompleteRead"}


def publish(
    api: HfApi, repo_id: str, files: Mapping[str, Path], private: bool | None, revision: str | None, message: str
) -> CommitInfo:
    """Create what is missing on the Hub, and send all files in one commit on top of what is there now."""
    patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not patiently(lambda: api.model_info(repo_id)).private:
        raise PruningError(
            f"'{repo_id}' exists and is public, and nothing was uploaded: make it private there, or leave private out. "
            "Received: private=True"
        )
    if revision is not None and not revision.startswith("refs/pr/"):
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    found = patiently(lambda: api.model_info(repo_id, revision=revision))
    older = {sibling.rfilename for sibling in found.siblings or ()}
    gone = sorted(name for name in older if name not in files and _replaced(name, files))
    return _commit(api, repo_id, files, gone, revision, message, str(found.sha))


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path], gone: list[str], revision: str | None, message: str, head: str
) -> CommitInfo:
    """Commit on top of `head`, and on nothing else: the Hub checks that.

    So a commit that arrived, although its answer did not, cannot be applied twice, and nobody else's is overwritten.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [
        *[CommitOperationDelete(path_in_repo=name) for name in gone],
        *[CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())],
    ]

    def attempt() -> CommitInfo:
        try:
            return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head)
        except Exception:
            arrived = _arrived(api, repo_id, files, gone, revision, message, head)
            if arrived is None:
                raise
            return arrived

    return patiently(attempt)


def _arrived(
    api: HfApi, repo_id: str, files: Mapping[str, Path], gone: list[str], revision: str | None, message: str, head: str
) -> CommitInfo | None:
    """Return the commit on top of `head` that holds exactly these files, where it has come into being after all."""
    from huggingface_hub import CommitInfo
    from huggingface_hub.hf_api import RepoFile

    try:
        newest = str(api.model_info(repo_id, revision=revision).sha)
        there = {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=newest)
            if isinstance(entry, RepoFile)
        }
    except Exception:  # the Hub does not answer: whoever called knows the error that matters
        return None
    if newest == head or set(gone) & set(there):
        return None
    if any(there.get(name) not in (sha256_of(path), git_oid(path)) for name, path in files.items()):
        return None
    url = f"{api.endpoint}/{repo_id}/commit/{newest}"
    return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=newest)


def git_oid(path: Path) -> str:
    """Return the name that git gives to a file's content."""
    digest = sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _replaced(older: str, files: Mapping[str, Path]) -> bool:
    """Whether this push makes an older file stale: weights always, ONNX files where new ones come."""
    patterns = (*_WEIGHTS, "onnx/*") if any(name.startswith("onnx/") for name in files) else _WEIGHTS
    return any(fnmatch(older, pattern) for pattern in patterns)


def patiently(call: Callable[[], Result]) -> Result:
    """Call, and call again after failures that pass: server errors, too many requests, lost connections.

    The call must be safe to repeat.
    """
    for tried in range(1, _TRIES):
        try:
            return call()
        except Exception as error:
            wait = _wait_s(error, tried)
            if wait is None:
                raise
            logger.warning("The Hub failed (%s); trying again in %.0f s", type(error).__name__, wait)
            time.sleep(wait)
    return call()


def _wait_s(error: BaseException, tried: int) -> float | None:
    """Return how long to wait before the next try; ``None`` where waiting does not help."""
    patience: float = min(_WAIT_S * 2 ** (tried - 1), _LONGEST_WAIT_S)
    for one in chained(error):
        response: Any = getattr(one, "response", None)
        if response is not None:
            if response.status_code not in _PASSING:
                return None
            asked = str(response.headers.get("Retry-After", ""))
            return min(int(asked), _LONGEST_WAIT_S) if asked.isdigit() else patience
        if _BROKEN & {base.__name__ for base in type(one).__mro__}:
            return patience
    return None


def chained(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
