"""Applying a written plan: a model that was just built dense is cut to what its config, or its whole's config, says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..architectures import find_groups
from ..errors import CheckpointError, PruningError, UnsupportedModelError
from ..parts import own_configs, split_tower
from ..plan import BLOCK, close_kept, note, pruned_parts, read_record
from ..removal import cut
from ..structure import Group

_OF_WHOLE = ("digests", "standalone", "weights", "dense")  # keys of a block that speak of the whole, or its files


def apply_plans(model: Any, folder: Mapping[str, Any] | None = None) -> None:
    """Cut a model that was just built to its own plan, or each part of it to the part's.

    Args:
        model: The root, or a part that came with a plan of its own.
        folder: The config that the folder states, where one is being loaded: this model may be a part of what it is of.

    Raises:
        CheckpointError: A plan names groups or units that this model does not have.
    """
    if _speaks_of_other(model, folder):
        _name_part(model, folder)
    apply_plan(model)
    for _, part in [*pruned_parts(model)]:
        apply_plan(part)


def apply_plan(model: Any) -> None:
    """Cut a model that was just built dense to the plan in its config; what already has its size is left alone.

    Raises:
        CheckpointError: The plan names groups or units that this model does not have.
    """
    if getattr(model.config, BLOCK, None) is None:
        return
    record = read_record(model)
    if not record:
        return
    groups = _groups(model)
    unknown = [name for name in record if name not in groups]
    if unknown:
        raise CheckpointError(
            f"{BLOCK}.kept names groups that {type(model).__name__} does not have. Received: {str(unknown[:4])[:200]}"
        )
    live: dict[str, list[int]] = {}
    stock = getattr(model.config, BLOCK).get("stock", False)
    for name, (units, dense) in record.items():
        if groups[name].units not in ((len(units),) if stock else (dense, len(units))):
            raise CheckpointError(
                f"{BLOCK}.kept['{name}'] is for {dense} units, {type(model).__name__} has {groups[name].units}. "
                f"Received: {getattr(model.config, BLOCK)['kept'][name]!r:.80}"
            )
        if groups[name].units == dense and not stock:
            live[name] = units
    try:
        with torch.device("cpu"):  # from_pretrained builds under a meta device, where index arithmetic has no values
            cut(model, list(groups.values()), close_kept(list(groups.values()), live))
    except PruningError as error:
        raise CheckpointError(f"{BLOCK}.kept cannot be applied to {type(model).__name__}: {error}") from error


def _groups(model: nn.Module) -> dict[str, Group]:
    try:
        return {group.name: group for group in find_groups(model)}
    except UnsupportedModelError as error:
        raise CheckpointError(f"{BLOCK} is for a model with prunable groups. {error}") from error


def _speaks_of_other(model: Any, folder: Mapping[str, Any] | None) -> bool:
    """Whether the plan is that of a larger model, which has other names for the groups of this one."""
    own = getattr(model.config, BLOCK, None)
    block = own if own is not None else (folder or {}).get(BLOCK)
    saved = model.config.architectures if folder is None else folder.get("architectures")
    if not (block or {}).get("kept") or not saved or type(model).__name__ in saved:
        return False
    try:
        return own is None or not read_record(model).keys() <= _groups(model).keys()
    except CheckpointError:  # it speaks of more than this model is, or this model has nothing to prune
        return True


def _name_part(model: Any, folder: Mapping[str, Any] | None) -> None:
    """Give an encoder, a decoder or a tower what the plan of the whole says of it, under the part's own names.

    The whole is built on ``meta`` and cut: a plan that names what it does not have is refused here as there. What the
    plan says of its other parts is left out.

    Raises:
        CheckpointError: The model is no part of the whole, or the plan is not the whole's.
    """
    if folder is None:
        own_configs(model)
    told = model.config.to_dict() if folder is None else folder
    block = told[BLOCK]
    if BLOCK in vars(model.config):
        delattr(model.config, BLOCK)
    towers = _towers(model, _whole(model, told))
    kept = {}
    for name, text in block["kept"].items():
        tower, inside = split_tower(name)
        if tower in towers:
            kept[".".join([*([towers[tower]] if towers[tower] else []), inside])] = text
    if not towers and not block.get("stock"):
        raise CheckpointError(
            f"{BLOCK}.kept names groups that {type(model).__name__} does not have. Received: "
            f"{str(list(block['kept'])[:4])[:200]}"
        )
    if towers:
        note(model, **({key: value for key, value in block.items() if key not in _OF_WHOLE} | {"kept": kept}))


def _whole(model: Any, told: Mapping[str, Any]) -> Any:
    """Return the model that a folder's config describes, cut, on ``meta``.

    Raises:
        CheckpointError: The folder names no class of transformers, or its plan is not that class'.
    """
    import transformers

    name = told["architectures"][0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{type(model).__name__} must be what was saved, or a part of what transformers has. Received: {name!s:.80}"
        )
    whole_class: Any = kind
    config = whole_class.config_class.from_dict(copy.deepcopy(dict(told)))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        whole = whole_class(config)
    apply_plans(whole)
    return whole


def _towers(part: nn.Module, whole: nn.Module) -> dict[str, str]:
    """Return which towers of the whole are in its part: the whole's name of each, and the part's."""
    theirs = {place: group for group in _groups(whole).values() for place in _places(group)}
    towers: dict[str, str] = {}
    for group in _groups(part).values():
        mine = split_tower(group.name)[0]
        if mine in towers.values():
            continue
        path = next(_places(group), "")
        match = theirs.get(_counterpart(part, whole, path))
        if match is not None and match.kind == group.kind:
            towers[split_tower(match.name)[0]] = mine
    return towers


def _places(group: Group) -> Iterator[str]:
    yield from (part.parameter for part in group.slices)
    yield from group.modules


def _counterpart(part: nn.Module, whole: nn.Module, path: str) -> str:
    """Return where in the whole lies what lies here in its part: inside the only module of such a class and name."""
    parts = path.split(".")
    for end in range(next((i for i, one in enumerate(parts) if one.isdigit()), len(parts))):
        kind = type(part.get_submodule(".".join(parts[:end])))
        found = [other for other, module in whole.named_modules() if type(module) is kind and kind is not nn.ModuleList]
        if len(found) > 1 and end:
            found = [one for one in found if one.rpartition(".")[2] == parts[end - 1]]
        if len(found) == 1:
            return ".".join([*([found[0]] if found[0] else []), *parts[end:]])
    return ""
