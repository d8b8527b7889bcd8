"""How much a layer turns what it gets."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..errors import PruningError
from ..live import LiveModel
from ..structure import Group
from .base import register_evidence
from .handed import HandedOn, Seen
from .tokens import Tokens


@register_evidence("block_influence")
class BlockInfluence(HandedOn):
    """Means over tokens of 1 minus the cosine between what a layer gets and what it returns; of maps, over samples.

    Men et al. 2024, arXiv:2403.03853.
    """

    takes = "forwards"
    rows = ("block_influence", "count")
    powers = (0, 0)
    sees_masked = False

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        other = next((group.name for group in self.watched() if group.gate != "change"), None)
        if other or weights:
            raise PruningError(
                "Score 'block_influence' compares what whole layers get and return: use LayerPruner(unit='layer'). "
                f"Received: a pruner of '{other or next(iter(weights))}'"
            )
        self._tokens = Tokens()

    def start(self) -> None:
        """Hook all layers, and the model: it is told of padding."""
        super().start()
        self.handles.append(self._tokens.watch(self.live.model))

    def see_whole(self, group: Group, unit: int, seen: Seen, given: Tensor | None) -> None:
        """Add one batch."""
        if given is None or given.shape != seen.value.shape:
            found = seen.value.new_ones(
                1, dtype=torch.float32
            )  # it cannot be compared: no such layer could be left out
        else:
            before, after = (self._flat(one) for one in (given, given + seen.value))
            found = 1 - cosine_similarity(before, after, dim=-1)
        count = torch.full_like(found[:1], len(found))
        self.add(group.name, torch.stack([found.sum(0, keepdim=True), count]), unit)

    def _flat(self, values: Tensor) -> Tensor:
        return self._tokens.flat(values) if values.ndim < 4 else values.flatten(1).float()
