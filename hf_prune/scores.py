"""Scores: how important a weight or a unit is; larger means keep. One pure function each.

A score of weights maps tensors to a tensor of the same shape; for a unit its weights' scores are summed. A score of
units maps statistics of the units to one number each, and is preferred where a unit pruner asks for its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .errors import PruningError
from .registry import Registry

ScoreFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Score:
    """A registered score: its function, what it needs, where it comes from, and whether it may take back a mask."""

    name: str
    function: ScoreFunction
    of: Literal["weight", "unit"]
    needs: tuple[str, ...]
    paper: str
    reversible: bool = False


SCORES: Registry[dict[str, Score]] = Registry("score")


def register_score(
    name: str,
    *,
    needs: tuple[str, ...] = (),
    paper: str = "",
    of: Literal["weight", "unit"] = "weight",
    reversible: bool = False,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a score under a name that pruners and recipes can use.

    Args:
        name: The name; one function of weights and one of units may share it.
        needs: What is passed beside ``weight`` (scores of weights) by keyword: ``gradient`` (of the loss, same shape),
            ``movement`` (the sum over all steps so far of ``-w * dL/dw``, same shape; of a masked weight, w is its last
            value and the gradient that at zero), ``noise`` (uniform in [0, 1), same shape or ``(units,)``), ``chance``
            (the same, drawn anew at each step), ``gate``,
            ``gate_square`` and ``gate_absolute`` (running mean over samples of the gradient of the loss to a gate on
            the unit, plain, squared or absolute, ``(units,)``).
        paper: Where it comes from.
        of: ``"weight"``: ``f(weight, **needs)`` of the weight's shape; ``"unit"``: ``f(**needs)``, ``(units,)``.
        reversible: Whether what it has masked comes back where its score has become one of the best; a pruner's
            `reversible` comes first.

    Returns:
        A decorator that hands the function back.

    Raises:
        PruningError: The name is taken, or a need is unknown.

    Example:
        >>> @register_score("weight_gradient", needs=("gradient",))
        ... def weight_gradient(weight, gradient):
        ...     return gradient.abs()
    """

    def register(function: ScoreFunction) -> ScoreFunction:
        forms = SCORES[name] if name in SCORES else SCORES.add(name, {})
        if of in forms:
            raise PruningError(f"A score of {of}s named '{name}' is registered already.")
        forms[of] = Score(name, function, of, needs, paper, reversible)
        return function

    return register


def get_score(score: str | Callable[..., Any], of: Literal["weight", "unit"]) -> Score:
    """Return the score of this name for weights or units; a plain function is taken as a score of weights alone."""
    if callable(score):
        return Score(getattr(score, "__name__", "score"), score, "weight", (), "")
    forms = SCORES[score]
    if of == "weight" and of not in forms:
        raise PruningError(f"score '{score}' is for units; a WeightPruner needs one of weights. Received: '{score}'")
    return forms.get(of) or forms["weight"]


@register_score("l1", paper="Han et al. 2015, arXiv:1506.02626; for units Li et al. 2017, arXiv:1608.08710")
def l1(weight: Tensor) -> Tensor:
    """Absolute value: the sum over a unit is its L1 norm."""
    return weight.abs()


@register_score("l2", paper="Han et al. 2015, arXiv:1506.02626")
def l2(weight: Tensor) -> Tensor:
    """Square: the sum over a unit is its squared L2 norm."""
    return weight.square()


@register_score("taylor", needs=("gradient",), paper="Molchanov et al. 2017, arXiv:1611.06440")
def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss when the weight becomes zero: ``|w * dL/dw|``."""
    return (weight * gradient).abs()


@register_score("taylor", of="unit", needs=("gate_square",), paper="Molchanov et al. 2019, arXiv:1906.10771")
def gate_taylor(gate_square: Tensor) -> Tensor:
    """Mean over samples of the squared first-order change when the unit's gate closes: ``E[(dL/dg)^2]``."""
    return gate_square


@register_score("gate_absolute", of="unit", needs=("gate_absolute",), paper="Michel et al. 2019, arXiv:1905.10650")
def gate_absolute(gate_absolute: Tensor) -> Tensor:
    """Mean over samples of the absolute first-order change when the unit's gate closes: ``E|dL/dg|``."""
    return gate_absolute


@register_score("gradient", needs=("gradient",), paper="Evci et al. 2020, arXiv:1911.11134, of what grows")
def gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Sensitivity of the loss to the weight: ``|dL/dw|``."""
    return gradient.abs()


@register_score("movement", needs=("movement",), reversible=True, paper="Sanh, Wolf and Rush 2020, arXiv:2005.07683")
def movement(weight: Tensor, movement: Tensor) -> Tensor:
    """How far training has moved the weight away from zero: what the straight-through gradient to a mask sums up to.

    It says nothing before a model has moved: its paper fine-tunes a pre-trained model for many epochs.
    """
    return movement


@register_score("movement", of="unit", needs=("gate",), reversible=True, paper="Lagunas et al. 2021, arXiv:2109.04838")
def gate_movement(gate: Tensor) -> Tensor:
    """How much the loss falls as the unit's gate opens: minus the mean over samples of ``dL/dg``."""
    return -gate


@register_score("random", needs=("noise",), paper="the control that every study needs")
def random(weight: Tensor, noise: Tensor) -> Tensor:
    """Chance."""
    return noise


@register_score("random", of="unit", needs=("noise",), paper="the control that every study needs")
def random_unit(noise: Tensor) -> Tensor:
    """Chance, one draw a unit."""
    return noise


@register_score("chance", needs=("chance",), paper="Mocanu et al. 2018, arXiv:1707.04780, of what grows")
def chance(weight: Tensor, chance: Tensor) -> Tensor:
    """Chance, another at each change."""
    return chance
