"""A private copy of the model that is exported, so that exporters may change what they like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import PruningError, UnsupportedModelError
from ..skipping import plain_copy


def private_model(model_or_path: Any) -> Any:
    """Return a private fp32 copy on the CPU in evaluation mode.

    Raises:
        PruningError: There is no such checkpoint, or it cannot be read.
        UnsupportedModelError: It is no transformers model.
    """
    model = _load(model_or_path) if isinstance(model_or_path, (str, Path)) else private_copy(model_or_path)
    model = model.cpu().float().eval()
    wanted = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "dtype": torch.float32}
    for name, value in wanted.items():
        if getattr(model.config, name, None):
            setattr(model.config, name, value)
    model.config.architectures = [type(model).__name__]
    return model


def _load(path: str | Path) -> Any:
    from ..checkpoint import load_pruned

    try:
        return load_pruned(path, dtype=torch.float32)
    except (OSError, ValueError) as error:  # what transformers says of names and folders that hold no model
        reason = str(error).strip().split("\n")[0]
        rule = "model_or_path must be a model, a checkpoint's folder or its name on the Hub"
        raise PruningError(f"{rule}. Received: '{path}' ({reason})") from error


def private_copy(model: Any) -> Any:
    """Copy a model without what accelerate or a device map wrapped around it."""
    from accelerate.utils import extract_model_from_parallel
    from transformers import PreTrainedModel

    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(inner, PreTrainedModel):
        rule = "Only transformers models can be exported (merge adapters first, with `merge_and_unload`)"
        raise UnsupportedModelError(f"{rule}. Received: {type(inner).__name__}.")
    return plain_copy(inner)
