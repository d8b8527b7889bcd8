"""What the dense model cost: sparsities and targets mean its units, also where a model was pruned before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from .architectures import find_groups
from .plan import Record, annotate, read_block
from .stock import config_counts, stock_twin
from .structure import Group, live_shapes, matrix_entries

_LARGEST = 2.0**62  # of any number that a note can state


def note_dense(model: nn.Module, groups: Sequence[Group], record: Record) -> None:
    """Write down what a model costs before its first unit is removed.

    Args:
        model: The live model.
        groups: All of its groups.
        record: What has been removed; anything, and it is too late.
    """
    if not record:
        size_mb = sum(one.nbytes for one in model.parameters()) / 1e6
        parameters = sum(one.numel() for one in model.parameters())
        told = {"parameters": parameters, "prunable_macs": matrix_entries(groups, live_shapes(model))}
        annotate(model, dense={**told, "size_mb": round(size_mb, 6)})


def dense_note(model: nn.Module) -> dict[str, Any]:
    """Return what `note_dense` wrote; empty of a model that is dense, or that an older version has cut."""
    stated = (read_block(model) or {}).get("dense", {})
    told = {key: stated.get(key) for key in ("parameters", "prunable_macs", "size_mb")}
    sound = all(isinstance(value, (int, float)) and 0 < value < _LARGEST for value in told.values())
    return told if sound else {}  # a stranger may have written anything


def dense_macs(model: nn.Module, groups: Sequence[Group], record: Record) -> int:
    """Return the prunable multiply-accumulates of the dense model per token.

    Where no note says it, the config that a dense model would have does, and layers that are gone count as the others.
    """
    live = matrix_entries(groups, live_shapes(model))
    if not record:
        return live
    told = int(dense_note(model).get("prunable_macs", 0))
    return max(live, told or _rebuilt(model, groups, record))


def dense_twin(model: Any, groups: Sequence[Group], record: Record) -> Any | None:
    """Return a model as large as the dense one, of random weights: what it took, when that is to be timed.

    Returns:
        It, on the CPU; ``None`` where layers are gone, or the class builds another from the config.
    """
    if any(group.traits.holds_places and group.name in record for group in groups):
        return None
    try:
        twin = _twin(model, groups, record, "cpu")
    except Exception:  # as below
        return None
    parameters = dense_note(model).get("parameters")
    return twin if parameters in (None, sum(one.numel() for one in twin.parameters())) else None


def _twin(model: Any, groups: Sequence[Group], record: Record, device: str) -> Any:
    stated = {group.name: {group.units, record.dense_units(group)} for group in groups}
    return stock_twin(model, config_counts(model.config, groups, record.dense_units, stated), device)


def _rebuilt(model: Any, groups: Sequence[Group], record: Record) -> int:
    layers = [record[group.name] for group in groups if group.traits.holds_places and group.name in record]
    try:
        twin = _twin(model, groups, record, "meta")
        entries = matrix_entries(find_groups(twin), live_shapes(twin))
    except Exception:  # a module without a config, or whose class builds no twin: what is there now counts
        return 0
    return round(entries * math.prod(dense / len(kept) for kept, dense in layers))
