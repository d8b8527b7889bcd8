"""CodeGen: the fused projection lies as four shards, each with the queries, the values and the keys of its heads."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..structure import Slice
from .finder import Found, by_convention

SHARDS = 4


def codegen(model: nn.Module) -> Found:
    """Return the conventional groups; each shard keeps equally many heads."""
    found = by_convention(model)
    for i, group in enumerate(found.groups):
        if group.kind != "head" or not group.units:
            continue
        fused, output = group.slices[0], group.slices[-1]
        size, local = output.per_unit, output.per_unit * group.units // SHARDS
        rows = [Slice(fused.parameter, 0, size, third * local, 3 * local) for third in range(3)]
        found.groups[i] = replace(group, slices=(*rows, output), parts=SHARDS, least=SHARDS)
    return found
