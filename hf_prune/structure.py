"""The few types that everything speaks: which entries of which tensors belong to which unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .kinds import KINDS, Gate, Kind, KindTraits

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
        adapter: Whether the tensor is one of LoRA's: it is cut, and counts for no cost, as it will be merged.
    """

    parameter: str
    dim: int
    per_unit: int
    offset: int = 0
    part_stride: int | None = None
    adapter: bool = False

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.parameter.rpartition(".")[0]

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
        attribute: For example ``num_heads``; ``config.num_heads`` is set in a copy of the config, the module's own.
        per_unit: Factor on the count (the head's size for ``all_head_size``).
        of: ``"units"`` counts all units, ``"units_per_part"`` those of one part (query heads per KV group).
    """

    module: str
    attribute: str
    per_unit: int = 1
    of: Literal["units", "units_per_part"] = "units"


@dataclass(frozen=True, repr=False)
class Group:
    """Units of one place that are chosen among: the heads of one attention, the neurons of one feed-forward block.

    Args:
        name: Ours, relative to the base model and equal on every lane: ``layers.3.attention.heads``.
        kind: One of `Kind`; `KINDS` says what it means.
        units: How many units the live model has here.
        slices: Everything a unit owns. The last ones are where output projections read the unit: removing the
            unit means that these entries see nothing, and its gate's gradient is measured there.
        counters: What to tell the code around the weights.
        parts: Each of the equal parts keeps equally many units.
        outputs: How many of the last slices are read by an output projection; more than 1 where layers share units, 0
            where the core hands its result on by itself.
        least: Fewest units that must stay, at least 0; 0 where the code around can do without any.
        multiple: How many units stay is a multiple of this, where there are as many (kernels of stacked experts ask
            for aligned widths).
        core: Module that computes the units and is skipped once none is left; empty where it copes by itself. Of
            experts it is the router.
        arguments: Of the core's forward, what the model around it computes for all heads of the dense model: name, and
            where heads lie in it (`skipping.select_heads`).
        modules: For units that are modules of a list (layers, experts): unit *u* is ``modules[u]``.
    """

    name: str
    kind: Kind
    units: int
    slices: tuple[Slice, ...]
    counters: tuple[Counter, ...] = ()
    parts: int = 1
    outputs: int = 1
    least: int = 1
    multiple: int = 1
    core: str = ""
    arguments: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Say what it is in short: its slices would fill a screen, and a list of groups many."""
        return f"Group('{self.name}', {self.kind}, {self.units} units)"

    @property
    def traits(self) -> KindTraits:
        """What holds of every unit of this kind."""
        return KINDS[self.kind]

    @property
    def has_gate(self) -> bool:
        """Whether what units hand on can be seen: where nothing reads them, and they are no modules, it cannot."""
        return bool(self.read) or self.traits.gate != "input"

    @property
    def gate(self) -> Gate:
        """What a unit's gate multiplies; ``"input"`` where nothing reads the units (`read` is empty): it has none."""
        return "input" if self.read else self.traits.gate

    @property
    def read(self) -> tuple[Slice, ...]:
        """Where output projections read the units."""
        return self.slices[-self.outputs :] if self.outputs else ()

    @property
    def place(self) -> str:
        """The name without its last part: ``layers.3.attention``."""
        return self.name.rpartition(".")[0]

    @property
    def holder(self) -> str:
        """Name of the list that holds its modules; empty where it has none."""
        return self.modules[0].rpartition(".")[0] if self.modules else ""

    @property
    def per_part(self) -> int:
        """Units in one part."""
        return self.units // self.parts


def units_left(group: Group, live_kept: Kept) -> Sequence[int]:
    """Return the live units of a group that stay: all of one that is not named."""
    return live_kept.get(group.name, range(group.units))


def units_gone(group: Group, live_kept: Kept) -> list[int]:
    """Return the live units of a group that leave: none of one that is not named."""
    left = set(units_left(group, live_kept))
    return [unit for unit in range(group.units) if unit not in left]


Shapes = Mapping[str, Sequence[int]]
KeepVectors = dict[tuple[str, int], torch.Tensor]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class TensorPlaces:
    """Where a model's parameters and buffers hang: they are found without a walk, and as they are now.

    FSDP exchanges parameters, and pruning gives them other data; modules stay the same until one is removed.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [*model.named_modules(remove_duplicate=False)]
        self._places = [
            (f"{path}.{name}" if path else name, held, name)
            for kind in ("_parameters", "_buffers")
            for path, module in found
            for held in [vars(module)[kind]]
            for name in held
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what `named_tensors` does."""
        return {path: one for path, held, name in self._places if (one := held.get(name)) is not None}


def live_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every parameter and buffer by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def keep_vectors(groups: Sequence[Group], live_kept: Kept, shapes: Shapes) -> KeepVectors:
    """Return, for each tensor and axis that loses entries, which entries stay.

    Several groups may own entries of one axis (KV groups and the heads inside them): an entry stays when all agree.

    Args:
        groups: The live model's groups.
        live_kept: Group name to the live unit numbers that stay; a group that is not named keeps all.
        shapes: Tensor name to its live shape.

    Returns:
        ``{(tensor name, dim): boolean tensor of that axis' length, True = keep}``.
    """
    vectors: KeepVectors = {}
    for group in groups:
        if group.name not in live_kept:
            continue
        stays = torch.zeros(group.units, dtype=torch.bool)
        stays[torch.as_tensor(list(live_kept[group.name]), dtype=torch.long)] = True
        removed = (~stays).nonzero().view(-1)
        for part in group.slices if len(removed) else ():
            key = (part.parameter, part.dim)
            vector = vectors.setdefault(key, torch.ones(shapes[part.parameter][part.dim], dtype=torch.bool))
            vector[part.index(removed, group.per_part)] = False
        for unit in removed.tolist() if group.modules else ():
            inside = group.modules[unit] + "."
            names = [name for name, shape in shapes.items() if name.startswith(inside) and len(shape)]
            vectors.update({(name, 0): torch.zeros(shapes[name][0], dtype=torch.bool) for name in names})
    return vectors


def gone_entries(vectors: KeepVectors) -> dict[tuple[str, int], torch.Tensor]:
    """Return the numbers of the entries that leave, for each tensor and axis that loses some."""
    return {key: (~vector).nonzero().view(-1) for key, vector in vectors.items()}


def matrix_entries(groups: Sequence[Group], shapes: Shapes, vectors: KeepVectors | None = None) -> int:
    """Count the entries of all matrices that the groups cut: their multiply-accumulates per token.

    Args:
        groups: The live model's groups.
        shapes: Tensor name to its live shape.
        vectors: What would stay (`keep_vectors`); ``None`` counts everything that is there now.
    """
    total = 0
    for name in {part.parameter for group in groups for part in group.slices if not part.adapter}:
        shape = list(shapes[name])
        for dim in range(len(shape)):
            if vectors and (name, dim) in vectors:
                shape[dim] = int(vectors[name, dim].sum())
        total += math.prod(shape) if len(shape) > 1 else 0
    return total


def unit_cost(group: Group, groups: Sequence[Group], shapes: Shapes) -> float:
    """Return the multiply-accumulates per token that leave with one unit of this group (a layer: on average).

    Args:
        group: The group.
        groups: All of the live model's groups; they say which matrices count.
        shapes: Tensor name to its live shape.
    """
    if group.modules:
        inside = tuple(f"{module}." for module in group.modules)
        names = {part.parameter for other in groups for part in other.slices if part.parameter.startswith(inside)}
        return sum(math.prod(shapes[name]) for name in names if len(shapes[name]) > 1) / group.units
    matrices = [part for part in group.slices if len(shapes[part.parameter]) > 1 and not part.adapter]
    return sum(
        part.per_unit * math.prod(n for axis, n in enumerate(shapes[part.parameter]) if axis != part.dim)
        for part in matrices
    )
