"""The written plan: kept units as run-length text, and the `pruning_config` that a model carries."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import __version__
from .errors import CheckpointError, PruningError, shown
from .kinds import KINDS
from .parts import TOWERS, configs_inside, own_configs, split_tower, transformers_part
from .structure import Group, Kept, units_gone, units_left

BLOCK = "pruning_config"
FORMAT = 1
_TYPES: dict[str, type] = {
    "kept": dict,
    "stock": bool,
    "library_version": str,
    "digests": dict,
    "recipe": str,
    "base_model": str,
    "standalone": dict,
    "weights": dict,
    "dense": dict,
    "load": str,
}
_PLACES = 4  # of how many groups a tensor's axis is at most: heads, their KV groups, the branch, the layer
_RUN = r"[0-9]{1,7}(-[0-9]{1,7})?"  # 7 digits: no text asks for gigabytes
_TEXT = re.compile(rf"({_RUN}(,{_RUN})*)? ?of ([0-9]{{1,7}})")


def encode_units(units: Sequence[int], dense: int) -> str:
    """Write kept units as runs, with the dense number of units behind them.

    Example:
        >>> encode_units([0, 1, 2, 3, 7], 12)
        '0-3,7 of 12'
    """
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) + f" of {dense}"


def decode_units(name: str, text: object) -> tuple[list[int], int]:
    """Read `encode_units` back: kept units in the dense model's numbering, and how many the dense model has.

    Raises:
        CheckpointError: Not such a text, units out of order, doubled or out of range.
    """
    runs, dense = _read_runs(name, text)
    return [unit for run in runs for unit in run], dense


def _read_runs(name: str, text: object) -> tuple[list[range], int]:
    """Read a stranger's text without allocating what it speaks of."""
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    rule = f"{BLOCK}.kept['{name:.80}'] must be increasing unit runs such as '0-3,7 of 12'. Received: {shown(text)}"
    if match is None:
        raise CheckpointError(rule)
    dense, last, runs = int(match[5]), -1, list[range]()
    for run in (match[1] or "").split(",") if match[1] else ():
        first, _, end = run.partition("-")
        a, b = int(first), int(end or first)
        if a <= last or b < a or b >= dense:
            raise CheckpointError(rule)
        runs.append(range(a, b + 1))
        last = b
    return runs, dense


class Record(dict[str, tuple[list[int], int]]):
    """What has been removed so far: group name to (kept units in dense numbering, dense number of units)."""

    def dense_numbers(self, group: Group) -> list[int]:
        """Return the dense number of each live unit of a group."""
        if group.name in self:
            return self[group.name][0]
        parent = parent_in(self, group)
        if parent:  # all heads of the KV groups that stayed
            return [part * group.per_part + i for part in self[parent][0] for i in range(group.per_part)]
        return list(range(group.units))

    def dense_units(self, group: Group) -> int:
        """Return how many units the dense model has in this group."""
        if group.name in self:
            return self[group.name][1]
        parent = parent_in(self, group)
        return self[parent][1] * group.per_part if parent else group.units

    def dense_groups(self, groups: Sequence[Group]) -> list[Group]:
        """Return the dense model's groups, to be counted and chosen from by name.

        Those of a removed layer are taken to be as those of the nearest that is left.
        """
        found = [replace(group, units=self.dense_units(group)) for group in groups]
        for layers in [group for group in found if group.traits.holds_places and group.name in self]:
            left = self[layers.name][0]
            for gone in (number for number in range(layers.units) if number not in set(left)):
                like = f"{layers.name}.{min(left, key=lambda number: abs(number - gone))}."
                mine = [group for group in found if group.name.startswith(like)]
                names = [f"{layers.name}.{gone}.{group.name.removeprefix(like)}" for group in mine]
                found += [replace(group, name=name) for group, name in zip(mine, names)]
        return found

    def to_live(self, groups: Sequence[Group], kept: Kept) -> dict[str, list[int]]:
        """Turn kept units from dense into live numbering; groups that lose nothing are left out.

        Raises:
            PruningError: An unknown group, a unit that is out of range, doubled, or was removed before.
        """
        by_name = {group.name: group for group in groups}
        live: dict[str, list[int]] = {}
        for name, units in kept.items():
            if name not in by_name:
                raise PruningError(
                    f"kept names a group that this model does not have. Received: '{name}'. {_some(by_name)}"
                )
            numbers = {dense: i for i, dense in enumerate(self.dense_numbers(by_name[name]))}
            wrong = [unit for unit in units if unit not in numbers]
            if wrong or len(set(units)) != len(units):
                raise PruningError(
                    f"kept['{name}'] must name units that are there, each once ({len(numbers)} of "
                    f"{self.dense_units(by_name[name])} are). Received: {(wrong or list(units))[:8]}"
                )
            live[name] = sorted(numbers[unit] for unit in units)
        return live

    def after(self, groups: Sequence[Group], live_kept: Kept) -> Record:
        """Return the record as it is once these live units are all that stays."""
        gone = tuple(f"{place}." for group in groups for place in self._places_gone(group, live_kept))
        result = Record({name: units for name, units in self.items() if not name.startswith(gone)})
        names = {group.name for group in groups}
        for group in groups:
            stays = live_kept.get(group.name)
            if stays is None or group.name.startswith(gone):
                continue
            if len(stays) == group.units and group.name not in self:
                continue
            numbers, parent = self.dense_numbers(group), parent_in(names, group)
            result[group.name] = ([numbers[i] for i in stays], self.dense_units(group))
            if parent:  # one head left in each KV group looks like plain heads: say that it is not
                result.setdefault(parent, (list(range(group.parts)), group.parts))
        return result

    def _places_gone(self, group: Group, live_kept: Kept) -> list[str]:
        """Return the places, such as ``layers.3``, that leave as a whole with units of this group."""
        numbers = self.dense_numbers(group)
        gone = units_gone(group, live_kept) if group.traits.holds_places else ()
        return [f"{group.name}.{numbers[unit]}" for unit in gone]


