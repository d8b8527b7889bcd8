"""What a kind of unit means: a row of one table, which everybody asks who must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import PruningError

Kind = Literal["head", "kv_group", "neuron", "expert", "channel", "branch", "layer"]
Gate = Literal["input", "change", "output"]


@dataclass(frozen=True)
class KindTraits:
    """What holds of every unit of a kind.

    Args:
        called: What groups of this kind are called at the end of their names.
        zeros_tell: Whether a mask is zeros and nothing else, so that it can be read from the weights in a file.
        may_return: Whether a masked unit may come back: zeros are all of its mask, and it has no running statistics.
        gate: What a unit's gate multiplies: the ``"input"`` of the output projections that read it (`Group.read`; a
            kind without them has no gate), the ``"change"`` that its module makes to what it gets, or the ``"output"``
            of the module that it is. Only where a group has no output projections does the last hold (`Group.gate`).
        masked_by: What a mask is beside zeros: none, to ``"skip"`` a module, or a ``"router"`` that never chooses it.
        inside: The kind of unit of the same place that units of this kind may lie in, equally many in each.
        is_place: Whether the one unit is all of a place, so that everything else in this place leaves with it.
        is_module: Whether a unit is a whole module (an expert: or its share of stacked ones), whatever was put into it.
        holds_places: Whether units hold places, whose names have the units' dense numbers (``layers.3.mlp``): these
            leave with their unit, modules behind it get other numbers, and the config says how many there are.
        config_counts: Config attributes that may state how many units each of the groups has.
    """

    called: str
    zeros_tell: bool
    may_return: bool
    gate: Gate
    masked_by: Literal["zeros", "skip", "router"] = "zeros"
    inside: Kind | None = None
    is_place: bool = False
    is_module: bool = False
    holds_places: bool = False
    config_counts: tuple[str, ...] = ()


_NEURON_COUNTS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "n_inner",
    "hidden_dim",
    "d_ff",
    "d_inner",
)
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts")

KINDS: dict[str, KindTraits] = {
    "head": KindTraits(
        "heads",
        zeros_tell=True,
        may_return=True,
        gate="input",
        inside="kv_group",
        config_counts=("num_attention_heads", "n_heads", "num_key_value_heads"),
    ),
    "kv_group": KindTraits(
        "kv_groups", zeros_tell=True, may_return=True, gate="input", config_counts=("num_key_value_heads",)
    ),
    "neuron": KindTraits("neurons", zeros_tell=True, may_return=True, gate="input", config_counts=_NEURON_COUNTS),
    "expert": KindTraits(
        "experts",
        zeros_tell=False,
        may_return=False,
        gate="input",
        masked_by="router",
        is_module=True,
        config_counts=_EXPERT_COUNTS,
    ),
    "channel": KindTraits("channels", zeros_tell=True, may_return=False, gate="input"),
    # its zeros are also those of a branch whose units are all masked, and what then stays is a constant
    "branch": KindTraits("branch", zeros_tell=False, may_return=False, gate="output", is_place=True),
    "layer": KindTraits(
        "layers",
        zeros_tell=False,
        may_return=False,
        gate="change",
        masked_by="skip",
        is_module=True,
        holds_places=True,
    ),
}


def register_kind(kind: str, traits: KindTraits) -> None:
    """Say what a kind of one's own means; groups of it come from `register_architecture`.

    Args:
        kind: Its name.
        traits: What holds of its units.

    Raises:
        PruningError: There is a kind of this name.

    Example:
        >>> register_kind("adapter", KindTraits("adapters", zeros_tell=True, may_return=True, gate="input"))
        >>> KINDS.pop("adapter").called
        'adapters'
    """
    if kind in KINDS:
        raise PruningError(f"A kind named '{kind}' is registered already: take another name. Received: '{kind}'")
    KINDS[kind] = traits
