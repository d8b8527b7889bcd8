"""What units bring: the gradient of the loss to a gate on each of them, from hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError
from ..live import Cut, LiveModel
from ..sharding import average_over_processes
from ..structure import Group, Slice
from .base import Evidence, register_evidence

_GATE: dict[str, Callable[[Tensor], Tensor]] = {
    "gate": lambda gate: gate,
    "gate_square": torch.square,
    "gate_absolute": torch.abs,
}
_DECAY = 0.95  # of the running means: about the last 20 steps that were read
_READ_FIRST, _READ_EVERY = 16, 4  # the first steps' batches are read, and then one step's of four


@register_evidence(*_GATE)
class Gates(Evidence):
    """Means of gate gradients, summed over batches, from hooks on the inputs of output projections.

    A gate multiplies everything that a unit hands to its output projection. Its gradient is the sum over tokens of
    activation times gradient: for each sample one number a unit. It needs no gradient of any weight.

    What batches bring is pending until `commit`: a step that a GradScaler leaves out counts for nothing.

    Attributes:
        means: Need -> group -> ``(units,)``.
    """

    sees_masked = True

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self.means = {need: {one.name: torch.zeros(one.units) for one in self._watched()} for need in _GATE}
        self._shut: Mapping[str, Tensor] = {}
        self._pending: dict[str, dict[str, Tensor]] = {need: {} for need in _GATE}
        self._handles: list[Any] = []

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return a running mean."""
        return self.means[need][group.name]

    def start(self) -> None:
        """Hook what hands units on: output projections once each, layers and whole blocks by what they return."""
        by_module: dict[str, list[tuple[Group, Slice]]] = {}
        for group in self._watched():
            for part in group.read:
                by_module.setdefault(part.parameter.rpartition(".")[0], []).append((group, part))
            whole = {"input": (), "change": group.modules, "output": (group.core,)}[group.gate]
            for unit, path in enumerate(whole):
                module = self.live.model.get_submodule(path)
                hook = torch.compiler.disable(self._whole(group, unit))  # type: ignore[no-untyped-call]
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for path, read in by_module.items():
            # not compiled: with a hook on a tensor inside, torch 2.13 loses what a forward sets (BERT's problem_type)
            hook = torch.compiler.disable(self._hook(read))  # type: ignore[no-untyped-call]
            self._handles.append(self.live.model.get_submodule(path).register_forward_pre_hook(hook))

    def stop(self) -> None:
        """Remove the hooks; the means stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def prepare(self, step: int, until_change: int | None) -> None:
        """Decide whether the next step's batches are read: reading takes time, and means move slowly."""
        self.active = until_change is not None and (step <= _READ_FIRST or until_change % _READ_EVERY == 0)

    def shut(self, gone: Mapping[str, Tensor]) -> None:
        """Shut the gates of masked units: what they would bring is seen, and is not there."""
        self._shut = gone

    def commit(self, scale: float = 1.0, *, may_overflow: bool = False) -> None:
        """Let what is pending count: it is of a step that was taken."""
        sound = not may_overflow or self.is_finite()
        for need, pending in self._pending.items() if sound else ():
            factor = scale ** (2 if need == "gate_square" else 1)
            for name, value in pending.items():
                self.means[need][name] = self.means[need][name].to(value.device) + value / factor
        self.discard()

    def discard(self) -> None:
        """Forget what is pending."""
        self._pending = {need: {} for need in _GATE}

    def is_finite(self) -> bool:
        """Whether all that is pending is finite."""
        return all(bool(one.isfinite().all()) for pending in self._pending.values() for one in pending.values())

    def step(self) -> None:
        """Let a step that was read count more than those before it, however many batches were in it."""
        if self.active:
            self.fade(_DECAY)

    def reset(self) -> None:
        """Forget the means, and read all batches that follow."""
        self.fade(0.0)

    def fade(self, left: float) -> None:
        """Leave of the means only a part, in [0, 1]."""
        for means in self.means.values():
            for mean in means.values():
                mean.mul_(left)

    def synchronize(self) -> None:
        """Average the means over all processes."""
        device = next(self.live.model.parameters()).device
        for means in self.means.values():
            for name, mean in means.items():
                means[name] = average_over_processes(mean.to(device)).cpu()

    def settle(self) -> None:
        """Let the model go."""
        self.stop()

    def follow(self, cut: Cut) -> None:
        """Watch what is left: modules behind a removed layer have other names, and widths are other ones."""
        super().follow(cut)
        self.discard()
        self.means = {need: cut.units(means) for need, means in self.means.items()}
        if self._handles:
            self.stop()
            self.start()

    def state_dict(self) -> dict[str, Any]:
        """Return the means."""
        return {"means": {need: _copies(means) for need, means in self.means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the means.

        Raises:
            PruningError: They are of other groups.
        """
        told, groups = state["means"], {group.name: group for group in self._watched()}
        for need, name in ((need, name) for need in _GATE for name in groups):
            found = told.get(need, {}).get(name)
            if found is None or len(found) != groups[name].units:
                raise PruningError(
                    f"The pruning state must have running means of all groups. Received: {need} of '{name}' "
                    f"{'missing' if found is None else 'of another size'}"
                )
        self.means = {need: {name: told[need][name].clone() for name in groups} for need in _GATE}
        if self._handles:
            self.stop()
            self.start()

    def _watched(self) -> list[Group]:
        wanted = set(self.groups)
        return [group for group in self.live.groups if group.name in wanted]

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
        shut = [(part, group, self._shut[group.name]) for group, part in read if group.name in self._shut]
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
            if group.gate == "change" and given is not None and given.shape == value.shape:
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


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU: a session goes on summing up in place."""
    return {name: one.detach().to("cpu", copy=True) for name, one in tensors.items()}


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
