"""How far training has moved each weight away from zero."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..live import Masking
from ..sharding import local
from .base import register_evidence
from .sums import WeightSums


@register_evidence("movement")
class Movement(WeightSums):
    """The sum of ``-w * dL/dw`` over all steps so far; of a masked weight, w is its last value.

    Sanh, Wolf and Rush 2020, arXiv:2005.07683.
    """

    @torch.no_grad()
    def read(self, masking: Masking, ahead: Collection[str]) -> None:
        """Add what these gradients say."""
        tensors = self.live.tensors
        for name in (one for one in self.weights if one in ahead):
            full, gradient = masking.full(name, tensors[name]), local(self.of_part(name, tensors[name]))
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(full, dtype=torch.float32)
            self.sums[name].addcmul_(full.float(), gradient.float(), value=-1 / self.scale)
