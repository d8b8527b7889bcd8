"""What scores need from data: the gradient of the loss to a gate on each unit, and gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PruningError
from .structure import Group

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class GateWatcher:
    """Running means of gate gradients, from hooks on the inputs of output projections.

    A gate multiplies everything that a unit hands to its output projection. Its gradient is the sum over tokens of
    activation times gradient: for each sample one number a unit. It needs no gradient of any weight.

    Args:
        model: The live model, not wrapped.
        groups: The groups to watch.
        decay: What a batch leaves of the means before it, in (0, 1]; 1 sums up.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], decay: float) -> None:
        self.model, self.groups, self.decay = model, list(groups), decay
        self.square = {group.name: torch.zeros(group.units) for group in groups}
        self.absolute = {group.name: torch.zeros(group.units) for group in groups}
        self._handles: list[Any] = []

    def start(self) -> None:
        """Hook every output projection once, however many groups read through it."""
        by_module: dict[str, list[Group]] = {}
        for group in self.groups:
            by_module.setdefault(group.output.parameter.rpartition(".")[0], []).append(group)
        for path, groups in by_module.items():
            self._handles.append(self.model.get_submodule(path).register_forward_pre_hook(self._hook(groups)))

    def stop(self) -> None:
        """Remove the hooks; the means stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def regroup(self, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> None:
        """Go on with groups that have lost units; `kept` are the live numbers that stayed."""
        self.groups = [group for group in groups if group.name in self.square]
        for means in (self.square, self.absolute):
            for name, units in kept.items():
                if name in means:
                    means[name] = means[name][list(units)]

    def synchronize(self) -> None:
        """Average the means over all processes, so that every rank decides the same."""
        device = next(self.model.parameters()).device
        for means in (self.square, self.absolute):
            for name, mean in means.items():
                means[name] = average_over_processes(mean.to(device)).cpu()

    def _hook(self, groups: list[Group]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            if torch.is_grad_enabled() and inputs.requires_grad:
                seen = inputs.detach()
                inputs.register_hook(lambda gradient: self._see(groups, seen, gradient))

        return before_forward

    @torch.no_grad()
    def _see(self, groups: list[Group], inputs: Tensor, gradient: Tensor) -> None:
        """Add one batch: ``(samples, …, width)`` summed over all but samples and width."""
        product = (inputs * gradient).float()
        gates = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
        for group in groups:
            index = group.output.index(torch.arange(group.units), group.per_part).to(gates.device)
            gate = gates[:, index].view(len(gates), group.units, -1).sum(-1)
            for means, value in ((self.square, gate.square()), (self.absolute, gate.abs())):
                means[group.name] = means[group.name].mul_(self.decay).add_(value.mean(0).cpu())


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a transformers model computes from a batch with labels.

    Raises:
        PruningError: The model returned none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise PruningError(
            f"data must hold labels, or pass loss=(model, batch) -> tensor. Received keys: {sorted(batch)}"
        )
    return loss  # type: ignore[no-any-return]


def backward_all(model: nn.Module, data: Iterable[Mapping[str, Any]], loss: Loss | None = None) -> int:
    """Run every batch forward and backward in evaluation mode, gradients summing up; return the number of batches.

    Raises:
        PruningError: There is no batch.
    """
    from transformers.utils import logging  # a well-kept progress bar that honours transformers' switches

    device, was_training, count = next(model.parameters()).device, model.training, 0
    model.eval()
    for batch in logging.tqdm(data, desc="Calibrating", leave=False):
        moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        (loss or model_loss)(model, moved).backward()  # type: ignore[no-untyped-call]
        count += 1
    model.train(was_training)
    if not count:
        raise PruningError("data must hold at least one batch. Received: none")
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = average_over_processes(parameter.grad)
    return count


def average_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; where there is one, the tensor itself."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
