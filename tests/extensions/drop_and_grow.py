"""RigL (Evci et al. 2020, arXiv:1911.11134): drop the smallest weights, grow where gradients are steepest."""

from __future__ import annotations

import torch

from hf_prune import WeightPruner, register_rule, register_score
from hf_prune.rules import RULES


@register_score("steepest", needs=("gradient",))
def steepest(weight, gradient):
    """Where a step would change most."""
    return gradient.abs()


@register_rule("drop_and_grow", returns=True, also=("steepest",))
def drop_and_grow(scores, old, select, steepest):
    """Of what stays, three tenths are chosen by their gradients, from all that is masked."""
    kept = select(scores, old, fewer=0.3)
    return select({name: grown.masked_fill(kept[name], torch.inf) for name, grown in steepest.items()}, {})


class RigL(WeightPruner):
    """A WeightPruner that drops and grows."""

    def resolve_rule(self):
        return RULES["drop_and_grow"]
