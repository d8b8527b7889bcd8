"""The nearest shape that a stock config can say: units of zeros are added where layers kept fewer than others."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..architectures import find_groups
from ..architectures.site import setting
from ..errors import PruningError
from ..plan import BLOCK, FORMAT, Record, annotate, encode_units, parent_name, read_record
from ..structure import Group, Slice, named_tensors
from . import STOCK, config_counts, stock_twin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """How many units every layer shall have; ``heads`` inside each KV group where there are such."""

    neurons: int
    kv_groups: int
    heads: int


def pad_to_stock(model: Any) -> Any:
    """Return a copy that a stock config can say, and that computes the same: units of zeros are added.

    A neuron whose output column is zero adds nothing, and neither does such a head; they take the numbers of units that
    were removed, so that the copy is the masked model of a milder plan.

    Args:
        model: A pruned model whose config states the dense shape; it stays as it is.

    Raises:
        PruningError: No number of added units makes a shape that the config can say, or only the dense one is.
    """
    groups, record = find_groups(model), read_record(model)
    reasons: list[str] = []
    for counts in _candidates(groups, record):
        try:
            padded, after = _pad(model, groups, record, counts)
        except _UnfitError as error:
            reasons.append(str(error))
            continue
        if not after:
            reasons.append("the nearest shape that it can say is the dense one")
            break
        _tell_added(groups, padded)
        return padded
    cuts = ", ".join(list(record)[:4])
    raise PruningError(
        f"No stock {type(model.config).__name__} can say this shape, whatever units of zeros are added: "
        f"{reasons[-1] if reasons else 'nothing can be added'}. Received: cuts in {cuts}"
    )


class _UnfitError(Exception):
    """These counts do not do, and why."""


def _candidates(groups: Sequence[Group], record: Record) -> Iterator[Counts]:
    """Yield counts for all layers, the smallest first."""
    kv_groups = [group for group in groups if group.kind == "kv_group"]
    heads = [group for group in groups if group.kind == "head"]
    neurons = [group for group in groups if group.kind == "neuron"]
    parents = {group.name: group for group in kv_groups}
    per_kv = [(group, parents.get(parent_name(group))) for group in heads]
    inside = [group.units // max(1, kv.units) if kv else group.units for group, kv in per_kv]
    dense = [record.dense_units(group) // (record.dense_units(kv) if kv else 1) for group, kv in per_kv]
    all_kv = _range([group.units for group in kv_groups], [record.dense_units(group) for group in kv_groups])
    pairs = [(kv, n) for kv in all_kv for n in _range(inside, dense)]
    widest = _range([group.units for group in neurons], [record.dense_units(group) for group in neurons])
    for width in dict.fromkeys((widest[0], widest[-1])):  # any width does where one does
        for kv, n in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair)):
            yield Counts(width, kv, n)


def _range(live: Sequence[int], dense: Sequence[int]) -> range:
    return range(max(1, *live), max(dense) + 1) if live else range(1, 2)


def _pad(model: Any, groups: Sequence[Group], record: Record, counts: Counts) -> tuple[Any, Record]:
    """Return the padded copy with these counts, and the plan that it follows.

    Raises:
        _UnfitError: The stock class does not build these shapes, or added units would not be neutral.
    """
    kept = _milder(groups, record, counts)
    changes = config_counts(
        model.config, groups, lambda one: len(kept[one.name]), {one.name: {record.dense_units(one)} for one in groups}
    )
    changes |= _head_size(model.config, groups)
    try:
        twin = stock_twin(model, changes)
        if hasattr(twin.config, "validate"):  # as saving does on transformers 5
            twin.config.validate()
    except Exception as error:  # whatever a class raises, it cannot be built
        raise _UnfitError(f"its class raises {type(error).__name__}: {error}") from error
    after = _plan(groups, record, kept)
    block = {key: value for key, value in getattr(model.config, BLOCK).items() if key != "standalone"}
    told = {name: encode_units(*units) for name, units in after.items()}
    annotate(twin, **{**block, "format": FORMAT, "library_version": __version__, "stock": True, "kept": told})
    annotate(twin, load=STOCK)
    built = {group.name: group for group in find_groups(twin)}
    for group in groups:
        _check_built(group, built.get(group.name), kept[group.name], record)
    _fill(model, twin, _places(groups, built, record, kept))
    return twin, after


def _head_size(config: Any, groups: Sequence[Group]) -> dict[str, int]:
    """Return one head's size, where the config leaves it to the number of heads; classes that know better refuse it."""
    sizes = {group.slices[0].per_unit for group in groups if group.kind in ("head", "kv_group") and group.units}
    grouped = any(group.kind == "kv_group" for group in groups)
    return {"head_dim": sizes.pop()} if grouped and len(sizes) == 1 and setting(config, "head_dim") is None else {}


def _milder(groups: Sequence[Group], record: Record, counts: Counts) -> dict[str, list[int]]:
    """Return for each group which units the copy has, in dense numbers: those that are left, and the first removed."""
    kept: dict[str, list[int]] = {}
    names = {group.name for group in groups}
    for group in groups:  # KV groups before their heads
        mine, dense = record.dense_numbers(group), record.dense_units(group)
        if group.traits.is_place:
            kept[group.name] = [0]
        elif parent_name(group) in names:
            kept[group.name] = _heads(group, record, kept[parent_name(group)], counts.heads)
        else:
            wanted = {"neuron": counts.neurons, "kv_group": counts.kv_groups, "head": counts.heads}
            kept[group.name] = _fill_up(mine, range(dense), wanted.get(group.kind, len(mine)))
    return kept


