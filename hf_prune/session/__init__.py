"""What happens at a step: `Pruning`, used by the callback and by loops of one's own; and one-shot `prune`."""

from __future__ import annotations

from ..sharding import unwrap
from .accuracy import AccuracyGuard
from .budgets import BUDGETS, Budget, register_budget
from .checks import check_finds_unused
from .clock import epoch_steps_of
from .guards import GUARDS, Guard, register_guard
from .older import steps_of
from .oneshot import prune, prune_under
from .parts import or_close
from .pruning import Pruning
from .recovery import recover
from .regularising import REGULARISERS, Regularisation, Regularised, register_regularisation
from .settings import PruningSettings, as_settings
from .time_budget import Time

__all__ = [
    "BUDGETS",
    "GUARDS",
    "REGULARISERS",
    "AccuracyGuard",
    "Budget",
    "Guard",
    "Pruning",
    "PruningSettings",
    "Regularisation",
    "Regularised",
    "Time",
    "as_settings",
    "check_finds_unused",
    "epoch_steps_of",
    "or_close",
    "prune",
    "prune_under",
    "recover",
    "register_budget",
    "register_guard",
    "register_regularisation",
    "steps_of",
    "unwrap",
]
