"""The few types that everything speaks: which entries of which tensors belong to which unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["head", "kv_group", "neuron", "expert", "channel", "branch", "layer"]
Kept = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Slice:
    """In one tensor, along one axis, the entries that unit *u* owns.

    Without parts they are the `per_unit` entries from ``offset + u * per_unit``. With parts (query heads inside
    their KV groups) unit *u* is the ``u % per_part``-th of part ``u // per_part``, and its entries start at
    ``offset + part * part_stride + (u % per_part) * per_unit``.

    Args:
        parameter: Name of a parameter or buffer of the model.
        dim: The axis along which units lie.
        per_unit: Entries that one unit owns, at least 1 (a head's size; 1 for a neuron).
        offset: Where the first unit starts.
        part_stride: Distance between the starts of two parts; ``None`` when parts follow one another without gap.
    """

    parameter: str
    dim: int
    per_unit: int
    offset: int = 0
    part_stride: int | None = None

    def index(self, units: torch.Tensor, per_part: int) -> torch.Tensor:
        """Return the entries along `dim` that these units own, ``(len(units) * per_unit,)``.

        Args:
            units: Live unit numbers, ``(n,)``.
            per_part: How many units one part holds (all of them where there is one part).
        """
        stride = per_part * self.per_unit if self.part_stride is None else self.part_stride
        start = self.offset + (units // per_part) * stride + (units % per_part) * self.per_unit
        return (start[:, None] + torch.arange(self.per_unit)).flatten()


@dataclass(frozen=True)
class Counter:
    """What the code around the weights must be told after a cut: ``module.attribute = count * per_unit``.

    Args:
        module: Name of the module that holds the attribute.
        attribute: For example ``num_heads``.
        per_unit: Factor on the count (the head's size for ``all_head_size``).
        of: ``"units"`` counts all units, ``"units_per_part"`` those of one part (query heads per KV group).
    """

    module: str
    attribute: str
    per_unit: int = 1
    of: Literal["units", "units_per_part"] = "units"


@dataclass(frozen=True)
class Group:
    """Units of one place that are chosen among: the heads of one attention, the neurons of one feed-forward block.

    Args:
        name: Ours, relative to the base model and equal on every lane: ``layers.3.attention.heads``.
        kind: One of `Kind`.
        units: How many units the live model has here.
        slices: Everything a unit owns. The last one is where the output projection reads the unit: removing the
            unit means that these entries see nothing, and its gate's gradient is measured there.
        counters: What to tell the code around the weights.
        parts: Each of the equal parts keeps equally many units.
    """

    name: str
    kind: Kind
    units: int
    slices: tuple[Slice, ...]
    counters: tuple[Counter, ...] = ()
    parts: int = 1

    @property
    def output(self) -> Slice:
        """Where the output projection reads the units."""
        return self.slices[-1]

    @property
    def per_part(self) -> int:
        """Units in one part."""
        return self.units // self.parts
