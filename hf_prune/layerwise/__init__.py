"""How much the loss rises when parts of each layer go: `sensitivity`, and what it returns."""

from __future__ import annotations

from .effects import Effect, Sensitivity
from .measuring import SHARES, sensitivity

__all__ = ["SHARES", "Effect", "Sensitivity", "sensitivity"]
