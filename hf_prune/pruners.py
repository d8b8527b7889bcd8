"""What to remove, and how much: settings only. They hold no model, so that they can be printed, compared and reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import nn
from typing_extensions import Self

from .allocation import ALLOCATIONS, AllocationFunction
from .errors import PruningError
from .given import check_given
from .kinds import Kind
from .patterns import PATTERNS
from .registry import Registry
from .rules import RULES, Rule
from .schedules import Schedule
from .scope import default_scope, weights_by_module
from .scores import Score, get_score
from .settings import settings
from .structure import Group


@settings()
class Pruner:
    """Settings that all pruners share.

    Args:
        sparsity: Fraction of the dense model's units to remove, in [0, 1), also where some are gone already. ``None``
            where a `Target` decides over all structured pruners, or a threshold.
        score: A registered name, or a function from a weight to scores of its shape.
        allocation: ``"global"`` ranks over all groups by score per cost, ``"as_is"`` by the score alone,
            ``"uniform"`` inside each; or a registered name or a function.
        schedule: When to prune; ``None`` takes the schedule of the run.
        include: Patterns of names to choose from, such as ``"layers.[0-3].*"``; none means all.
        exclude: Patterns of names to leave alone.
        multiple_of: Kept units of a group are a multiple of this, at least 1.
        min_kept: Units that stay in every group (in every part of it) at least, 0 or more. With 0 the last head or
            neuron may go too: of its branch stays a constant, and none of its time.
        reversible: Whether every change chooses anew, so that what was masked may come back with its last value; heads,
            KV groups, neurons and single weights. It costs memory for these values (`Pruning.logs` says how much).
            ``None``: as the score is registered.
        threshold: Instead of a sparsity: what scores as much as this or less leaves, 0 or more; the report tells how
            sparse a model has become. Scores are sums over a unit's weights (``"l1"``: its L1 norm, ``"l2"``: the
            square of its L2 norm), or those of single weights. It rises with the schedule, to all of it at the end.
        relative: Whether the threshold, below 1, is a share of the largest score of the same group or tensor.
        rule: What may come back, by the name of a registered rule: of single weights also ``"rigl"``, ``"set"`` and
            ``"from_zero"``. ``None``: as `reversible` says.
    """

    sparsity: float | None = None
    score: str | Callable[..., torch.Tensor] = "taylor"
    allocation: str | Callable[..., Any] = "global"
    schedule: Schedule | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    multiple_of: int = Field(default=1, ge=1)
    min_kept: int = Field(default=1, ge=0)
    reversible: bool | None = None
    rule: str | None = Field(default=None, kw_only=True)
    threshold: float | None = Field(default=None, ge=0, allow_inf_nan=False, kw_only=True)
    relative: bool = Field(default=False, kw_only=True)

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"sparsity must be in [0, 1). Received: {value:g}.{hint}")
        return value

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: Any) -> Any:
        get_score(value, "unit" if issubclass(cls, UnitPruner) else "weight")
        return value

    @field_validator("allocation", "rule")
    @classmethod
    def _known_name(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, str):
            (ALLOCATIONS if field.field_name == "allocation" else RULES)[value]
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.threshold is not None and self.sparsity is not None:
            raise ValueError(
                "it takes a sparsity or a threshold, not both. "
                f"Received: sparsity={self.sparsity:g}, threshold={self.threshold:g}"
            )
        if self.relative and (self.threshold is None or self.threshold >= 1):
            raise ValueError(
                "relative=True takes a threshold in [0, 1), a share of the largest score. "
                f"Received: threshold={self.threshold}"
            )
        return self

    def wants(self, name: str) -> bool:
        """Whether the name passes `include` and `exclude`."""
        included = not self.include or any(fnmatch(name, pattern) for pattern in self.include)
        return included and not any(fnmatch(name, pattern) for pattern in self.exclude)

    def floor(self, group: Group) -> int:
        """Return how many units must stay in each part of a group."""
        return max(self.min_kept, group.least)

    def resolve_score(self) -> Score:
        """Return the score, of weights or of units as this pruner needs it."""
        return get_score(self.score, "unit" if isinstance(self, UnitPruner) else "weight")

    def may_revive(self) -> bool:
        """Whether what this pruner has masked may come back."""
        return self.resolve_rule().returns

    def resolve_rule(self) -> Rule:
        """Return the rule that says what may come back when masks change.

        Raises:
            PruningError: `rule` is unknown or stands beside `reversible`.
        """
        if self.rule is not None and self.reversible is not None:
            raise PruningError(
                f"rule says what may come back, without reversible. Received: rule={self.rule!r} and "
                f"reversible={self.reversible}"
            )
        if self.rule is not None:
            return RULES[self.rule]
        returns = self.resolve_score().reversible if self.reversible is None else self.reversible
        return RULES["anew" if returns else "final"]

    def settled(self, alone: bool) -> Pruner:
        """Return what it means in a run; here itself.

        Args:
            alone: Whether its units are chosen among themselves, not together with those of other pruners.
        """
        return self

    def allocate(self) -> AllocationFunction:
        """Return the allocation function."""
        if not isinstance(self.allocation, str):
            return self.allocation
        by_score = self.allocation == "global" and self.resolve_score().priced
        return ALLOCATIONS["as_is" if by_score else self.allocation]


Made = TypeVar("Made", bound=type[Pruner])


@dataclass(frozen=True)
class Sort:
    """What a name in recipes and on command lines means: a class of pruners, and settings that go with the name."""

    made: type[Pruner]
    settings: Mapping[str, Any]


PRUNERS: Registry[Sort] = Registry("pruner")


def register_pruner(name: str, **settings: Any) -> Callable[[Made], Made]:
    """Register a class of pruners under a name that recipes and `PruningArguments` can use.

    Recipes know it if its module is announced under the entry-point group ``hf_prune``, or is imported first.

    Args:
        name: What it removes, in the plural: ``"heads"``.
        **settings: That go with the name.

    Raises:
        PruningError: The name is taken.
    """

    def register(made: Made) -> Made:
        PRUNERS.add(name, Sort(made, settings))
        return made

    return register


def as_pruners(pruners: Any) -> list[Pruner]:
    """Return one pruner or several as a list.

    Raises:
        PruningError: Something else was given, such as a pruner's name or its class.
    """
    several = list(pruners) if isinstance(pruners, Iterable) and not isinstance(pruners, (str, type)) else [pruners]
    for one in several:
        check_given("pruners", one, Pruner, "pruners, such as HeadPruner() or [HeadPruner(), NeuronPruner()]")
    return several


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
                f"{type(self).__name__} finds no groups of kind {' or '.join(kinds)} under include and exclude; "
                f"there are {there} …. Received: include={list(self.include)}, exclude={list(self.exclude)}"
            )
        return chosen

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return the kinds of unit to remove from a model with these groups."""
        raise NotImplementedError


