"""Read a published commit back, and compare it with what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ..card import read_config
from ..checkpoint import load_pruned, saved_class
from ..errors import CheckpointError
from ..files import sha256_of
from .sending import patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def compare(api: HfApi, repo_id: str, commit: str, files: Mapping[str, Path], folder: Path) -> None:
    """Download a commit into an empty cache, and compare every file and the loaded model's tensors.

    Args:
        api: The client that pushed, with its token.
        repo_id: Repository.
        commit: What was published.
        files: Path in the repository -> what was sent.
        folder: The model's own folder.

    Raises:
        CheckpointError: A file is missing or differs, or the model that loads has other tensors.
    """
    with TemporaryDirectory() as cache:
        there = Path(patiently(lambda: api.snapshot_download(repo_id, revision=commit, cache_dir=cache)))
        wrong = [name for name, path in files.items() if not _same_file(there / name, path)]
        if wrong:
            raise CheckpointError(
                f"'{repo_id}' at {commit} must hold the files that were sent. Received: others for "
                f"{', '.join(sorted(wrong)[:8])}"
            )
        _compare_models(there, folder, f"'{repo_id}' at {commit}")


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and sha256_of(one) == sha256_of(other)


def _compare_models(there: Path, here: Path, what: str) -> None:
    """Load both folders, and compare each tensor bit by bit; code in a folder is not run: its files say enough."""
    if _is_own_code(read_config(here)):
        return
    found, meant = (
        load_pruned(folder, model_class=saved_class(folder, {}), dtype="auto").state_dict() for folder in (there, here)
    )
    wrong = [name for name in {*found, *meant} if not _same_tensor(found.get(name), meant.get(name))]
    if wrong:
        raise CheckpointError(
            f"{what} must load with the tensors that were saved. Received: others for {', '.join(sorted(wrong)[:8])}"
        )


def _is_own_code(config: Mapping[str, Any]) -> bool:
    import transformers

    names = config.get("architectures") or ["?"]
    return bool(config.get("auto_map")) and not hasattr(transformers, str(names[0]))


def _same_tensor(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors are equal, NaN included."""
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)))
