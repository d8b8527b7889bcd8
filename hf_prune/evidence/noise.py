"""Chance: numbers that depend on the seed and a name alone."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..live import Masking
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


@register_evidence("chance")
class Chance(Noise):
    """Other numbers at each step, the same in every process and after a resume."""

    steps = 0

    def read(self, masking: Masking, ahead: Collection[str]) -> None:
        """Draw anew."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how often was drawn."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        """Go on drawing from there."""
        self.steps = state["steps"]

    def _generator(self, name: str) -> torch.Generator:
        return super()._generator(f"{self.steps} {name}")
