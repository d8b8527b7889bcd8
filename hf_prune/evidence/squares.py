"""Mean squared gradients of weights: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..live import Masking
from ..sharding import any_sharded, average_over_processes, local
from .base import register_evidence
from .running import DECAY
from .sums import WeightSums


@register_evidence("gradient_square")
class GradientSquares(WeightSums):
    """The mean of ``(dL/dw)^2``: over steps while it trains, those long ago having faded; over calibration's batches.

    LeCun et al. 1989 (Optimal Brain Damage) with Fisher's diagonal for the curvature, as Theis et al. 2018,
    arXiv:1801.05787. Nothing is kept but sums: of calibration data each batch's own gradient is seen by a hook.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._count, self._calibrates = 0.0, False
        self._pending: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return the means of a parameter.

        Raises:
            MissingEvidence: No gradient was read yet.
        """
        return super().of_weight(need, name, weight) / self._count

    @torch.no_grad()
    def read(self, masking: Masking, ahead: Collection[str]) -> None:
        """Add the squares of these gradients; those of calibration data are seen batch by batch instead."""
        names = [] if self._calibrates else [name for name in self.weights if name in ahead]
        for name in names:
            gradient = local(self.of_part(name, self.live.tensors[name])).float() / self.scale
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(gradient)
            self.sums[name].mul_(DECAY).addcmul_(gradient, gradient)
        self._count = self._count * DECAY + 1 if names else self._count

    # calibration
    def reset(self) -> None:
        """Forget all: calibration data follow.

        Raises:
            PruningError: Parameters are sharded: a batch's own gradients are nowhere whole.
        """
        if any_sharded(self.live.model.parameters()):
            raise PruningError(
                "Squared gradients of calibration data need whole parameters; without data= those of training are "
                "taken. Received: a model sharded by FSDP"
            )
        self.sums, self._count, self._calibrates = {}, 0.0, True

    def start(self) -> None:
        """Watch each batch's gradients, where they are calibration's."""
        for name in self.weights if self._calibrates else ():
            tensor = self.live.tensors[name]
            if tensor.requires_grad:
                self.sums[name] = torch.zeros_like(tensor, dtype=torch.float32)
                self._handles.append(tensor.register_hook(self._watch(name)))  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def commit(self, scale: float = 1.0, *, may_overflow: bool = False) -> None:
        """Let a batch of calibration count."""
        if self._calibrates:
            for name, gradient in self._pending.items():
                gradient = gradient.float() / scale
                self.sums[name].addcmul_(gradient, gradient)
            self._count += 1
        self.discard()

    def discard(self) -> None:
        """Forget a batch."""
        self._pending = {}

    def synchronize(self) -> None:
        """Average over processes, of which each had its own calibration data; gradients of training are alike."""
        if self._calibrates:
            self.sums = {name: average_over_processes(one) for name, one in self.sums.items()}
            device = next(self.live.model.parameters()).device
            self._count = float(average_over_processes(torch.tensor(self._count, device=device)))

    def _watch(self, name: str) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            self._pending[name] = gradient.detach()

        return see

    def state_dict(self) -> dict[str, Any]:
        """Return whole sums, and of how many."""
        return {**super().state_dict(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up whole sums, and of how many."""
        super().load_state_dict(state)
        self._count = float(state["count"])
