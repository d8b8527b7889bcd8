"""Reversible pruners: every change chooses anew, and masked units are computed where scores are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..masks import Masks, apply_masks, keep_entries, vectors_by_tensor
from ..plan import close_kept
from ..removal import zero_removed
from ..structure import keep_vectors, live_shapes, named_tensors

if TYPE_CHECKING:
    from .pruning import Pruning


def reopen(pruning: Pruning, due: Sequence[int]) -> None:
    """Let reversible pruners choose anew: all of their units are there again, but what others have masked."""
    if not pruning.reviving & {*due} & {*pruning.chosen}:
        return
    stays = _kept_but(pruning, pruning.reviving & {*due})
    pruning.alive = {name: torch.ones_like(mask) for name, mask in pruning.alive.items()}
    pruning._set_alive(stays)


def _kept_but(pruning: Pruning, pruners: set[int]) -> dict[str, list[int]]:
    """Return what is kept as if these pruners had masked nothing."""
    fixed = {group.name for i, chosen in pruning.chosen.items() if i not in pruners for group in chosen}
    return close_kept(pruning.groups, {name: units for name, units in pruning._live_kept().items() if name in fixed})


def keep_masks(pruning: Pruning, tensors: Mapping[str, Tensor]) -> Masks:
    """Return what is kept of all tensors in which something may come back."""
    names = dict.fromkeys(name for i in pruning.reviving for name in pruning.weights.get(i, ()))
    groups = [group for i in pruning.reviving for group in pruning.chosen.get(i, ())]
    names |= dict.fromkeys(part.parameter for group in groups for part in group.slices)
    stays = vectors_by_tensor(pruning._vectors())
    return {name: keep_entries(tensors[name], stays.get(name, {}), pruning.masks.get(name)) for name in names}


def compute_masked(pruning: Pruning) -> None:
    """Put masked units that may come back to work, behind shut gates."""
    if pruning.watcher is None or not pruning.watcher.shut or pruning.watcher.gating:
        return
    tensors = named_tensors(pruning.model)
    pruning.shadows.put_back(tensors)
    apply_masks(tensors, pruning.masks)
    kept = _kept_but(pruning, pruning.reviving)
    zero_removed(tensors, keep_vectors(pruning.groups, kept, live_shapes(pruning.model)))
    pruning.watcher.gating = True


def hide_masked(pruning: Pruning) -> None:
    """Let masked units be zeros again, before an optimizer's step, an evaluation or a checkpoint sees them."""
    if pruning.watcher is not None and pruning.watcher.gating:
        pruning.watcher.gating = False
        pruning.hold()


def hook_model(pruning: Pruning) -> list[Any]:
    """Compute masked units in those forwards from which scores are read, and never save them so; return the handles."""

    def before_forward(module: nn.Module, args: Any) -> None:
        if pruning.watcher is not None and pruning.watcher.active and torch.is_grad_enabled():
            compute_masked(pruning)

    def before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        hide_masked(pruning)

    model: Any = pruning.model
    hook = torch.compiler.disable(before_forward)  # type: ignore[no-untyped-call]
    return [model.register_forward_pre_hook(hook, prepend=True), model.register_state_dict_pre_hook(before_saving)]
