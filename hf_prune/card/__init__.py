"""The README of a pruned model: metadata for the Hub, dense against pruned, how to load it."""

from .facts import (
    CARD,
    PLOT,
    RECIPE,
    REPORT,
    CardFacts,
    as_dict,
    find_report,
    inherited_license,
    read_config,
)
from .writing import draw_plot, earlier_facts, is_ours, may_replace, model_card, sound_report, write_card

__all__ = [
    "CARD",
    "PLOT",
    "RECIPE",
    "REPORT",
    "CardFacts",
    "as_dict",
    "draw_plot",
    "earlier_facts",
    "find_report",
    "inherited_license",
    "is_ours",
    "may_replace",
    "model_card",
    "read_config",
    "sound_report",
    "write_card",
]
