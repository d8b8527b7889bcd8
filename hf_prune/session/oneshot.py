"""Pruning once, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import PruningError
from ..evidence import EVIDENCE
from ..given import check_model
from ..pruners import Pruner
from ..report import Report
from ..schedules import Schedule
from ..targets import Target
from .pruning import Pruning
from .settings import PruningSettings, as_settings


def prune(
    model: nn.Module,
    pruners: Pruner | Sequence[Pruner],
    *,
    target: Target | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    shrink: bool = True,
    seed: int = 0,
) -> Report:
    """Prune once, without training.

    Args:
        model: A transformers model; it is changed in place.
        pruners: What to remove.
        target: How much is to remain over all structured pruners; else each states a sparsity.
        data: Batches with labels, for scores that need gradients.
        loss: From (model, batch) to a loss; ``None``: the model's own.
        shrink: Remove units physically; ``False`` leaves them as zeros.
        seed: For scores that draw numbers.

    Returns:
        What was kept, and the model measured before and after.

    Raises:
        PruningError: A score needs data and there is none, or settings contradict each other.

    Example:
        >>> prune(model, [HeadPruner(sparsity=0.5, score="l1")])  # doctest: +SKIP
    """
    check_model(model)
    settings = as_settings(pruners, None, target, data, loss, seed=seed)
    return prune_under(model, settings).finish(shrink)


def prune_under(model: nn.Module, settings: PruningSettings, masks: Mapping[str, Tensor] | None = None) -> Pruning:
    """Prune once, without training, and return the session that holds the masks.

    Args:
        model: A transformers model; it is changed in place.
        settings: What to remove, by which data; their schedule is not asked.
        masks: Of single weights that are gone already, and count.

    Raises:
        PruningError: A score needs data and there is none, or settings contradict each other.
    """
    given = () if settings.data is None else settings.data
    told = replace(settings, schedule=Schedule("oneshot", begin=1, end=1), data=given)
    pruning = Pruning(model, told, total_steps=1, masks=masks)
    needs = {need for task in pruning.tasks for need in task.needs if EVIDENCE[need].from_data}
    if needs and settings.data is None:
        raise PruningError(
            f"data must hold batches with labels: the scores need {', '.join(sorted(needs))}. Received: None"
        )
    try:
        pruning.step()
    finally:
        pruning.close()  # a score may have failed
    return pruning
