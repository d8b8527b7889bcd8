"""What scores need from data: the gradient of the loss to a gate on each unit, and gradients of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PruningError
from .given import check_batch
from .sharding import is_sharded
from .structure import Group, Slice

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_LARGEST_SCALE, _SMALLEST_SCALE = 2.0**15, 2.0**-14  # of a float16 model's loss
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

    What batches bring is pending until `commit`: a step that a GradScaler leaves out counts for nothing.

    Attributes:
        means: What scores need (`scores.NEEDS`) -> group -> ``(units,)``.
        shut: Group -> which of its units' gates are shut while `gating`, ``(units,)`` boolean, True = shut: the unit is
            computed and hands on zeros, so that what it would bring is seen.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, list(groups)
        self.means = {need: {group.name: torch.zeros(group.units) for group in groups} for need in _GATE}
        self._pending: dict[str, dict[str, Tensor]] = {need: {} for need in _GATE}
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
        self.discard()
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

    def commit(self, scale: float = 1.0, *, may_overflow: bool = False) -> None:
        """Let what is pending count: it is of a step that was taken.

        Args:
            scale: What the loss was multiplied by, as a GradScaler does.
            may_overflow: Whether numbers that are not finite tell of a scale that is too large, and are left out.
        """
        sound = not may_overflow or self.is_finite()
        for need, pending in self._pending.items() if sound else ():
            factor = scale ** (2 if need == "gate_square" else 1)
            for name, value in pending.items():
                self.means[need][name] = self.means[need][name].to(value.device) + value / factor
        self.discard()

    def fade(self, left: float) -> None:
        """Leave of the means only a part, in [0, 1]: by steps of an optimizer, however many batches are in one."""
        for means in self.means.values():
            for mean in means.values():
                mean.mul_(left)

    def discard(self) -> None:
        """Forget what is pending."""
        self._pending = {need: {} for need in _GATE}

    def is_finite(self) -> bool:
        """Whether all that is pending is finite."""
        return all(bool(one.isfinite().all()) for pending in self._pending.values() for one in pending.values())

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
                self._see(read, _by_sample(module, seen.float() * gradient.float(), rows))

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
                product = seen.float() * gradient.float()  # in half precision it would underflow
                self._add(group, slice(unit, unit + 1), product.flatten(1).sum(1, keepdim=True))

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
            pending = self._pending[need]
            if group.name not in pending:  # where the gates are: a copy to the CPU would wait for a GPU
                pending[group.name] = torch.zeros(group.units, device=gate.device)
            pending[group.name][units] += of(gate).mean(0)


def _by_sample(module: nn.Module, product: Tensor, rows: Tensor | None) -> Tensor:
    """Sum what a module reads over all but samples and width, ``(samples, width)``.

    Args:
        module: The reader; it says which axis is which.
        product: Activation times gradient: ``(samples, …, width)``, for convolutions ``(samples, width, …)``; float32.
        rows: Of a packed sequence: the sample that each token belongs to.
    """
    gates = product
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


def backward_all(
    model: nn.Module, data: Iterable[Mapping[str, Any]], loss: Loss | None = None, watcher: GateWatcher | None = None
) -> float:
    """Run every batch forward and backward in evaluation mode, gradients summing up.

    Args:
        model: The live model, not wrapped.
        data: Batches.
        loss: From (model, batch) to a loss; ``None``: the model's own.
        watcher: What it sees of the batches counts.

    Returns:
        The factor that the gradients still have. Those of a float16 model would vanish, or overflow: its loss is
        multiplied by as much as it takes (Micikevicius et al. 2018, arXiv:1710.03740).

    Raises:
        PruningError: There is no batch.
    """
    from transformers.utils import logging  # a well-kept progress bar that honours transformers' switches

    parameters = list(model.parameters())
    device = parameters[0].device
    half = any(one.dtype == torch.float16 for one in parameters) and not any(map(is_sharded, parameters))
    scale, count, modes = _LARGEST_SCALE if half else 1.0, 0, [(one, one.training) for one in model.modules()]
    model.eval()
    try:
        for batch in logging.tqdm(data, desc="Calibrating", leave=False):
            check_batch(batch)
            moved = {key: one.to(device) if torch.is_tensor(one) else one for key, one in batch.items()}
            scale = _backward(functools.partial(loss or model_loss, model, moved), parameters, watcher, scale)
            count += 1
    finally:
        for module, training in modes:
            module.training = training
    if not count:
        raise PruningError("data must hold at least one batch. Received: none")
    return _average_gradients(parameters, scale)


def _backward(
    compute: Callable[[], Tensor], parameters: Sequence[Tensor], watcher: GateWatcher | None, scale: float
) -> float:
    """Add one batch to the gradients; return the scale that they have now, smaller where this batch has overflowed."""
    if scale == 1.0:
        compute().backward()  # type: ignore[no-untyped-call]
    else:
        scale = _backward_scaled(compute, parameters, watcher, scale)
    if watcher is not None:
        watcher.commit(scale)
    return scale


def _backward_scaled(
    compute: Callable[[], Tensor], parameters: Sequence[Tensor], watcher: GateWatcher | None, scale: float
) -> float:
    before = [one.grad for one in parameters]
    while True:
        for one in parameters:
            one.grad = None
        (compute().float() * scale).backward()  # type: ignore[no-untyped-call]
        seen = [one.grad for one in parameters if one.grad is not None]
        if all(bool(one.isfinite().all()) for one in seen) and (watcher is None or watcher.is_finite()):
            break
        if scale < _SMALLEST_SCALE:  # it is not the scale: whoever reads scores says which are not finite
            break
        scale /= 4
        before = [None if one is None else one / 4 for one in before]
        if watcher is not None:
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


def max_over_processes(number: float) -> float:
    """Return the largest of all processes' numbers."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, number)
    return float(max(everyone))


def average_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; where there is one, the tensor itself."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