def _heads(group: Group, record: Record, parts: Sequence[int], wanted: int) -> list[int]:
    """Return the heads of these KV groups, equally many in each."""
    mine, parent = record.dense_numbers(group), record.get(parent_name(group))
    per_part = record.dense_units(group) // (parent[1] if parent else group.parts)
    found = (range(part * per_part, (part + 1) * per_part) for part in parts)
    return [unit for all_of in found for unit in _fill_up([one for one in mine if one in all_of], all_of, wanted)]


def _fill_up(mine: Sequence[int], all_of: range, wanted: int) -> list[int]:
    removed = [unit for unit in all_of if unit not in set(mine)]
    return sorted([*mine, *removed[: max(0, wanted - len(mine))]])


def _plan(groups: Sequence[Group], record: Record, kept: Mapping[str, list[int]]) -> Record:
    """Return the record of the copy: what it still lacks."""
    after = Record(record)
    lacks = {group.name for group in groups if len(kept[group.name]) < record.dense_units(group)}
    lacks |= {parent_name(group) for group in groups if group.name in lacks} & kept.keys()
    for group in groups:
        if group.name in lacks:
            after[group.name] = (kept[group.name], record.dense_units(group))
        else:
            after.pop(group.name, None)
    return after


def _check_built(group: Group, built: Group | None, kept: Sequence[int], record: Record) -> None:
    """Check that the stock class has as many units here, and that it does not matter which units they are."""
    if built is None or built.units != len(kept):
        has = built.units if built else "none"
        raise _UnfitError(f"'{group.name}' has {len(kept)} units at least, and the class builds {has}")
    computed = [name for name, where in group.arguments if where != "none"]
    if computed and len(kept) < record.dense_units(group):
        raise _UnfitError(f"'{group.name}' gets what the model computes for as many heads as the config says")


Places = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]


def _places(
    groups: Sequence[Group], built: Mapping[str, Group], record: Record, kept: Mapping[str, Sequence[int]]
) -> Places:
    """Return, for each tensor and axis that grows, from where to where entries go."""
    places: Places = {}
    inside = {_key(part) for group in groups if group.kind == "head" for part in group.slices if not part.part_stride}
    for group in groups:
        if not group.units or group.units == len(kept[group.name]):
            continue
        numbers = {unit: i for i, unit in enumerate(kept[group.name])}
        units = torch.tensor([numbers[unit] for unit in record.dense_numbers(group)])
        other = built[group.name]
        for mine, theirs in zip(group.slices, other.slices, strict=True):
            if mine.per_unit != theirs.per_unit:
                if group.kind == "kv_group" and _key(mine) in inside:  # heads say it
                    continue
                raise _UnfitError(
                    f"one unit of '{group.name}' would have {theirs.per_unit} entries, not {mine.per_unit}"
                )
            source = mine.index(torch.arange(group.units), group.per_part)
            target = theirs.index(units, other.per_part)
            places.setdefault((mine.parameter, mine.dim), []).append((source, target))
    return places


def _key(part: Slice) -> tuple[str, int, int]:
    return part.parameter, part.dim, part.offset


@torch.no_grad()
def _fill(model: Any, twin: Any, places: Places) -> None:
    """Give the stock twin the live model's tensors, with zeros where units were added."""
    live, shapes = named_tensors(model), {name: one.shape for name, one in named_tensors(twin).items()}
    done: dict[int, Tensor] = {}
    for name in [*twin.state_dict()]:
        if name not in live:
            raise _UnfitError(f"the class builds '{name}', which the model does not have")
        if id(live[name]) not in done:  # tied tensors are one
            done[id(live[name])] = _grow(name, live[name], shapes[name], places)
    filled = {name: done[id(live[name])] for name in twin.state_dict()}
    twin.load_state_dict(filled, assign=True)
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(getattr(model, "generation_config", None))


def _grow(name: str, tensor: Tensor, shape: Sequence[int], places: Places) -> Tensor:
    """Return a tensor of this shape that holds the given one's entries where they belong, and zeros."""
    tensor = tensor.detach()
    for dim, length in enumerate(shape):
        moved = places.get((name, dim))
        if moved is None and tensor.shape[dim] not in (0, length):
            raise _UnfitError(f"the class builds '{name}' with {length} entries along axis {dim}")
        if tensor.shape[dim] == length and moved is None:
            continue
        grown = tensor.new_zeros(*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
        for source, target in moved or ():
            source, target = source.to(tensor.device), target.to(tensor.device)
            grown.index_copy_(dim, target, tensor.index_select(dim, source))
        tensor = grown
    return tensor


def _tell_added(groups: Sequence[Group], padded: Any) -> None:
    """Log how many units were added."""
    after: Callable[[str], int] = {group.name: group.units for group in find_groups(padded)}.__getitem__
    added = Counter[str]()
    for group in groups:
        added[group.kind] += after(group.name) - group.units
    told = [f"{number} of kind {kind}" for kind, number in added.items() if number]
    logger.warning(
        "Units of zeros were added, so that a stock config can say the shape: %s.", ", ".join(told) or "none"
    )
