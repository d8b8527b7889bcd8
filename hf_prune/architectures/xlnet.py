"""XLNet: an attention's projections are parameters of shape (hidden, heads, head size), multiplied by einsum."""

from __future__ import annotations

from torch import nn

from ..plan import read_record
from ..structure import Counter, Group, Slice
from .finder import Found, by_convention
from .naming import order

OF_HEADS = {"q": 1, "k": 1, "v": 1, "r": 1, "r_r_bias": 0, "r_s_bias": 0, "r_w_bias": 0, "seg_embed": 1, "o": 1}


def xlnet(model: nn.Module) -> Found:
    """Return the conventional groups, and the heads of every relative attention."""
    found = by_convention(model)
    attentions = [path for path, module in model.named_modules() if path.endswith(".rel_attn")]
    left = read_record(model).get("layers", (range(len(attentions)), 0))[0]
    for number, path in zip(left, attentions):
        heads = model.get_parameter(f"{path}.q").shape[1]
        slices = tuple(Slice(f"{path}.{name}", axis, 1) for name, axis in OF_HEADS.items())
        told = (Counter(path, "n_head"),)
        found.groups.append(Group(f"layers.{number}.attention.heads", "head", heads, slices, told, outputs=0))
    found.groups.sort(key=lambda group: order(group.name))
    return found
