"""What a report holds, as data: what is shown of it stands in `display`, what it can do in `Report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .measurement import Measurement


@dataclass
class Figures:
    """What a run kept, and what that brought.

    Args:
        kept: Group name -> units that stayed, in the dense model's numbering; a group that is not named is whole.
        units: Group name -> units of the dense model.
        dense: The model before.
        pruned: The model after.
        metrics: ``{"accuracy": {"dense": 0.88, "pruned": 0.87}}``.
        settings: Whatever tells how the run was done.
        exports: A row for torch and for each exported file of the pruned model: ``runtime``, ``dtype``, ``quantize``,
            ``folder``, ``size_mb``, ``latency_ms``, ``metrics``, ``max_difference``, ``atol``.
        masked: Parameter name -> share of its single weights that are masked; empty where none are.
    """

    kept: dict[str, list[int]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    dense: Measurement | None = None
    pruned: Measurement | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    exports: list[dict[str, Any]] = field(default_factory=list)
    masked: dict[str, float] = field(default_factory=dict)

    @property
    def sparsities(self) -> dict[str, float]:
        """Share that is gone: of the units of each group, and of the single weights of parameters that have masks."""
        return {**{name: 1 - self.stayed(name) / units for name, units in self.units.items()}, **self.masked}

    @property
    def warnings(self) -> list[str]:
        """What a run has not done of what it was asked for, in sentences."""
        return list(self.settings.get("warnings", ()))

    def stayed(self, name: str) -> int:
        """Return how many units of a group stayed."""
        return len(self.kept[name]) if name in self.kept else self.units[name]
