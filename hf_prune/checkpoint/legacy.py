"""Folders that others left: transformers' own `pruned_heads`, and models that another tool has cut."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..architectures import find_groups
from ..errors import CheckpointError, PruningError
from ..given import check_model
from ..plan import BLOCK, Record, close_kept, encode_units, parent_name
from ..removal import Model, cut, tell_counters
from ..stock import write_record
from ..structure import Group, Shapes, live_shapes


def adopt_legacy_heads(model: Any) -> None:
    """Turn the `pruned_heads` of a config that transformers 4 wrote into our record, which both lanes can load.

    transformers 5 ignores that key, and would refuse the shapes; transformers 4 has cut the heads by itself.

    Raises:
        CheckpointError: The key names layers or heads that the model does not have.
    """
    config = model.config
    removed = getattr(config, "pruned_heads", None)
    if not removed or getattr(config, BLOCK, None) is not None:
        return
    rule = "config.pruned_heads must map numbers of layers to numbers of heads"
    try:
        gone = {int(layer): {int(head) for head in heads} for layer, heads in dict(removed).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{rule}. Received: {removed!r:.80}") from error
    places = {int(re.findall(r"layers\.(\d+)\.", one.name)[0]): one for one in find_groups(model, ["head"])}
    kept = {}
    for layer, heads in gone.items():
        dense = places[layer].units if layer in places else 0
        if dense != getattr(config, "num_attention_heads", 0):  # transformers 4 was here before us
            dense += len(heads)
        if not heads <= set(range(dense)) or len(heads) == dense:
            raise CheckpointError(f"{rule} that {type(model).__name__} has. Received: {layer}: {sorted(heads)!s:.80}")
        kept[places[layer].name] = encode_units([head for head in range(dense) if head not in heads], dense)
    setattr(
        config, BLOCK, {"format": 1, "library_version": "pruned_heads of transformers", "stock": False, "kept": kept}
    )
    config.pruned_heads = {}


def adopt_shapes(model: Model) -> Model:
    """Let a model that another tool has cut be saved and loaded like ours, if its config still describes the dense one.

    Torch-Pruning and LLM-Pruner hand over the live object: `torch.load(file, weights_only=False)` in the environment
    that made it, and only where you trust the file, gives it back. Which units went is not known, so that the first
    ones of each group count as kept.

    Args:
        model: A transformers model, in the shapes it was cut to; no tensor is changed.

    Returns:
        The same model. ``model.config.pruning_config`` now says its shapes.

    Raises:
        PruningError: Something else than units of a group is missing, such as part of the hidden size.

    Example:
        >>> save_pruned(adopt_shapes(model), "small")  # doctest: +SKIP
    """
    check_model(model)
    config: Any = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(model)(config)
    groups, live = find_groups(twin), live_shapes(model)
    kept = _kept_by_shapes(groups, live_shapes(twin), live)
    record = Record({group.name: (kept[group.name], group.units) for group in groups if group.name in kept})
    with torch.device("cpu"):
        kept = close_kept(groups, kept)
        cut(twin, groups, kept)
    wanted = live_shapes(twin)
    odd = next((name for name in {**wanted, **live} if wanted.get(name) != live.get(name)), None)
    if odd is not None:
        raise PruningError(
            f"Only units of groups may be missing: {odd} must be {wanted.get(odd, 'absent')}. "
            f"Received: {live.get(odd, 'none')}"
        )
    tell_counters(model, groups, kept)
    write_record(model, record, stock=False)
    return model


def _kept_by_shapes(groups: Sequence[Group], dense: Shapes, live: Shapes) -> dict[str, list[int]]:
    """Return the first units of each group, as many as a cut model's tensors have entries for."""
    kept: dict[str, list[int]] = {}
    for group in groups:
        part = group.slices[0 if group.kind == "kv_group" else -1] if group.slices else None
        if part is None or part.parameter not in live or dense[part.parameter] == live[part.parameter]:
            continue
        left = math.ceil(group.units * live[part.parameter][part.dim] / dense[part.parameter][part.dim])
        parts = kept.get(parent_name(group), range(group.parts)) if group.parts > 1 else range(1)
        each = left // max(1, len(parts))
        if left < group.units:
            kept[group.name] = [one * group.per_part + unit for one in parts for unit in range(each)]
    return kept
