"""Gradients of weights, of one step or of calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sharding import whole
from ..skipping import is_skipped
from .base import Evidence, MissingEvidence, register_evidence


@register_evidence("gradient")
class Gradients(Evidence):
    """The gradient of the loss, as it is on the parameters now."""

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return the gradient of a parameter in float32; zeros where no forward reaches it.

        Raises:
            MissingEvidence: There is none.
        """
        return whole(self.of_part(name, weight)).float() / self.scale

    def of_part(self, name: str, weight: Tensor) -> Tensor:
        """Return the gradient as it is: sharded like its parameter, and `scale` times too large.

        Raises:
            MissingEvidence: There is none.
        """
        if weight.grad is None and not self._skipped(name):
            raise MissingEvidence(
                f"the gradient of '{name}', which is None: call after_backward() between backward() and "
                "optimizer.step(), or pass data=."
            )
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    def _skipped(self, name: str) -> bool:
        """Whether a parameter lies in a module that no forward reaches: a masked layer."""
        parts = name.split(".")
        return any(is_skipped(self.live.model.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts)))
