"""Units of a kind of one's own, in a model of one's own, and the pruner that removes them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from hf_prune import Group, Slice, register_architecture, register_kind, register_pruner
from hf_prune.kinds import KindTraits
from hf_prune.pruners import UnitPruner
from hf_prune.settings import settings

register_kind("bottleneck", KindTraits("bottlenecks", zeros_tell=True, may_return=True, gate="input"))


class Squeeze(nn.Module):
    """Two narrow blocks."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))

    def forward(self, inputs, labels):
        for down, up in zip(self.down, self.up):
            inputs = inputs + up(torch.tanh(down(inputs)))
        return SimpleNamespace(loss=(inputs - labels).square().mean())


@register_architecture("Squeeze")
def bottlenecks_of_squeeze(model):
    """A row of `down`, a column of `up`."""
    slices = [
        (Slice(f"down.{i}.weight", 0, 1), Slice(f"down.{i}.bias", 0, 1), Slice(f"up.{i}.weight", 1, 1))
        for i in range(2)
    ]
    return [
        Group(f"blocks.{i}.bottlenecks", "bottleneck", len(model.down[i].bias), mine) for i, mine in enumerate(slices)
    ]


@register_pruner("bottlenecks")
@settings()
class BottleneckPruner(UnitPruner):
    """Remove bottlenecks."""

    def kinds(self, groups):
        return ("bottleneck",)
