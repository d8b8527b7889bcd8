"""Distillation: a Trainer that also learns from a teacher's outputs, hidden states and attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .losses import logits_loss
from .outputs import count_items, loss_rows
from .settings import Distillation
from .teacher import load_teacher

if TYPE_CHECKING:
    from .trainer import DistillationMixin, DistillationTrainer

__all__ = [
    "Distillation",
    "DistillationMixin",
    "DistillationTrainer",
    "count_items",
    "load_teacher",
    "logits_loss",
    "loss_rows",
]


def __getattr__(name: str) -> Any:
    """Import what needs Trainer when it is first asked for: importing Trainer takes seconds."""
    if name not in ("DistillationMixin", "DistillationTrainer"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from . import trainer

    return getattr(trainer, name)
