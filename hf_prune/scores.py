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
    """A registered score: its function, what it needs, where it comes from, and whether it may take back a mask.

    What is `priced` has met a goal in what units cost: it is not divided by costs once more.
    """

    name: str
    function: ScoreFunction
    of: Literal["weight", "unit"]
    needs: tuple[str, ...]
    paper: str
    reversible: bool = False
    priced: bool = False


SCORES: Registry[dict[str, Score]] = Registry("score")


def register_score(
    name: str,
    *,
    needs: tuple[str, ...] = (),
    paper: str = "",
    of: Literal["weight", "unit"] = "weight",
    reversible: bool = False,
    priced: bool = False,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a score under a name that pruners and recipes can use.

    Args:
        name: The name; one function of weights and one of units may share it.
        needs: What is passed by keyword. Beside ``weight``, of its shape: ``gradient`` (of the loss),
            ``gradient_square`` (its mean square over steps, or over batches of calibration data), ``movement`` (the sum
            over all steps so far of ``-w * dL/dw``; of a masked weight, w is its last value and the gradient that at
            zero), ``input_mean``, ``input_absolute``, ``input_square`` and ``input_norm`` (means over tokens of what
            the weight is multiplied with, and the root of the squares' mean), ``noise`` (uniform in [0, 1)), ``chance``
            (the same, drawn anew at each step). Of units, ``(units,)``: ``gate``, ``gate_square`` and ``gate_absolute``
            (running mean over samples of the gradient of the loss to a gate on the unit, plain, squared or absolute),
            ``activation_mean``, ``activation``, ``activation_square`` (means over tokens of a, |a| and a squared) and
            ``contribution`` (the squared norm of what it adds to the output), ``activation_gradient`` (of |dL/da|),
            ``input_sensitivity`` (of |da/dx v|, v random), ``block_influence``, ``loss_without``, ``greedy_order``,
            ``noise``.
        paper: Where it comes from.
        of: ``"weight"``: ``f(weight, **needs)`` of the weight's shape; ``"unit"``: ``f(**needs)``, ``(units,)``.
        priced: Whether it knows what units cost, so that ``allocation="global"`` does not divide it by that.
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
            raise PruningError(
                f"A score of {of}s named '{name}' is registered already: take another name. Received: '{name}'"
            )
        forms[of] = Score(name, function, of, needs, paper, reversible, priced)
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


@register_score(
    "fisher", needs=("gradient_square",), paper="LeCun et al. 1989, NIPS 2; Theis et al. 2018, arXiv:1801.05787"
)
def fisher(weight: Tensor, gradient_square: Tensor) -> Tensor:
    """Second-order change of the loss when the weight becomes zero, by Fisher's diagonal: ``w^2 E[(dL/dw)^2] / 2``."""
    return weight.square() * gradient_square / 2


@register_score("fisher", of="unit", needs=("gate_square",), paper="Theis et al. 2018, arXiv:1801.05787")
def gate_fisher(gate_square: Tensor) -> Tensor:
    """Second-order change of the loss when the unit's gate closes: ``E[(dL/dg)^2] / 2``, half of ``taylor``."""
    return gate_square / 2


@register_score("wanda", needs=("input_norm",), paper="Sun et al. 2024, arXiv:2306.11695")
def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """How much the weight adds to an output: ``|w| * ||x||``, x what it is multiplied with."""
    return weight.abs() * input_norm


@register_score("activation", of="unit", needs=("activation",), paper="Molchanov et al. 2017, arXiv:1611.06440")
def activation(activation: Tensor) -> Tensor:
    """Mean size of what the unit hands on: ``E|a|``."""
    return activation


@register_score(
    "output_norm", of="unit", needs=("contribution",), paper="An et al. 2024, arXiv:2312.11983, without centring"
)
def output_norm(contribution: Tensor) -> Tensor:
    """Norm of what the unit adds to the output: ``sqrt(E||W_u a||^2)``, W_u the columns that read it."""
    return contribution.sqrt()


@register_score(
    "activation_gradient",
    of="unit",
    needs=("activation_gradient",),
    paper="Simonyan et al. 2014, arXiv:1312.6034, of hidden units",
)
def activation_gradient(activation_gradient: Tensor) -> Tensor:
    """Sensitivity of the loss to what the unit hands on: ``E|dL/da|``."""
    return activation_gradient


@register_score(
    "input_sensitivity", of="unit", needs=("input_sensitivity",), paper="Hoffman et al. 2019, arXiv:1908.02729"
)
def input_sensitivity(input_sensitivity: Tensor) -> Tensor:
    """Sensitivity of what the unit hands on to the embeddings: ``E|da/dx v|``, v a random direction."""
    return input_sensitivity


@register_score("block_influence", of="unit", needs=("block_influence",), paper="Men et al. 2024, arXiv:2403.03853")
def block_influence(block_influence: Tensor) -> Tensor:
    """How much a layer turns what it gets: ``1 - E[cos(x, f(x))]``."""
    return block_influence


@register_score("loss_without", of="unit", needs=("loss_without",), paper="Kim et al. 2024, arXiv:2402.02834")
def loss_without(loss_without: Tensor) -> Tensor:
    """How much the loss on calibration data rises without the unit: ``L(without) - L``."""
    return loss_without


@register_score("greedy", of="unit", needs=("greedy_order",), paper="Song et al. 2024, arXiv:2402.09025")
def greedy(greedy_order: Tensor) -> Tensor:
    """When the unit leaves, if each time that one goes without which the loss is smallest, then."""
    return greedy_order


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


@register_score(
    "movement_adam", needs=("movement_adam",), reversible=True, paper="Sanh, Wolf and Rush 2020, arXiv:2005.07683"
)
def movement_adam(weight: Tensor, movement_adam: Tensor) -> Tensor:
    """What an Adam makes of the straight-through gradient to a mask, as in the paper."""
    return movement_adam


@register_score(
    "movement_adam", of="unit", needs=("gate_adam",), reversible=True, paper="Lagunas et al. 2021, arXiv:2109.04838"
)
def gate_movement_adam(gate_adam: Tensor) -> Tensor:
    """What an Adam makes of the gradient to the unit's gate."""
    return gate_adam


@register_score(
    "soft_movement",
    needs=("soft_movement",),
    reversible=True,
    priced=True,
    paper="Sanh, Wolf and Rush 2020, arXiv:2005.07683",
)
def soft_movement(weight: Tensor, soft_movement: Tensor) -> Tensor:
    """``sigmoid`` of a score that the loss and a goal have moved."""
    return soft_movement


@register_score(
    "l0", of="unit", needs=("l0",), priced=True, paper="Louizos et al. 2018, arXiv:1712.01312; CoFi, arXiv:2204.00408"
)
def l0(l0: Tensor) -> Tensor:
    """How likely a learned gate on the unit is open."""
    return l0


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
