"""What happens at a step: `Pruning`, used by the callback and by loops of one's own; and one-shot `prune`."""

from __future__ import annotations

from ..sharding import unwrap
from .budgets import BUDGETS, Budget, register_budget
from .checks import check_finds_unused, check_when_and_how_much
from .guards import GUARDS, Guard, register_guard
from .older import steps_of
from .oneshot import prune
from .pruning import Pruning
from .recovery import recover
from .settings import PruningSettings

__all__ = [
    "BUDGETS",
    "GUARDS",
    "Budget",
    "Guard",
    "Pruning",
    "PruningSettings",
    "check_finds_unused",
    "check_when_and_how_much",
    "prune",
    "recover",
    "register_budget",
    "register_guard",
    "steps_of",
    "unwrap",
]
