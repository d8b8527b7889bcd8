"""What lies around a model whose shapes change: DDP's reducer and compiled graphs are made anew, the wrappers stay.

A Trainer, accelerate and a loop of one's own hold on to the wrapper; so do hooks and modes that were set on it. What
trains copies of parameters instead of themselves is refused.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import nn

from .errors import PruningError


def check_no_engine(*things: Any) -> None:
    """Refuse DeepSpeed: zeros in parameters do not reach the copies that it trains, nor what it knows of gradients.

    Args:
        *things: A model, an optimizer, as they are handed over.

    Raises:
        PruningError: One of them is DeepSpeed's, or accelerate's around one.
    """
    for thing in things:
        engine = next((kind for kind in type(thing).__mro__ if _is_deepspeeds(kind)), None)
        if engine is not None:
            raise no_engine(engine.__name__)


def no_engine(received: str) -> PruningError:
    """Return why DeepSpeed is refused."""
    return PruningError(
        "Pruning reads gradients before a step, and writes zeros into the parameters that are trained; DeepSpeed steps "
        f"within backward(), on flat copies of its own. Use DDP or FSDP2. Received: {received}"
    )


def _is_deepspeeds(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "deepspeed" or kind.__name__ == "DeepSpeedOptimizerWrapper"


def check_wrappers(model: nn.Module) -> None:
    """Refuse a DDP that could not go on with a smaller model.

    Raises:
        PruningError: It keeps copies of the parameters, its communication hook keeps a state of their sizes, or it
            could not be found.
    """
    if _in_processes() and gc.get_freeze_count():
        raise PruningError(
            "Live shrinking in several processes needs gc.unfreeze(), to find DDP. Received: gc.freeze()"
        )
    for wrapper in _ddps_around(model):
        if wrapper.mixed_precision is not None:
            raise PruningError(
                "Live shrinking needs a DDP without copies of the parameters: autocast (bf16, fp16) in place of its "
                "own mixed_precision. Received: mixed_precision"
            )
        held = [state for _, state in wrapper._comm_hooks if not _is_plain(state)]
        if held:
            raise PruningError(
                "Live shrinking needs a communication hook of DDP that keeps nothing from step to step, such as "
                f"fp16_compress_hook. Received: one with a {type(held[0]).__name__}"
            )


def follow_shapes(model: nn.Module) -> None:
    """Let every DDP that a model lies in reduce gradients of the shapes that it has now."""
    for wrapper in _ddps_around(model):
        state, hooks, static = dict(vars(wrapper)), list(wrapper._comm_hooks), wrapper.static_graph
        for name in ("reducer", "logger"):
            del state[name]
            delattr(wrapper, name)  # the old reducer takes its hooks along
        wrapper.__setstate__({**state, "static_graph": False})  # as where it is unpickled: all else, and a new reducer
        if static:
            wrapper._set_static_graph()
        wrapper._comm_hooks.clear()
        for hook, held in hooks:
            wrapper.register_comm_hook(held, hook)


def forget_graphs() -> None:
    """Let whatever torch.compile has made be made anew: graphs of old shapes would only fill its limit of eight."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _ddps_around(model: nn.Module) -> list[Any]:
    """Return every DDP that a model lies in: who cuts is not told of a Trainer's, or of one that was made later."""
    if not _in_processes():
        return []
    kinds = _with_subclasses(nn.parallel.DistributedDataParallel)
    found: list[Any] = [one for one in gc.get_referrers(*kinds) if type(one) in kinds]  # an object refers to its class
    return [one for one in found if "reducer" in vars(one) and any(part is model for part in one.module.modules())]


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def _in_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_plain(state: Any) -> bool:
    return state is None or isinstance(state, torch.distributed.ProcessGroup)
