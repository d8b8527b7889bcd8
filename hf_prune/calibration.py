"""What scores need from data: the gradient of the loss to a gate on each unit, and gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PruningError
from .given import check_batch
from .sharding import is_sharded
from .structure import Group, Slice

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_GATE: dict[str, Callable[[Tensor], Tensor]] = {
    "gate": lambda gate: gate,
    "gate_square": torch.square,
    "gate_absolute": torch.abs,
}


class GateWatcher:
    """Means of gate gradients, summed over batches, from hooks on the inputs of output projections.

    A gate multiplies everything that a unit hands to its output projection. Its gradient is the sum over tokens of
    activation times gradient: for each sample one number a unit. It needs no gradient of any weight.

    Args:
        model: The live model, not wrapped.
        groups: The groups to watch.

    Attributes:
        means: What scores need (`scores.NEEDS`) -> group -> ``(units,)``.
        shut: Group -> which of its units' gates are shut while `gating`, ``(units,)`` boolean, True = shut: the unit is
            computed and hands on zeros, so that what it would bring is seen.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, list(groups)
        self.means = {need: {group.name: torch.zeros(group.units) for group in groups} for need in _GATE}
        self.active = True  # hooks that stay on a model, and read nothing, cost nothing
        self.shut: dict[str, Tensor] = {}
        self.gating = False
        self._handles: list[Any] = []

    def start(self) -> None:
        """Hook what hands units on: output projections once each, layers and whole blocks by what they return."""
        by_module: dict[str, list[tuple[Group, Slice]]] = {}
        for group in self.groups:
            for part in group.read:
                by_module.setdefault(part.parameter.rpartition(".")[0], []).append((group, part))
            whole = (
                group.modules
                if group.kind == "layer"
                else (group.core,)
                if group.kind == "branch" and not group.outputs
                else ()
            )
            for unit, path in enumerate(whole):
                module = self.model.get_submodule(path)
                hook = torch.compiler.disable(self._whole(group, unit))  # type: ignore[no-untyped-call]
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for path, read in by_module.items():
            # not compiled: with a hook on a tensor inside, torch 2.13 loses what a forward sets (BERT's problem_type)
            hook = torch.compiler.disable(self._hook(read))  # type: ignore[no-untyped-call]
            self._handles.append(self.model.get_submodule(path).register_forward_pre_hook(hook))

    def stop(self) -> None:
        """Remove the hooks; the means stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def regroup(self, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> None:
        """Go on with groups that have lost units; `kept` are the live numbers that stayed."""
        left = {group.name for group in groups}
        self.groups = [group for group in groups if group.name in self.means["gate"]]
        for means in self.means.values():
            for name in [name for name in means if name not in left]:
                del means[name]  # it went with its layer
            for name, units in kept.items():
                if name in means:
                    means[name] = means[name][list(units)]

    def synchronize(self) -> None:
        """Average the means over all processes, so that every rank decides the same."""
        device = next(self.model.parameters()).device
        for means in self.means.values():
            for name, mean in means.items():
                means[name] = average_over_processes(mean.to(device)).cpu()

    def fade(self, left: float) -> None:
        """Leave of the means only a part, in [0, 1]: by steps of an optimizer, however many batches are in one."""
        for means in self.means.values():
            for mean in means.values():
                mean.mul_(left)

    def _hook(self, read: list[tuple[Group, Slice]]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            inputs, rows = args[0], None
            if not self.active:
                return None
            if isinstance(inputs, nn.utils.rnn.PackedSequence):
                rows = torch.cat([torch.arange(int(count)) for count in inputs.batch_sizes])
                inputs = inputs.data
            watching = torch.is_grad_enabled() and inputs.is_floating_point()
            if watching and not inputs.requires_grad:
                inputs.requires_grad_()  # nothing before it is trained, as under adapters
            seen, gated = inputs.detach(), self._gated(read, inputs)

            def see(gradient: Tensor) -> None:
                self._see(read, _by_sample(module, seen * gradient, rows))

            if watching:
                gated.register_hook(see)  # type: ignore[no-untyped-call]
            return None if gated is inputs else (gated, *args[1:])

        return before_forward

    def _gated(self, read: list[tuple[Group, Slice]], inputs: Tensor) -> Tensor:
        """Return what a reader sees of units of which some gates are shut."""
        shut = [(part, group, self.shut[group.name]) for group, part in read if group.name in self.shut and self.gating]
        if not shut:
            return inputs
        open_ = torch.ones(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
        for part, group, units in shut:
            open_[part.index(units.nonzero().view(-1), group.per_part).to(inputs.device)] = 0
        return inputs * open_

    def _whole(self, group: Group, unit: int) -> Callable[..., None]:
        """Watch what one module adds: the gate of a whole layer or block multiplies all that it changes."""

        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            value = result[0] if isinstance(result, tuple) else result
            if not (self.active and torch.is_grad_enabled() and torch.is_tensor(value) and value.requires_grad):
                return
            given = next((one for one in (*args, *kwargs.values()) if torch.is_tensor(one)), None)
            seen = value.detach()
            if group.kind == "layer" and given is not None and given.shape == value.shape:
                seen = seen - given.detach()

            def see(gradient: Tensor) -> None:
                self._add(group, slice(unit, unit + 1), (seen * gradient).float().flatten(1).sum(1, keepdim=True))

            value.register_hook(see)  # type: ignore[no-untyped-call]

        return after_forward

    @torch.no_grad()
    def _see(self, read: list[tuple[Group, Slice]], gates: Tensor) -> None:
        """Add one batch, ``(samples, width)``."""
        for group, part in read:
            index = part.index(torch.arange(group.units), group.per_part).to(gates.device)
            self._add(group, slice(None), gates[:, index].view(len(gates), group.units, -1).sum(-1))

    @torch.no_grad()
    def _add(self, group: Group, units: slice, gate: Tensor) -> None:
        """Add the gate gradients of one batch, ``(samples, units)``."""
        for need, of in _GATE.items():
            mean = self.means[need][group.name]
            mean[units] += of(gate).mean(0).cpu()


def _by_sample(module: nn.Module, product: Tensor, rows: Tensor | None) -> Tensor:
    """Sum what a module reads over all but samples and width, ``(samples, width)``.

    Args:
        module: The reader; it says which axis is which.
        product: Activation times gradient: ``(samples, …, width)``, for convolutions ``(samples, width, …)``.
        rows: Of a packed sequence: the sample that each token belongs to.
    """
    gates = product.float()
    if rows is not None:
        return gates.new_zeros(int(rows.max()) + 1, gates.shape[-1]).index_add(0, rows.to(gates.device), gates)
    if isinstance(module, nn.RNNBase) and not module.batch_first:
        gates = gates.transpose(0, 1)  # time comes first
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        gates = gates.movedim(1, -1)
    return gates.flatten(1, -2).sum(1) if gates.ndim > 2 else gates


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


def backward_all(model: nn.Module, data: Iterable[Mapping[str, Any]], loss: Loss | None = None) -> int:
    """Run every batch forward and backward in evaluation mode, gradients summing up; return the number of batches.

    Raises:
        PruningError: There is no batch.
    """
    from transformers.utils import logging  # a well-kept progress bar that honours transformers' switches

    device, was_training, count = next(model.parameters()).device, model.training, 0
    model.eval()
    try:
        for batch in logging.tqdm(data, desc="Calibrating", leave=False):
            check_batch(batch)
            moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
            (loss or model_loss)(model, moved).backward()  # type: ignore[no-untyped-call]
            count += 1
    finally:
        model.train(was_training)
    if not count:
        raise PruningError("data must hold at least one batch. Received: none")
    for parameter in model.parameters():
        if parameter.grad is not None and not is_sharded(parameter):  # FSDP has averaged its own
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
