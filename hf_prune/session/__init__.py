"""What happens at a step: `Pruning`, used by the callback and by loops of one's own; and one-shot `prune`."""

from __future__ import annotations

from ..sharding import unwrap
from .checks import check_finds_unused, check_when_and_how_much
from .oneshot import prune
from .pruning import Pruning
from .recovery import recover

__all__ = ["Pruning", "check_finds_unused", "check_when_and_how_much", "prune", "recover", "unwrap"]