@register_pruner("kv_groups", unit="kv_group")
@register_pruner("heads")
@settings()
class HeadPruner(UnitPruner):
    """Remove attention heads.

    Args:
        unit: ``"head"``: query heads (under grouped queries equally many in each KV group); ``"kv_group"``: a key/value
            head with all its query heads; ``"auto"``: KV groups where an attention has several, heads elsewhere.
        **settings: As in `Pruner`.

    Example:
        >>> HeadPruner(sparsity=0.5).sparsity
        0.5
    """

    unit: Literal["auto", "head", "kv_group"] = "auto"

    def choose(self, groups: Sequence[Group]) -> list[Group]:
        """Return KV groups or heads; where there is one KV group alone, the heads inside it."""
        chosen = super().choose(groups)
        several = {group.place for group in chosen if group.kind == "kv_group" and group.units > 1}
        fits = {"kv_group": lambda group: group.place in several, "head": lambda group: group.place not in several}
        return [group for group in chosen if self.unit != "auto" or fits[group.kind](group)]

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return the kind that `unit` names; both where each attention decides."""
        return ("head", "kv_group") if self.unit == "auto" else (self.unit,)


@register_pruner("neurons")
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


@register_pruner("branches", unit="branch")
@register_pruner("layers")
@settings()
class LayerPruner(UnitPruner):
    """Remove whole layers, or one branch of a layer: its attention or its feed-forward block.

    Args:
        unit: ``"layer"``, ``"branch"``, or ``"any"``: whichever is worth least.
        score: As in `Pruner`. ``"auto"``: ``"block_influence"`` where whole layers are chosen among themselves,
            ``"taylor"`` where they must compare with branches, or under a target with other pruners' units.
        **settings: As in `Pruner`; `min_kept` counts layers. The papers that rank layers by what they change: Men et
            al. 2024, arXiv:2403.03853; branches: He et al. 2024, arXiv:2406.15786.

    Example:
        >>> LayerPruner(sparsity=0.25).unit
        'layer'
    """

    unit: Literal["layer", "branch", "any"] = "layer"
    score: str | Callable[..., torch.Tensor] = "auto"

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: Any) -> Any:
        return value if value == "auto" else super()._known_score(value)

    def settled(self, alone: bool) -> LayerPruner:
        """Return itself with the score that ``"auto"`` stands for."""
        best = "block_influence" if alone and self.unit == "layer" else "taylor"
        return replace(self, score=best) if self.score == "auto" else self

    def resolve_score(self) -> Score:
        """Return the score of units; of ``"auto"`` that of layers alone."""
        return get_score(self.settled(alone=True).score, "unit")

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return layers, branches or both."""
        return ("layer", "branch") if self.unit == "any" else (self.unit,)

    def floor(self, group: Group) -> int:
        """Return `min_kept` for layers; any branch may go."""
        return 0 if group.kind == "branch" else super().floor(group)