def parent_name(group: Group) -> str:
    """Return the name of the KV groups that would hold these heads; of other kinds an empty one."""
    traits = group.traits
    return group.name.removesuffix(traits.called) + KINDS[traits.inside].called if traits.inside else ""


def parent_in(names: Container[str], group: Group) -> str:
    """Return the name of the KV groups that hold these heads, if there are several, and they are among these names."""
    parent = parent_name(group)
    return parent if group.parts > 1 and parent in names else ""


def close_kept(groups: Sequence[Group], live_kept: Kept) -> dict[str, list[int]]:
    """Make a plan agree with itself: what is inside a removed layer, branch or KV group goes too.

    Raises:
        PruningError: Parts that stay would keep unequal numbers of units, or a group fewer than it must.
    """
    closed = {name: sorted(units) for name, units in live_kept.items()}
    branches = tuple(f"{g.place}." for g in groups if g.traits.is_place and not closed.get(g.name, [0]))
    layers = [group for group in groups if group.traits.holds_places]
    modules = tuple(f"{group.modules[unit]}." for group in layers for unit in units_gone(group, closed))
    for group in groups:
        inside = group.slices and all(part.parameter.startswith(modules) for part in group.slices)
        parent = parent_in(closed, group)
        if inside or group.name.startswith(branches):
            closed[group.name] = []
        elif f"{group.name}." in branches:  # experts of a removed branch stay as many, and empty
            closed.pop(group.name, None)
        elif group.name in closed or (parent and len(closed[parent]) < group.parts):
            parts = closed[parent] if parent else list(range(group.parts))
            units = [unit for unit in units_left(group, closed) if unit // group.per_part in parts]
            _check_left(group, units, parts)
            closed[group.name] = units
    return closed


def _check_left(group: Group, units: Sequence[int], parts: Sequence[int]) -> None:
    """Check that units which stay, all of them in these parts, are as many as they must be."""
    counts = {sum(unit // group.per_part == part for unit in units) for part in parts} if group.parts > 1 else set()
    if len(counts) > 1:
        raise PruningError(f"Each KV group of '{group.name}' must keep equally many heads. Received: {sorted(counts)}")
    if len(units) < group.least and parts:
        least = f"At least {group.least} units" if group.least > 1 else "At least one unit"
        raise PruningError(f"{least} of '{group.name}' must stay. Received: {units or 'none'}")
    if len(units) % group.multiple and len(units) < group.units:
        raise PruningError(
            f"Units of '{group.name}' that stay must be a multiple of {group.multiple}. Received: {len(units)}"
        )


def read_record(model: nn.Module) -> Record:
    """Read what a model's config says was removed.

    Raises:
        CheckpointError: The block is malformed, newer than this library, or speaks of more units than this model has
            room for; nothing of their size is allocated before that is known.
    """
    block = read_block(model)
    if block is None:
        return _record_of_parts(model)
    check_block(block)
    kept = block.get("kept", {})
    room = _PLACES * sum(max(tensor.shape, default=1) for tensor in model.parameters())
    if len(kept) > room:
        raise CheckpointError(f"{BLOCK}.kept must name groups that there are. Received: {len(kept)} names")
    read = {name: _read_runs(name, text) for name, text in kept.items()}
    told = sum(len(run) for runs, _ in read.values() for run in runs)
    if told > room:
        raise CheckpointError(f"{BLOCK}.kept must keep units that {type(model).__name__} has. Received: {told} units")
    return Record({name: ([unit for run in runs for unit in run], dense) for name, (runs, dense) in read.items()})


def read_block(model: nn.Module) -> Any:
    """Return the block that a model carries, unchecked; ``None`` where it carries none."""
    return getattr(_holder(model), BLOCK, None)


def _record_of_parts(model: nn.Module) -> Record:
    """Return what the models that a composite was made of had lost before, under the names that it has here."""
    result = Record()
    for path, part in pruned_parts(model):
        towers = dict.fromkeys(TOWERS[name] for name in path.split(".") if name in TOWERS)
        for name, units in read_record(part).items():
            tower, inside = split_tower(name)
            mine = [*dict.fromkeys([*towers, *(tower.split(".") if tower else ())])]
            mine = mine[:-1] if len(mine) > 1 and mine[-1] == "encoder" else mine
            result[".".join([*mine, inside])] = units
    return result


def pruned_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each part of a composite that came with a plan of its own, the outermost ones."""
    if not hasattr(getattr(model, "config", None), "model_type") or getattr(model.config, BLOCK, None) is not None:
        return
    found: tuple[str, ...] = ()
    for path, module in model.named_modules():
        config = vars(module).get("config")
        if path.startswith(found) or not hasattr(config, "model_type") or getattr(config, BLOCK, None) is None:
            continue
        found = (*found, f"{path}.")
        yield path, module


def check_block(block: Any) -> None:
    """Check that a block has the keys and types of `docs/format.md`; keys that we do not know are left alone.

    Raises:
        CheckpointError: It has not, or its format is newer than this library.
    """
    if not isinstance(block, dict):
        raise CheckpointError(f"{BLOCK} must be a mapping with a mapping 'kept'. Received: {shown(block)}")
    number = block.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= FORMAT:
        raise CheckpointError(
            f"{BLOCK}.format must be 1 to {FORMAT} for hf_prune {__version__}: update hf_prune to load newer folders. "
            f"Received: {shown(number)}"
        )
    for key, kind in _TYPES.items():
        if key in block and not isinstance(block[key], kind):
            raise CheckpointError(f"{BLOCK}.{key} must be of type {kind.__name__}. Received: {shown(block[key])}")


def annotate(model: nn.Module, **notes: Any) -> None:
    """Add keys such as ``recipe`` and ``base_model`` to the block in the model's config; ``None`` adds nothing."""
    told = {key: value for key, value in notes.items() if value is not None}
    if told:
        own_configs(model)
        note(model, **told)


def note(model: nn.Module, **told: Any) -> None:
    """Add keys to the block of a model whose configs are its own already."""
    setattr(_holder(model), BLOCK, {**new_block(), **(read_block(model) or {}), **told})


def forget_parts(model: nn.Module) -> None:
    """Take the blocks out of a composite's parts: from now on its own speaks for all."""
    configs = [part.config for _, part in pruned_parts(model)]
    configs += configs_inside(getattr(model, "config", None))
    for config in configs:
        if BLOCK in vars(config):
            delattr(config, BLOCK)


def new_block() -> dict[str, Any]:
    """Return the block of a model that has lost nothing."""
    return {"format": FORMAT, "library_version": __version__, "stock": True, "kept": {}}


def build_twin(model: nn.Module, config: Any, device: str = "meta") -> Any:
    """Return what a model's class builds from a config, which loses our block; the caller's random numbers stay.

    Args:
        model: Its class counts.
        config: A copy that may be changed.
        device: Where its tensors are; on ``meta`` they hold nothing.
    """
    if hasattr(config, BLOCK):
        delattr(config, BLOCK)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return type(model)(config)


def _holder(model: nn.Module) -> Any:
    """Return what carries the block: the config, or a module itself where it has none of transformers' kind."""
    config = getattr(transformers_part(model), "config", None)
    return config if hasattr(config, "model_type") else model


def _some(names: Mapping[str, object]) -> str:
    shown = list(names)[:4]
    return f"It has {', '.join(shown)}{' …' if len(names) > 4 else ''}."
