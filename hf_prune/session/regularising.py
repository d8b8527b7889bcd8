"""Regularised training: a shrinking step behind each optimizer step drives weights or whole units to exact zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..errors import PruningError
from ..live import LiveModel, Masking
from ..optimizers import bare_optimizer, swaps_weights
from ..registry import Registry
from ..settings import settings
from ..sharding import local, scale_along
from ..structure import Group, Slice
from .budgets import Budget, Macs
from .tasks import Tasks


@settings(frozen=True)
class Regularisation:
    """Drive weights or units to zero while a model trains, until the schedule has made its last change.

    Behind each step of the optimizer comes a proximal step (Parikh and Boyd 2014): what is regularised becomes smaller
    by the learning rate of that step times `strength`, and no smaller than zero. It is decoupled from the loss, as
    AdamW's weight decay is (Loshchilov and Hutter 2019, arXiv:1711.05101): an Adam would divide the gradient of a
    penalty by its own size, clipping and a GradScaler would change it, and no gradient makes an exact zero. So a
    weight, or a unit's norm, loses at most ``strength * (sum of learning rates)`` in a run: choose by that.

    Args:
        kind: ``"l1"``: each weight by itself, ``w <- sign(w) max(|w| - lr * strength * c, 0)`` (Tibshirani 1996; Han
            et al. 2015, arXiv:1506.02626); ``"group_lasso"``: all weights of a unit together, by their L2 norm,
            ``w <- w max(1 - lr * strength * c / |unit|, 0)`` (Yuan and Lin 2006; Wen et al. 2016, arXiv:1608.03665);
            ``"sensitivity"``: weights decay, the more the less the loss minds, ``w <- w (1 - lr * strength * c *
            max(1 - |dL/dw|, 0))``, never to exact zero (Tartaglione et al. 2022, arXiv:2011.09905); ``"growing"``: of
            units or weights alone that are smallest by their L1 norm, as many as are to leave in the end, ``w <- w
            max(1 - lr * strength * c * t, 0)``, t the share of the way to the last change (GReg-1: Wang et al. 2021,
            arXiv:2012.09243); or a registered name.
        strength: How strongly, above 0.
        by_cost: Whether ``c`` is what a unit costs (by the target's budget, else in multiply-accumulates), relative to
            the mean over all units that are chosen from; ``False``: 1, as it is for single weights.

    Example:
        >>> Regularisation("group_lasso", strength=2.0).by_cost
        True
    """

    kind: str = "l1"
    strength: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    by_cost: bool = True

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        REGULARISERS[kind]
        return kind


@dataclass(frozen=True)
class Regularised:
    """What a regulariser may shrink at one step.

    Args:
        tensors: Parameters that the optimizer trains, by name; sharded ones as they are.
        groups: Whose units are pruned.
        weights: Names of the parameters of which single weights are pruned.
        step: Parameter name to its learning rate times the strength.
        factors: Group name to what a unit costs, relative to the mean.
        leaving: How many units of each group, or weights of each parameter, are still to leave, as far as a sparsity or
            a target says so.
        progress: Share of the way to the last change that is gone, in (0, 1].
    """

    tensors: Mapping[str, Any]
    groups: Sequence[Group]
    weights: Sequence[str]
    step: Mapping[str, float]
    factors: Mapping[str, float]
    leaving: Mapping[str, int]
    progress: float

    @property
    def by_tensor(self) -> dict[str, float]:
        """By how much each weight may shrink: where it belongs to units of two groups, as for the cheaper one."""
        found = {name: self.step[name] for name in self.weights}
        for group in self.groups:
            for name in {part.parameter for part in group.slices} & self.step.keys():
                found[name] = min(found.get(name, math.inf), self.step[name] * self.factors[group.name])
        return found


@dataclass(frozen=True)
class Regulariser:
    """A registered way to shrink; `needs_units`, `sharded` and `needs_amount` say where it can."""

    function: Callable[[Regularised], None]
    needs_units: bool
    sharded: bool
    needs_amount: bool


REGULARISERS: Registry[Regulariser] = Registry("regularisation")


def register_regularisation(
    name: str, *, needs_units: bool = False, sharded: bool = False, needs_amount: bool = False
) -> Callable[[Callable[[Regularised], None]], Callable[[Regularised], None]]:
    """Register a function that shrinks weights in place, behind each step of the optimizer.

    Args:
        name: What `Regularisation.kind` says.
        needs_units: Whether it shrinks units alone.
        sharded: Whether parts of tensors are enough for it, as FSDP has them.
        needs_amount: Whether it goes by how much is to leave, which a threshold does not say.

    Example:
        >>> @register_regularisation("decay")
        ... def decay(told):
        ...     for name, by in told.by_tensor.items():
        ...         told.tensors[name].mul_(1 - by)
    """

    def register(function: Callable[[Regularised], None]) -> Callable[[Regularised], None]:
        REGULARISERS.add(name, Regulariser(function, needs_units, sharded, needs_amount))
        return function

    return register


@register_regularisation("l1", sharded=True)
def l1(told: Regularised) -> None:
    """Each weight comes closer to zero by `lr * strength * c` (Tibshirani 1996; Han et al. 2015, arXiv:1506.02626)."""
    for name, by in told.by_tensor.items():
        tensor = local(told.tensors[name])
        tensor.copy_(torch.nn.functional.softshrink(tensor, by))


@register_regularisation("sensitivity", sharded=True)
def sensitivity(told: Regularised) -> None:
    """Weights decay by `lr * strength * c * max(1 - |dL/dw|, 0)` (Tartaglione et al. 2022, arXiv:2011.09905)."""
    for name, by in told.by_tensor.items():
        tensor, gradient = told.tensors[name], told.tensors[name].grad
        if gradient is not None:
            local(tensor).mul_(1 - by * (1 - local(gradient).abs()).clamp_min(0))


@register_regularisation("group_lasso", needs_units=True)
def group_lasso(told: Regularised) -> None:
    """The L2 norm of all that a unit owns shrinks by `lr * strength * c` (Wen et al. 2016, arXiv:1608.03665)."""
    for group in told.groups:
        norms = _of_units(told, group, torch.square).sqrt()
        _scale_units(told, group, (1 - _step_of(told, group) / norms.clamp_min(1e-12)).clamp_min(0))


@register_regularisation("growing", needs_amount=True)
def growing(told: Regularised) -> None:
    """The smallest, as many as are to leave, decay by `lr * strength * c * t` (Wang et al. 2021, arXiv:2012.09243)."""
    for group in told.groups:
        smallest = _of_units(told, group, torch.abs).argsort(stable=True)[: told.leaving[group.name]]
        shares = torch.ones(group.units)
        shares[smallest] = max(1 - _step_of(told, group) * told.progress, 0.0)
        _scale_units(told, group, shares)
    for name in (one for one in told.weights if told.leaving[one]):
        sizes = told.tensors[name].abs().float()
        largest = sizes.flatten().kthvalue(told.leaving[name]).values
        told.tensors[name][sizes <= largest] *= max(1 - told.step[name] * told.progress, 0.0)


def _step_of(told: Regularised, group: Group) -> float:
    """Return by how much units of a group may shrink."""
    return max((told.step.get(part.parameter, 0.0) for part in group.slices), default=0.0) * told.factors[group.name]


def _owned(told: Regularised, group: Group) -> Iterator[tuple[Slice, Tensor]]:
    """Yield what units of a group own of parameters that are trained, and which entries, unit by unit."""
    for part in group.slices:
        if part.parameter in told.step:
            yield part, part.index(torch.arange(group.units), group.per_part)


def _of_units(told: Regularised, group: Group, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum over all that a unit owns of a function of each weight, ``(units,)``."""
    sums = torch.zeros(group.units)
    for part, index in _owned(told, group):
        tensor = told.tensors[part.parameter].movedim(part.dim, 0)
        rows = of(tensor.float()).reshape(len(tensor), -1).sum(1)
        sums += rows.cpu()[index].view(group.units, part.per_unit).sum(1)
    return sums


def _scale_units(told: Regularised, group: Group, shares: Tensor) -> None:
    """Multiply all that each unit owns by its share, ``(units,)``."""
    for part, index in _owned(told, group):
        scale_along(told.tensors[part.parameter], part.dim, index, shares.repeat_interleave(part.per_unit))


class Regularising:
    """What a run's regularisation needs to know: which parameters, by which learning rates, at which cost.

    Args:
        told: How; ``None``: not at all.
        live: The live model, with its optimizer.
        tasks: What is pruned.
        masking: Which units are there.
        budget: What they cost; ``None``: multiply-accumulates.
        left: Which share a target leaves, in (0, 1]; 1: there is none.

    Raises:
        PruningError: There is no optimizer whose learning rate would say how far, or the kind does not fit.
    """

    def __init__(
        self,
        told: Regularisation | None,
        live: LiveModel,
        tasks: Tasks,
        masking: Masking,
        budget: Budget | None,
        left: float,
    ) -> None:
        self._told, self._live, self._tasks, self._masking, self._left = told, live, tasks, masking, left
        self._budget, self._seen = budget, (masking.units, dict[str, float]())
        if told is None:
            return
        kind = REGULARISERS[told.kind]
        if live.sharded and not kind.sharded:
            raise PruningError(
                f"Regularisation '{told.kind}' needs whole parameters. Received: a model sharded by FSDP"
            )
        if live.optimizer is None or swaps_weights(live.optimizer):
            got = "none" if live.optimizer is None else "a schedule-free one, which keeps two sets of weights"
            raise PruningError(f"regularisation goes by an optimizer's learning rate: optimizer=. Received: {got}")
        if kind.needs_units and not all(task.structured for task in tasks):
            raise PruningError(
                f"Regularisation '{told.kind}' shrinks units: single weights take 'l1'. Received: a WeightPruner"
            )
        if kind.needs_amount and any(task.pruner.threshold is not None for task in tasks):
            raise PruningError(
                f"Regularisation '{told.kind}' goes by how much is to leave, a sparsity or a target. "
                "Received: a threshold"
            )
        whole = [group for task in tasks for group in masking.units.named(task.groups) if group.modules]
        if whole:
            raise PruningError(
                f"Regularisation '{told.kind}' shrinks what units own: no layers and no experts. "
                f"Received: '{whole[0].name}'"
            )

    @torch.no_grad()
    def step(self, ahead: Collection[str], progress: float) -> None:
        """Shrink once: the optimizer has stepped.

        Args:
            ahead: Names of the groups and parameters whose masks will still change.
            progress: Share of the way to the last change that is gone, in (0, 1].
        """
        if self._told is None or not ahead:
            return
        live, rates = self._live, dict[int, float]()
        for one in bare_optimizer(live.optimizer).param_groups:
            rates |= {id(parameter): float(one["lr"]) * self._told.strength for parameter in one["params"]}
        tensors = {name: one for name, one in live.tensors.items() if id(one) in rates}
        groups = [group for group in live.groups if group.name in ahead]
        weights = [name for name in tensors if name in ahead]
        step = {name: rates[id(one)] for name, one in tensors.items()}
        told = Regularised(tensors, groups, weights, step, self._factors(groups), self._leaving(), progress)
        REGULARISERS[self._told.kind].function(told)

    def _leaving(self) -> dict[str, int]:
        """Return how many units, or weights, of each name are to leave of those that are there."""
        units, tensors = {group.name: group.units for group in self._live.groups}, self._live.tensors
        found = {}
        for task in self._tasks:
            share = task.sparsity or (1 - self._left if task.structured else 0.0)
            for name in (one for one in task.groups if one in units):  # a layer may have taken some along
                dense = self._live.dense_units[name]
                found[name] = max(0, round(share * dense) - dense + units[name])
            found |= {name: round(share * tensors[name].numel()) for name in task.weights}
        return found

    def _factors(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return what a unit of each group costs, relative to the mean over all of their units."""
        assert self._told is not None
        if not self._told.by_cost or not groups:
            return {group.name: 1.0 for group in groups}
        units, known = self._seen
        if units is not self._masking.units or known.keys() != {group.name for group in groups}:
            units = self._masking.units
            costs = (self._budget or Macs(self._live)).costs(units, groups)
            mean = sum(costs[one.name] * one.units for one in groups) / sum(one.units for one in groups)
            known = {name: cost / mean for name, cost in costs.items()}
            self._seen = units, known
        return known
