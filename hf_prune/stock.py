"""When a stock config can say a small shape, and how: counts that are the same in every layer, and the depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import __version__
from .architectures import find_groups
from .architectures.conventions import CONFIG_COUNTS
from .architectures.site import setting
from .plan import BLOCK, FORMAT, Record, annotate, encode_units, parent_name, read_record
from .structure import Group


def write_record(model: nn.Module, record: Record, *, stock: bool = True) -> None:
    """Write the block into the model's config, and the small shape itself where a stock config can say it.

    Args:
        model: The live model.
        record: What was removed, in dense numbering.
        stock: Whether a stock config may be written.
    """
    if not record:
        return
    groups, config = find_groups(model), getattr(model, "config", None)
    kept = {name: encode_units(*units) for name, units in record.items()}
    if not hasattr(config, "model_type"):  # a module of one's own carries the block itself
        annotate(model, format=FORMAT, library_version=__version__, kept=kept)
        return
    before = read_record(model)
    stated = {group.name: {record.dense_units(group), _units_before(group, before, record)} for group in groups}
    dense = _counts(config, groups, lambda group: record.dense_units(group), stated)
    small = _counts(config, groups, lambda group: group.units, stated)
    for name, value in dense.items():
        setattr(config, name, value)
    fits = stock and _builds_shapes(model, small)
    for name, value in small.items() if fits else ():
        setattr(config, name, value)
    annotate(model, format=FORMAT, library_version=__version__, stock=fits, kept=kept)


def _units_before(group: Group, before: Record, record: Record) -> int:
    """Return how many units a group had before this cut."""
    parent = parent_name(group)
    if group.name in before:
        return len(before[group.name][0])
    if group.parts > 1 and parent in before:  # all heads of the KV groups that were left
        return record.dense_units(group) * len(before[parent][0]) // before[parent][1]
    return record.dense_units(group)


def _counts(
    config: Any, groups: Sequence[Group], units: Callable[[Group], int], stated: Mapping[str, set[int]]
) -> dict[str, int]:
    """Return config attributes for kinds whose every group has the same number of units.

    An attribute counts only if it states now what the dense model has, or what the model had before this cut.
    """
    result: dict[str, int] = {}
    for kind, attributes in CONFIG_COUNTS.items():
        mine = [group for group in groups if group.kind == kind]
        counts = {units(group) for group in mine}
        known = {number for group in mine for number in stated[group.name]}
        names = [a for a in attributes if isinstance(value := setting(config, a), int) and value in known]
        result.update(dict.fromkeys(names, counts.copy().pop()) if len(counts) == 1 else {})
    return result


def _builds_shapes(model: nn.Module, changes: Mapping[str, int]) -> bool:
    """Whether the stock class, built from the changed config, has exactly the live model's tensors."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    if hasattr(config, BLOCK):
        delattr(config, BLOCK)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            stock = type(model)(config)
    except Exception:  # a class that refuses the small config cannot say the shape: the block then does
        return False
    mine, theirs = model.state_dict(), stock.state_dict()
    return mine.keys() == theirs.keys() and all(mine[key].shape == theirs[key].shape for key in mine)
