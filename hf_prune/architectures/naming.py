"""Names of places: ours, relative to the base model, and equal on every lane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..parts import TOWERS
from .conventions import CROSS_ATTENTIONS, SUBLISTS


def layer_numbers(path: str) -> list[int]:
    """Return where in a path the numbers of stages and layers stand, outermost first.

    Lists inside a layer do not count: T5's ``block.0.layer.1``, MobileBERT's ``layer.0.ffn.2``.
    """
    parts = path.split(".")
    at = [i for i, part in enumerate(parts) if part.isdigit() and i and parts[i - 1] not in SUBLISTS]
    return [i for i in at if not (parts[i - 1] == "layer" and "block" in parts[: i - 1])]


def tower(path: str) -> str:
    """Return what comes before the first layer number."""
    return ".".join(path.split(".")[: layer_numbers(path)[0]])


class Names:
    """Our names for the places of one model.

    Args:
        paths: Every place, so that towers are named only where there are several.
        removed_layers: Name of a list of layers, such as ``layers``, to the dense numbers of those that are left.
    """

    def __init__(self, paths: Iterable[str], removed_layers: Mapping[str, list[int]]) -> None:
        towers = {tower(path) for path in paths}
        self.many = len({self._tower_name(one) for one in towers}) > 1
        self.removed_layers = removed_layers

    def layers(self, path: str) -> str:
        """Return the name of the list that a place's layer is in: ``layers``, ``vision.stages.1.layers``."""
        parts, at = path.split("."), layer_numbers(path)
        stages = [f"stages.{parts[i]}" for i in at[:-1]]
        name = self._tower_name(tower(path)) if self.many else ""
        return ".".join([*([name] if name else []), *stages, "layers"])

    def layer(self, path: str) -> str:
        """Return the name of a place's layer, in the dense model's numbering: ``decoder.layers.3``."""
        layers, number = self.layers(path), int(path.split(".")[layer_numbers(path)[-1]])
        left = self.removed_layers.get(layers)
        return f"{layers}.{left[number] if left and number < len(left) else number}"

    def inside(self, path: str) -> str:
        """Return what stands in a path below the layer, with its numbers."""
        return ".".join(path.split(".")[layer_numbers(path)[-1] + 1 :])

    def is_cross(self, path: str) -> bool:
        """Whether an attention reads another sequence than its own."""
        return any(part in CROSS_ATTENTIONS for part in path.split("."))

    @staticmethod
    def _tower_name(prefix: str) -> str:
        parts = prefix.split(".")
        ours = list(dict.fromkeys(TOWERS[part] for part in parts if part in TOWERS))
        if len(ours) > 1 and ours[-1] == "encoder":  # a vision model's own encoder: that it is vision says enough
            ours = ours[:-1]
        return ".".join(ours) if ours else parts[0] if len(parts) > 1 else ""


_RANK = {"attention": 0, "cross_attention": 1, "mlp": 2, "kv_groups": 0, "heads": 1}


def order(name: str) -> tuple[object, ...]:
    """Sort by tower and layer number; attention, then cross-attention, then feed-forward; KV groups before heads."""
    return tuple((int(part), "") if part.isdigit() else (_RANK.get(part, 5), part) for part in name.split("."))
