"""A mask for a moment: a model that lacks some units while a block runs, and is bit for bit what it was behind it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import check_whole
from ..structure import Kept
from .masking import Masking
from .model import LiveModel

_SET_BY_SKIPPING = ("forward", "qconfig")  # attributes of modules' own


@contextmanager
def masked_for_now(live: LiveModel, kept: Kept) -> Iterator[None]:
    """Mask all but these units while the block runs; whatever ends it, the model is as it was.

    Only the tensors that lose something are copied, where they are.

    Args:
        live: The live model; no session works on it at the same time.
        kept: Group name to the live numbers of units that stay; other groups keep all.

    Raises:
        PruningError: Parameters are sharded by FSDP, or the groups and units are none of the model's.
    """
    check_whole(live.model)
    bare = copy.copy(live)
    bare.optimizer = None  # its moments stay: no step is taken here
    masking = Masking(bare)
    units = masking.units.keep(kept)
    tensors, touched = live.tensors, {name for name, _ in units.gone}
    before = {name: tensors[name].detach().clone() for name in touched}
    own = _own_attributes(live.model)
    try:
        masking.apply(units, {})
        yield
    finally:
        try:
            _put_back(live, before, own)
        except BaseException:  # Ctrl-C, right here
            _put_back(live, before, own)
            raise


def _own_attributes(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    return {
        module: {name: vars(module)[name] for name in _SET_BY_SKIPPING if name in vars(module)}
        for module in model.modules()
    }


def _put_back(live: LiveModel, before: dict[str, Tensor], own: dict[nn.Module, dict[str, Any]]) -> None:
    tensors = live.tensors
    with torch.no_grad():
        for name, value in before.items():
            tensors[name].copy_(value)
    for module, attributes in own.items():
        for name in _SET_BY_SKIPPING:
            vars(module).pop(name, None)
        vars(module).update(attributes)
