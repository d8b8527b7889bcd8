"""Rules: what may come back when masks of a pruner change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .registry import Registry

Named = Mapping[str, Tensor]


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
        function: From (scores, old masks, select) and the scores named in `also` (by keyword) to new masks.
        returns: Whether what was masked may come back: its last values are then kept.
        also: Names of further scores of weights.
        units: Whether pruners of units may take it: to them it only says whether all units are chosen from anew.
    """

    name: str
    function: RuleFunction
    returns: bool = False
    also: tuple[str, ...] = ()
    units: bool = False


RULES: Registry[Rule] = Registry("rule")


def register_rule(
    name: str, *, returns: bool = False, also: tuple[str, ...] = (), units: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for pruners of single weights under a name.

    Args:
        name: The name.
        returns: Whether what was masked may come back.
        also: Names of further scores of weights, which the function gets by keyword.
        units: Whether pruners of units may take it too.

    Example:
        >>> @register_rule("keep_best_of_all", returns=True)
        ... def keep_best_of_all(scores, old, select):
        ...     return select(scores, {})
    """

    def register(function: RuleFunction) -> RuleFunction:
        RULES.add(name, Rule(name, function, returns, also, units))
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
