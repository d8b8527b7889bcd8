"""What to remove, and how much: settings only. They hold no model, so that they can be printed, compared and reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from .allocation import ALLOCATIONS, AllocationFunction
from .errors import PruningError
from .schedules import Schedule
from .scores import Score, get_score
from .settings import settings
from .structure import Group, Kind


@settings()
class Pruner:
    """Settings that all pruners share.

    Args:
        sparsity: Fraction to remove, in [0, 1). ``None`` where a `Target` decides over all structured pruners.
        score: A registered name, or a function from a weight to scores of its shape.
        allocation: ``"global"`` ranks over all groups by score per cost, ``"uniform"`` inside each; or a registered
            name or a function.
        schedule: When to prune; ``None`` takes the schedule of the run.
        include: Patterns of names to choose from, such as ``"layers.[0-3].*"``; none means all.
        exclude: Patterns of names to leave alone.
        multiple_of: Kept units of a group are a multiple of this, at least 1.
        min_kept: Units that stay in every group (in every part of it) at least, 1 or more.
    """

    sparsity: float | None = None
    score: str | Callable[..., torch.Tensor] = "taylor"
    allocation: str | Callable[..., Any] = "global"
    schedule: Schedule | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    multiple_of: int = Field(default=1, ge=1)
    min_kept: int = Field(default=1, ge=1)

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"sparsity must be in [0, 1). Received: {value:g}.{hint}")
        return value

    def wants(self, name: str) -> bool:
        """Whether the name passes `include` and `exclude`."""
        included = not self.include or any(fnmatch(name, pattern) for pattern in self.include)
        return included and not any(fnmatch(name, pattern) for pattern in self.exclude)

    def resolve_score(self) -> Score:
        """Return the score, of weights or of units as this pruner needs it."""
        return get_score(self.score, "unit" if isinstance(self, UnitPruner) else "weight")

    def allocate(self) -> AllocationFunction:
        """Return the allocation function."""
        return ALLOCATIONS[self.allocation] if isinstance(self.allocation, str) else self.allocation


class UnitPruner(Pruner):
    """A pruner of units; the kinds it removes are its class'."""

    def choose(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups to choose among.

        Raises:
            PruningError: The model has none that the patterns let pass.
        """
        kinds = self.kinds(groups)
        chosen = [group for group in groups if group.kind in kinds and self.wants(group.name)]
        if not chosen:
            there = ", ".join(group.name for group in groups[:4])
            raise PruningError(
                f"{type(self).__name__} finds no groups of kind {' or '.join(kinds)} under "
                f"include={list(self.include)}, exclude={list(self.exclude)}. The model has {there} …"
            )
        return chosen

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return the kinds of unit to remove from a model with these groups."""
        raise NotImplementedError


@settings()
class HeadPruner(UnitPruner):
    """Remove attention heads.

    Args:
        unit: ``"head"``: query heads (under grouped queries equally many in each KV group); ``"kv_group"``: a key/value
            head with all its query heads; ``"auto"``: KV groups where the model has them, heads elsewhere.
        **settings: As in `Pruner`.

    Example:
        >>> HeadPruner(sparsity=0.5).sparsity
        0.5
    """

    unit: Literal["auto", "head", "kv_group"] = "auto"

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return heads, or KV groups where there are any and `unit` lets them."""
        grouped = any(group.kind == "kv_group" for group in groups)
        return ("kv_group",) if self.unit == "kv_group" or (self.unit == "auto" and grouped) else ("head",)


@settings()
class NeuronPruner(UnitPruner):
    """Remove feed-forward neurons, plain and gated.

    Example:
        >>> NeuronPruner(sparsity=0.5, multiple_of=32).multiple_of
        32
    """

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return neurons."""
        return ("neuron",)


@settings()
class WeightPruner(Pruner):
    """Zero single weights: smaller files and research, no speed in PyTorch or ONNX Runtime on a CPU.

    The default scope is every Linear inside numbered layers of the base model; embeddings and heads stay dense.

    Args:
        pattern: ``"unstructured"``: any weight may go.
        **settings: As in `Pruner`; `include` and `exclude` are patterns of parameter names.

    Example:
        >>> WeightPruner(sparsity=0.8, score="l1").pattern
        'unstructured'
    """

    PATTERNS: ClassVar[tuple[str, ...]] = ("unstructured",)
    pattern: str = "unstructured"

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value not in cls.PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(cls.PATTERNS)}. Received: '{value}'")
        return value

    def choose_weights(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters to prune.

        Raises:
            PruningError: None passes `include` and `exclude`.
        """
        linears = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        in_layers = [name for name in linears if self.include or any(part.isdigit() for part in name.split("."))]
        chosen = [name for name in in_layers if self.wants(name)]
        if not chosen:
            raise PruningError(
                f"WeightPruner finds no Linear weights under include={list(self.include)}, "
                f"exclude={list(self.exclude)}. "
                f"The model has {', '.join(linears[:4])} …"
            )
        return chosen


@settings(frozen=True)
class Target:
    """How much is to remain, over all structured pruners together; they then leave `sparsity` at ``None``.

    Args:
        macs: Share of the multiply-accumulates per token in the matrices that units can be cut from (projections and
            feed-forward parts), in (0, 1]; 0.5: half remains.

    Example:
        >>> Target(macs=0.5).macs
        0.5
    """

    macs: float

    @field_validator("macs")
    @classmethod
    def _share(cls, value: float) -> float:
        if not 0 < value <= 1:
            hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"macs must be in (0, 1]: the share that remains. Received: {value:g}.{hint}")
        return value
