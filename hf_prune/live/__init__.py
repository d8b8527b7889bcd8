"""The model while it is pruned: `LiveModel` changes its shapes, `Masking` writes its zeros, `Snapshot` goes back."""

from __future__ import annotations

from .masking import Masking
from .model import Cut, LiveModel
from .shadows import Shadows
from .snapshot import Snapshot, forwards_of
from .temporary import masked_for_now
from .units import Units

__all__ = ["Cut", "LiveModel", "Masking", "Shadows", "Snapshot", "Units", "forwards_of", "masked_for_now"]
