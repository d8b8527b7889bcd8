"""Batches of the caller's own data, as a graph wants them: for calibration, and to compare on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..given import told

Batch = dict[str, Tensor]
MOST = 32  # batches that are read; a DataLoader of a whole training set would calibrate for hours


def read_batches(data: Any) -> list[Batch]:
    """Return the first batches of some data, on the CPU and in float32.

    Args:
        data: Mappings from inputs to tensors or arrays, such as a DataLoader gives.

    Raises:
        PruningError: There are none, or they are something else.
    """
    rule = "data must give batches: mappings from names of inputs to tensors or arrays"
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise PruningError(f"{rule}. Received: {told(data)}.")
    batches = list(islice(data, MOST))
    for batch in batches or [None]:
        if not isinstance(batch, Mapping):
            raise PruningError(f"{rule}. Received: {told(batch) if batches else 'none'}.")
    return [_as_tensors(batch) for batch in batches]


def _as_tensors(batch: Mapping[str, Any]) -> Batch:
    """Leave out what no graph reads, such as lists of texts."""
    made: Batch = {}
    for name, value in batch.items():
        try:
            tensor = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            continue
        made[name] = tensor.float() if tensor.is_floating_point() else tensor.long()
    return made


def feed(batch: Batch, names: Sequence[str]) -> Batch:
    """Return exactly the inputs that a graph has; masks, token types and positions are made where a batch lacks them.

    Raises:
        PruningError: The batch has no such input, and it cannot be made.
    """
    full, ids = dict(batch), batch.get("input_ids")
    if ids is not None:
        mask = full.setdefault("attention_mask", torch.ones_like(ids))
        full.setdefault("token_type_ids", torch.zeros_like(ids))
        full.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    missing = [name for name in names if name not in full]
    if missing:
        raise PruningError(f"Each batch of data needs {', '.join(missing)}. Received: {', '.join(batch) or 'none'}.")
    return {name: full[name] for name in names}
