"""Chance: numbers that depend on the seed and a name alone."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..structure import Group
from .base import Evidence, register_evidence


@register_evidence("noise")
class Noise(Evidence):
    """Uniform numbers in [0, 1): the same in every process, at every step and after a resume."""

    from_data = False
    takes = "forwards"

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return one number for each weight."""
        return torch.rand(weight.shape, generator=self._generator(name)).to(weight.device)

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return one number for each unit."""
        return torch.rand(group.units, generator=self._generator(group.name))

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