@register_pruner("experts")
@settings()
class ExpertPruner(UnitPruner):
    """Remove experts of mixture-of-experts blocks, with their router rows; as many stay as a token is sent to.

    Example:
        >>> ExpertPruner(sparsity=0.5).sparsity
        0.5
    """

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return experts."""
        return ("expert",)


@register_pruner("channels")
@settings()
class ChannelPruner(UnitPruner):
    """Remove channels inside the blocks of convolutional models: filters with their batch norms.

    Example:
        >>> ChannelPruner(sparsity=0.5, score="l2").score
        'l2'
    """

    def kinds(self, groups: Sequence[Group]) -> tuple[Kind, ...]:
        """Return channels."""
        return ("channel",)


@register_pruner("weights")
@settings()
class WeightPruner(Pruner):
    """Zero single weights: smaller files and research, no speed in PyTorch or ONNX Runtime on a CPU.

    Weights are those of Linear, transformers' Conv1D, Conv1d to 3d, and recurrent modules (RNN, GRU, LSTM and their
    cells: ``weight_ih_l0``, ``weight_hh_l0``, …); biases and norms are left alone. The default scope is all of them
    inside numbered layers (a ``ModuleList``, as transformers have): embeddings and heads stay dense. A model without
    numbered layers, such as a plain CNN, offers all but its last module, which is its head. With `include` every
    weight that a pattern matches is in scope; an embedding only then. Beside pruners of units, `sparsity` is a share of
    the weights of those units that are left.

    Args:
        pattern: ``"unstructured"``: any weight may go.
        **settings: As in `Pruner`; `include` and `exclude` are patterns of parameter names.

    Example:
        >>> WeightPruner(sparsity=0.8, score="l1").pattern
        'unstructured'
    """

    pattern: str = "unstructured"

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        return PATTERNS[value].name

    def choose_weights(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters to prune.

        Raises:
            PruningError: None passes `include` and `exclude`.
        """
        weights = weights_by_module(model, embeddings=bool(self.include))
        there = [name for names in weights.values() for name in names]
        chosen = [name for name in (there if self.include else default_scope(model, weights)) if self.wants(name)]
        if not chosen:
            some = ", ".join(there[:4]) or "no Linear, convolution or recurrent module"
            raise PruningError(
                f"WeightPruner finds no weights under include and exclude; there are {some} …. "
                f"Received: include={list(self.include)}, exclude={list(self.exclude)}"
            )
        return chosen
