"""T5 and kin: the first layer of a stack holds the relative position bias of all its layers.

Head *u* of every layer reads column *u* of that one table, so that heads leave all layers of a stack together. Cross
attentions hand on a position bias of zeros, as wide as the first layer has heads: each makes its own instead.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..structure import Group, Slice
from .finder import Found, by_convention
from .site import Refusal

TABLE = "relative_attention_bias.weight"


def shared_position_bias(model: nn.Module) -> Found:
    """Return the conventional groups, with the heads under one table joined, and its own layer's branch refused."""
    found = by_convention(model)
    tables = [name for name, _ in model.named_parameters() if name.endswith(TABLE)]
    layers = {name[: f".{name}".index(".block.")]: name for name in tables}  # "" where the model is the stack
    if len(tables) > len(layers):
        return found  # a table in each layer: nothing is shared
    groups, joined = list[Group](), dict[str, list[Group]]()
    for group in found.groups:
        stack = next((name for name in layers if group.slices and group.slices[0].parameter.startswith(name)), None)
        mine = [part for part in group.slices if part.parameter == layers.get(stack or "")]
        if group.kind == "head" and ".cross_attention." in group.name:
            group = replace(group, arguments=(("position_bias", "none"),))
        attention = group.kind in ("head", "branch") and ".attention." in f".{group.name}."
        if not attention or stack is None:
            groups.append(group)
        elif group.kind == "branch" and mine:
            found.refusals.append(Refusal(group.place, "it computes the position bias that all layers read"))
        elif group.kind == "branch":
            groups.append(group)
        else:
            joined.setdefault(stack, []).append(group)
    found.groups = groups + [_join(parts) for parts in joined.values()]
    return found


def _join(parts: list[Group]) -> Group:
    """Return one group of heads that spans all layers of a stack."""
    before = [part for group in parts for part in group.slices[:-1]]
    outputs = tuple(group.read[0] for group in parts)
    tower = parts[0].name.split("layers.")[0]
    slices: tuple[Slice, ...] = (*before, *outputs)
    told = tuple(counter for group in parts for counter in group.counters)
    return replace(
        parts[0], name=f"{tower}attention.heads", slices=slices, counters=told, outputs=len(outputs), least=1, core=""
    )
