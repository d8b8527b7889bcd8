"""What units bring: the gradient of the loss to a gate on each of them, from hooks."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..live import LiveModel
from ..structure import Group
from .base import register_evidence
from .handed import HandedOn, Place, Seen, by_sample

_NEEDS = ("gate", "gate_square", "gate_absolute")


@register_evidence(*_NEEDS)
class Gates(HandedOn):
    """Means of gate gradients, summed over batches, from hooks on the inputs of output projections.

    A gate multiplies everything that a unit hands to its output projection. Its gradient is the sum over tokens of
    activation times gradient: for each sample one number a unit. It needs no gradient of any weight.
    """

    rows = _NEEDS
    powers = (1, 2, 1)

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self._seen: dict[tuple[str, int], Tensor] = {}

    def discard(self) -> None:
        """Forget what is pending."""
        super().discard()
        self._seen = {}

    def see(self, places: list[Place], seen: Seen) -> None:
        """Add one batch, of what an output projection reads."""
        gates = by_sample(seen, _product(seen))
        for place in places:
            self._gate(place.group, 0, place.units_of(gates).sum(-1))

    def see_whole(self, group: Group, unit: int, seen: Seen, given: Tensor | None) -> None:
        """Add one batch, of what a layer changes or a branch adds."""
        self._gate(group, unit, _product(seen).flatten(1).sum(1, keepdim=True, dtype=torch.float32))

    def _gate(self, group: Group, first: int, gate: Tensor) -> None:
        """Take the gate gradients of one batch, ``(samples, units)``, of units from `first` on."""
        if (group.name, first) in self._seen:
            self.fold()  # what accumulates over batches does so as means
        self._seen[group.name, first] = gate

    @torch.no_grad()
    def fold(self) -> None:
        """Let what was seen of a batch be pending: all groups at once, where the gates are."""
        alike: dict[tuple[torch.device, int], list[tuple[str, int]]] = {}
        for key, gate in self._seen.items():
            alike.setdefault((gate.device, len(gate)), []).append(key)
        for keys in alike.values():
            found = [self._seen[key] for key in keys]
            gates = torch.cat(found, 1)
            means = torch.stack([gates, gates.square(), gates.abs()]).mean(1)
            for (name, first), mean in zip(keys, torch.split(means, [one.shape[1] for one in found], 1)):
                self.add(name, mean, first)
        self._seen = {}


def _product(seen: Seen) -> Tensor:
    """Return activation times gradient: in float32, as fp16 would underflow; bf16 has the range, and less to move."""
    value, gradient = seen.value, seen.gradient
    assert gradient is not None
    if value.dtype == gradient.dtype == torch.bfloat16:
        return value * gradient
    return (value.float() * gradient).float()
