"""BigBird: block-sparse attention turns itself into a new, dense-width one when it first sees a short input."""

from __future__ import annotations

from torch import nn

from .finder import Found, by_convention
from .site import Refusal

REASON = "block-sparse attention rebuilds itself for short inputs: set config.attention_type = 'original_full' first"


def big_bird(model: nn.Module) -> Found:
    """Return the conventional groups; heads only under full attention."""
    found = by_convention(model)
    if getattr(model, "config").attention_type != "original_full":  # noqa: B009
        theirs = [group for group in found.groups if group.kind == "head" and "cross" not in group.name]
        of_heads = {group.place for group in theirs if not group.name.startswith("decoder.")}
        found.groups = [g for g in found.groups if g.place not in of_heads or g.kind not in ("head", "branch")]
        found.refusals += [Refusal(place, REASON) for place in sorted(of_heads)]
    return found
