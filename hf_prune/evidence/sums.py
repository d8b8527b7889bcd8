"""Sums of what gradients say of each weight, over all steps: they follow the weights wherever these go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..live import Cut
from ..sharding import join
from .base import MissingEvidence
from .gradient import Gradients


class WeightSums(Gradients):
    """One number a weight in float32, under FSDP of the local shards."""

    of_step = False
    heavy = True
    sums: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sums = {}

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return the sums of a parameter.

        Raises:
            MissingEvidence: No gradient was read yet.
        """
        if name not in self.sums:
            raise MissingEvidence(
                f"gradients of '{name}', of which none was read: call after_backward(), or pass data=."
            )
        return join(self.sums[name], weight)

    def settle(self) -> None:
        """Give the sums' memory back."""
        self.sums.clear()

    @property
    def nbytes(self) -> int:
        """Four bytes a weight."""
        return sum(one.nbytes for one in self.sums.values())

    def follow(self, cut: Cut) -> None:
        """Keep the sums of what is left."""
        super().follow(cut)
        self.sums = cut.tensors(self.sums)

    def state_dict(self) -> dict[str, Any]:
        """Return whole sums."""
        return {"sums": self.live.whole(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up whole sums."""
        self.sums = self.live.local(state["sums"])
