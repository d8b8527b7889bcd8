"""The Trainer that distillation is put before: whether it can be, and how its own loss is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from ..errors import PruningError

_WRITES = "it writes the texts that it learns from itself; let the teacher teach on texts, with SFTTrainer"
_TEACHES = "it has a teacher of its own; use it as it is, or put DistillationMixin before SFTTrainer"
_REFUSED = {
    **dict.fromkeys(
        (
            "GRPOTrainer", "RLOOTrainer", "AsyncGRPOTrainer", "A2POTrainer", "PPOTrainer", "OnlineDPOTrainer",
            "XPOTrainer", "NashMDTrainer",
        ),
        _WRITES,
    ),
    **dict.fromkeys(
        (
            "DistillationTrainer", "AsyncDistillationTrainer", "ServerDistillationTrainer", "GKDTrainer", "GOLDTrainer",
            "MiniLLMTrainer", "SDFTTrainer", "SDPOTrainer", "IWOPDTrainer",
        ),
        _TEACHES,
    ),
}  # fmt: skip


def check_trainer(trainer: type) -> None:
    """Refuse a class that distillation cannot be put before.

    Raises:
        PruningError: It is no Trainer of transformers, or one whose loss a teacher cannot be added to.
    """
    if not issubclass(trainer, Trainer):
        others = [one.__name__ for one in trainer.__mro__[2:-1]]
        raise PruningError(
            "DistillationMixin goes before transformers.Trainer or a class made from it. "
            f"Received: {', '.join(others) or 'none'}"
        )
    for one in trainer.__mro__:
        if one.__name__ in _REFUSED and not one.__module__.startswith("hf_prune."):
            raise PruningError(
                f"{one.__name__} cannot learn from a teacher beside its own loss: {_REFUSED[one.__name__]}. "
                f"Received: {one.__module__}.{one.__name__}"
            )


@contextmanager
def having(target: Any, **values: Any) -> Iterator[None]:
    """Let an object have other attributes for a while."""
    before = {name: getattr(target, name, None) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
