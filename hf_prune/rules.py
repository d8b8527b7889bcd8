"""Rules: what may come back when masks of a pruner change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .registry import Registry

Named = Mapping[str, Tensor]
_DROPPED = 0.3  # of what stays, at the first change of a rule that drops and grows


class Select(Protocol):
    """Keep the best of what may stay, as many as are due to stay now."""

    def __call__(self, scores: Named, among: Named, *, fewer: float = 0.0) -> dict[str, Tensor]:
        """Return masks, True = keep.

        Args:
            scores: By parameter, larger = keep.
            among: What may stay, True = may; parameters that are not named may as a whole.
            fewer: Share of those that are due to stay which is left out, in [0, 1).
        """


RuleFunction = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Args:
        name: Its name.
        function: From (scores, old masks, select) and the scores named in `also` (by keyword) to new masks. One with a
            parameter `progress` gets how much of the schedule's time is gone, in [0, 1].
        returns: Whether what was masked may come back: its last values are then kept.
        also: Names of further scores of weights.
        units: Whether pruners of units may take it: to them it only says whether all units are chosen from anew.
        from_zero: Whether what comes back begins at zero instead: no values are kept.
    """

    name: str
    function: RuleFunction
    returns: bool = False
    also: tuple[str, ...] = ()
    units: bool = False
    from_zero: bool = False


RULES: Registry[Rule] = Registry("rule")


def register_rule(
    name: str,
    *,
    returns: bool = False,
    also: tuple[str, ...] = (),
    units: bool = False,
    from_zero: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for pruners of single weights under a name.

    Args:
        name: The name.
        returns: Whether what was masked may come back.
        also: Names of further scores of weights, which the function gets by keyword.
        units: Whether pruners of units may take it too.
        from_zero: Whether what comes back begins at zero, instead of with its last value.

    Example:
        >>> @register_rule("keep_best_of_all", returns=True)
        ... def keep_best_of_all(scores, old, select):
        ...     return select(scores, {})
    """

    def register(function: RuleFunction) -> RuleFunction:
        RULES.add(name, Rule(name, function, returns, also, units, from_zero))
        return function

    return register


@register_rule("final", units=True)
def final(scores: Named, old: Named, select: Select) -> dict[str, Tensor]:
    """What is masked stays masked (Zhu & Gupta 2017, arXiv:1710.01878)."""
    return select(scores, old)


@register_rule("anew", returns=True, units=True)
def anew(scores: Named, old: Named, select: Select) -> dict[str, Tensor]:
    """Every change chooses anew (Sanh, Wolf and Rush 2020, arXiv:2005.07683)."""
    return select(scores, {})


@register_rule("from_zero", returns=True, from_zero=True)
def from_zero(scores: Named, old: Named, select: Select) -> dict[str, Tensor]:
    """Every change chooses anew, and what comes back begins at zero (AC/DC: Peste et al. 2021, arXiv:2106.12379)."""
    return select(scores, {})


@register_rule("rigl", returns=True, also=("gradient",), from_zero=True)
def rigl(scores: Named, old: Named, select: Select, gradient: Named, progress: float = 0.0) -> dict[str, Tensor]:
    """Drop what is worth least, grow where gradients are steepest (RigL: Evci et al. 2020, arXiv:1911.11134)."""
    return _drop_and_grow(scores, old, select, gradient, progress)


@register_rule("set", returns=True, also=("chance",), from_zero=True)
def sparse_evolution(
    scores: Named, old: Named, select: Select, chance: Named, progress: float = 0.0
) -> dict[str, Tensor]:
    """Drop what is worth least, grow by chance (SET: Mocanu et al. 2018, arXiv:1707.04780)."""
    return _drop_and_grow(scores, old, select, chance, progress)


def _drop_and_grow(scores: Named, old: Named, select: Select, growth: Named, progress: float) -> dict[str, Tensor]:
    """Exchange a share of what stays, ``0.3 (1 + cos(pi t)) / 2``: none is exchanged at the last change."""
    if not any(name in old for name in scores):
        return select(scores, old)
    kept = select(scores, old, fewer=_DROPPED * (1 + math.cos(math.pi * progress)) / 2)
    return select({name: one.masked_fill(kept[name], torch.inf) for name, one in growth.items()}, {})
