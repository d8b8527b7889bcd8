"""Gradients of weights, of one step or of calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sharding import whole
from .base import Evidence, MissingEvidence, register_evidence


@register_evidence("gradient")
class Gradients(Evidence):
    """The gradient of the loss, as it is on the parameters now."""

    of_step = True

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return the gradient of a parameter in float32; zeros where a backward has not reached it.

        Raises:
            MissingEvidence: There is none.
        """
        return whole(self.of_part(name, weight)).float() / self.scale

    def of_part(self, name: str, weight: Tensor) -> Tensor:
        """Return the gradient as it is: sharded like its parameter, and `scale` times too large.

        Raises:
            MissingEvidence: There is none.
        """
        if weight.grad is not None:
            return weight.grad
        reached = any(one.grad is not None for one in self.live.model.parameters())
        if not (weight.requires_grad and reached):
            raise MissingEvidence(
                f"the gradient of '{name}', which is None: call after_backward() between backward() and "
                "optimizer.step(), or pass data=."
            )
        return torch.zeros_like(weight)  # of an expert that no token was sent to, or in a masked layer
