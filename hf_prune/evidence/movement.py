"""How far training has moved each weight away from zero."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..live import Cut, Masking
from ..sharding import join, local
from .base import MissingEvidence, register_evidence
from .gradient import Gradients


@register_evidence("movement")
class Movement(Gradients):
    """The sum of ``-w * dL/dw`` over all steps so far; of a masked weight, w is its last value.

    Sanh, Wolf and Rush 2020, arXiv:2005.07683.
    """

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

    @torch.no_grad()
    def read(self, masking: Masking, ahead: Collection[str]) -> None:
        """Add what these gradients say."""
        tensors = self.live.tensors
        for name in (one for one in self.weights if one in ahead):
            full, gradient = masking.full(name, tensors[name]), local(self.of_part(name, tensors[name]))
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(full, dtype=torch.float32)
            self.sums[name].addcmul_(full.float(), gradient.float(), value=-1 / self.scale)

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
