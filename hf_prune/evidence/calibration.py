"""Calibration: gradients of a loss over batches, in evaluation mode, and what evidence sees of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError
from ..given import check_batch
from ..sharding import average_over_processes, is_sharded, max_over_processes
from .base import Evidence

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_LARGEST_SCALE, _SMALLEST_SCALE = 2.0**15, 2.0**-14  # of a float16 model's loss


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a transformers model computes from a batch with labels.

    Raises:
        PruningError: The model returned none.
    """
    try:
        loss = getattr(model(**batch), "loss", None)
    except (TypeError, ValueError) as error:  # an input it does not know, or one that it lacks
        raise PruningError(
            f"data must hold batches that {type(model).__name__} takes: {error}. Received keys: {sorted(batch)}"
        ) from error
    if loss is None:
        raise PruningError(
            f"data must hold labels, or pass loss=(model, batch) -> tensor. Received keys: {sorted(batch)}"
        )
    return loss  # type: ignore[no-any-return]


def backward_all(
    model: nn.Module, data: Iterable[Mapping[str, Any]], loss: Loss | None = None, evidence: Sequence[Evidence] = ()
) -> float:
    """Run every batch forward and backward in evaluation mode, gradients summing up.

    Args:
        model: The live model, not wrapped.
        data: Batches.
        loss: From (model, batch) to a loss; ``None``: the model's own.
        evidence: What it sees of the batches counts.

    Returns:
        The factor that the gradients still have; there are none where all evidence takes forwards alone. Those of a
        float16 model would vanish, or overflow: its loss is multiplied by as much as it takes (Micikevicius et al.
        2018, arXiv:1710.03740).

    Raises:
        PruningError: There is no batch.
    """
    from transformers.utils import logging  # a well-kept progress bar that honours transformers' switches

    parameters = list(model.parameters())
    device = parameters[0].device
    half = any(one.dtype == torch.float16 for one in parameters) and not any(map(is_sharded, parameters))
    forwards = bool(evidence) and all(one.takes == "forwards" for one in evidence)
    scale, count = _LARGEST_SCALE if half and not forwards else 1.0, 0
    with evaluating(model), torch.enable_grad():  # whoever calls may have switched gradients off
        for batch in logging.tqdm(data, desc="Calibrating", leave=False):
            compute = functools.partial(loss or model_loss, model, on_device(batch, device))
            scale = _backward(compute, parameters, evidence, scale, forwards)
            count += 1
    if not count:
        raise PruningError("data must hold at least one batch. Received: none")
    return _average_gradients(parameters, scale)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the block runs; behind it each module is in its mode of before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch where the model is.

    Raises:
        PruningError: It is none.
    """
    check_batch(batch)
    return {key: one.to(device) if torch.is_tensor(one) else one for key, one in batch.items()}


def _backward(
    compute: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    evidence: Sequence[Evidence],
    scale: float,
    forwards: bool,
) -> float:
    """Add one batch to the gradients; return the scale that they have now, smaller where this batch has overflowed."""
    if forwards:
        compute()
    elif scale == 1.0:
        compute().backward()  # type: ignore[no-untyped-call]
    else:
        scale = _backward_scaled(compute, parameters, evidence, scale)
    for watcher in evidence:
        watcher.commit(scale)
    return scale


def _backward_scaled(
    compute: Callable[[], Tensor], parameters: Sequence[Tensor], evidence: Sequence[Evidence], scale: float
) -> float:
    before = [one.grad for one in parameters]
    while True:
        for one in parameters:
            one.grad = None
        (compute().float() * scale).backward()  # type: ignore[no-untyped-call]
        seen = [one.grad for one in parameters if one.grad is not None]
        if all(bool(one.isfinite().all()) for one in seen) and all(one.is_finite() for one in evidence):
            break
        if scale < _SMALLEST_SCALE:  # it is not the scale: whoever reads scores says which are not finite
            break
        scale /= 4
        before = [None if one is None else one / 4 for one in before]
        for watcher in evidence:
            watcher.discard()
    for one, old in zip(parameters, before):
        if old is not None:
            one.grad = old if one.grad is None else old + one.grad
    return scale


def _average_gradients(parameters: Sequence[Tensor], scale: float) -> float:
    """Average gradients over processes, under the smallest of their scales; return that one."""
    common = -max_over_processes(-scale)
    for one in parameters:
        if one.grad is not None and not is_sharded(one):  # FSDP has averaged its own
            one.grad = average_over_processes(one.grad * (common / scale) if common != scale else one.grad)
    return common
