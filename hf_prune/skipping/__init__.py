"""What runs where nothing is left: a layer hands its input on, a branch adds a constant, and caches stay in step.

A forward that is skipped is an attribute of the module itself, set from the shapes after every cut; no tensor and no
name of the model changes. What is put there is an object with fields: all that must be read off signatures and source
text (`forwards`) is read when it is put there, so that compilers can trace it, and copies of a model run the copy's
modules. `nothing` holds what runs where nothing is left, `fewer` what goes on with fewer heads or experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from .fewer import Closed, Selected
from .forwards import INDICES, number_name, parameter_names, read_forward
from .nothing import (
    CONVOLUTIONS,
    BaseAlone,
    HandOn,
    NoBias,
    NoChannels,
    NoEntries,
    Nothing,
    ProjectNothing,
    ProjectZero,
    Zeros,
)
from .replacement import Replacement

__all__ = [
    "INDICES",
    "close_router",
    "is_only_masked",
    "is_skipped",
    "leave_unquantized",
    "plain_copy",
    "restore",
    "select_heads",
    "selected_heads",
    "skip_adapter",
    "skip_block",
    "skip_channels",
    "skip_core",
    "skip_layer",
    "skip_projection",
]


def skip_layer(layer: nn.Module) -> None:
    """Make a layer hand on the hidden states that it gets: what a removed layer means."""
    counted = {getattr(one, name): (one, name) for one in layer.modules() for name in [number_name(one)] if name}
    _replace(layer, HandOn(layer, *read_forward(layer), tuple(counted.values())))  # self- and cross-attention: once


def skip_core(core: nn.Module, output: nn.Module) -> None:
    """Skip the module that computes units of which none are left.

    Args:
        core: For example an attention; it is skipped whole.
        output: Its output projection, inside the core or after it.
    """
    inside = output if any(module is output for module in core.modules()) else None
    _replace(core, Nothing(core, *read_forward(core), inside, number_name(core)))


def skip_projection(output: nn.Module, *, removed: bool = False) -> None:
    """Make an output projection that reads nothing return its bias; of a removed branch zero, masked or cut."""
    axis = 1 if type(output).__name__ == "Conv1D" else 0  # transformers' transposed Linear
    _replace(output, (ProjectZero if removed else ProjectNothing)(output, axis))


def skip_adapter(layer: nn.Module) -> None:
    """Let a projection that reads nothing answer alone: an adapter around it would still want to read."""
    _replace(layer, BaseAlone(layer))


def skip_channels(module: nn.Module) -> None:
    """Make what nothing is left of run: convolutions, batch norms, position biases, transformers' transposed Linear.

    Torch's kernels refuse the first ones; of the last one torch's tracer ends the process (it divides by 0 to reshape).
    """
    if isinstance(module, (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm)):
        _replace(module, NoChannels(module))
    elif type(module).__name__.endswith("RelativePositionBias"):  # BEiT interpolates it before its attention runs
        _replace(module, NoBias(module))
    elif type(module).__name__ == "Conv1D":
        _replace(module, NoEntries(module))


def skip_block(core: nn.Module) -> None:
    """Skip a module that hands its result on itself and of which nothing is left: it returns zeros."""
    _replace(core, Zeros(core, *read_forward(core)))


def select_heads(core: nn.Module, arguments: Sequence[tuple[str, str]], units: Sequence[int], total: int) -> None:
    """Hand only those heads' share of an argument to an attention that has lost the others.

    Args:
        core: The attention.
        arguments: Names, and where heads lie: ``"0"``, ``"1"`` (an axis), ``"batch"`` (axis 0 holds rows x heads),
            ``"none"`` (the attention makes its own where it is given ``None``), `conventions.RESHAPE` (no argument: the
            forward's own code reshapes to the width of the hidden states, and gets that of the heads that are left).
        units: Heads that stay, in numbers before this cut.
        total: Heads before this cut.
    """
    before = core.__dict__.get("forward")
    if isinstance(before, Selected):
        units, total = [before.units[unit] for unit in units], before.total
    _replace(core, Selected(core, parameter_names(type(core).forward), tuple(arguments), tuple(units), total))


def selected_heads(core: nn.Module) -> tuple[dict[str, str], list[int], int] | None:
    """Return what `select_heads` was told of an attention: arguments, kept heads in dense numbers, dense heads."""
    forward = core.__dict__.get("forward")
    if not isinstance(forward, Selected):
        return None
    return dict(forward.arguments), list(forward.units), forward.total


def close_router(router: nn.Module, experts: Sequence[int]) -> None:
    """Make a router never choose these experts: their logits are minus infinity."""
    _replace(router, Closed(router, tuple(experts)))


def is_skipped(module: nn.Module) -> bool:
    """Whether the module's forward was replaced by one of ours."""
    return isinstance(module.__dict__.get("forward"), Replacement)


def plain_copy(model: Any) -> Any:
    """Copy a model without hooks, and without what mixed precision and device maps set over a class's own forward."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if not is_skipped(module):
            module.__dict__.pop("forward", None)
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            vars(module)[hooks].clear()
    return copied


def is_only_masked(module: nn.Module) -> bool:
    """Whether the module is a masked layer, or the router of masked experts: after a cut there are none."""
    return isinstance(module.__dict__.get("forward"), (HandOn, Closed))


def restore(module: nn.Module) -> None:
    """Give a skipped module its own forward back."""
    if is_skipped(module):
        del module.forward
        module.__dict__.pop("qconfig", None)


def leave_unquantized(module: nn.Module) -> None:
    """Make `torch.ao.quantization` leave a module alone: its kernels refuse what is empty, or run what is skipped."""
    module.qconfig = None  # type: ignore[assignment]


def _replace(module: nn.Module, forward: Replacement) -> None:
    module.forward = forward
    if isinstance(module, nn.Linear):
        leave_unquantized(module)
