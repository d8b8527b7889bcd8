"""Attempts at a batch size: one that ran out of memory leaves no trace in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attempts:
    """What a Trainer's `auto_find_batch_size` does not do: it begins again with weights that were trained and masked.

    It holds a copy of the model in the CPU's memory while training runs.
    """

    def __init__(self) -> None:
        self.batch = 0
        self.weights: list[Tensor] = []
        self.forwards: list[Any] = []

    def begin(self, model: nn.Module, optimizer: Any, batch: int) -> None:
        """Keep the model as it is; or put it back if this is the next attempt of a run, with a smaller batch.

        Args:
            model: The model, not wrapped.
            optimizer: It starts without moments.
            batch: Rows of a step.
        """
        again = bool(self.weights) and batch < self.batch
        self.batch = batch
        if not again:
            self.weights = [one.detach().cpu().clone() for one in _tensors(model)]
            self.forwards = [module.__dict__.get("forward") for module in _inner(model)]
            return
        with torch.no_grad():
            for tensor, value in zip(_tensors(model), self.weights, strict=True):
                tensor.copy_(value)
                tensor.grad = None
        for module, forward in zip(_inner(model), self.forwards, strict=True):
            module.__dict__.pop("forward", None)  # of what was skipped as it was masked
            if forward is not None:
                module.__dict__["forward"] = forward
        if optimizer is not None:
            optimizer.state.clear()

    def end(self) -> None:
        """Forget the copy: what trains next is another run."""
        self.weights, self.forwards = [], []


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _inner(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module is not model]  # the root's forward is accelerate's
