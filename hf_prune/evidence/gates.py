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

_NEEDS = ("gate", "gate_square", "gate_absolute")
_DECAY = 0.95  # of the running means: about the last 20 steps that were read
_READ_FIRST, _READ_EVERY = 16, 4  # the first steps' batches are read, and then one step's of four


@register_evidence(*_NEEDS)
class Gates(Evidence):
    """Means of gate gradients, summed over batches, from hooks on the inputs of output projections.

    A gate multiplies everything that a unit hands to its output projection. Its gradient is the sum over tokens of
    activation times gradient: for each sample one number a unit. It needs no gradient of any weight.

    What batches bring is pending until `commit`: a step that a GradScaler leaves out counts for nothing. All needs of
    a group lie in one tensor, ``(needs, units)``, where its gates are: each small call costs a GPU's host more than
    the sum itself.
    """

    sees_masked = True

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self._means = {group.name: torch.zeros(len(_NEEDS), group.units) for group in self._watched()}
        self._shut: Mapping[str, Tensor] = {}
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def means(self) -> dict[str, dict[str, Tensor]]:
        """Need -> group -> ``(units,)``."""
        return {need: {name: mean[row] for name, mean in self._means.items()} for row, need in enumerate(_NEEDS)}

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return a running mean."""
        return self._means[group.name][_NEEDS.index(need)]

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
        self._fold()
        pending = self._pending if not may_overflow or self.is_finite() else {}
        for name, value in pending.items():
            self._means[name] = self._means[name].to(value.device)
        if scale != 1:
            powers = torch.tensor([[scale], [scale**2], [scale]])
            pending = {name: value / powers.to(value.device) for name, value in pending.items()}
        if pending:
            torch._foreach_add_([self._means[name] for name in pending], list(pending.values()))
        self.discard()

    def discard(self) -> None:
        """Forget what is pending."""
        self._seen, self._pending = {}, {}

    def is_finite(self) -> bool:
        """Whether all that is pending is finite."""
        self._fold()
        by_device: dict[torch.device, list[Tensor]] = {}
        for one in self._pending.values():
            by_device.setdefault(one.device, []).append(one.flatten())
        return all(bool(torch.cat(those).isfinite().all()) for those in by_device.values())

    def step(self) -> None:
        """Let a step that was read count more than those before it, however many batches were in it."""
        if self.active:
            self.fade(_DECAY)

    def reset(self) -> None:
        """Forget the means, and read all batches that follow."""
        self.fade(0.0)

    def fade(self, left: float) -> None:
        """Leave of the means only a part, in [0, 1]."""
        if self._means:
            torch._foreach_mul_(list(self._means.values()), left)

    def synchronize(self) -> None:
        """Average the means over all processes."""
        device = next(self.live.model.parameters()).device
        self._means = {name: average_over_processes(mean.to(device)) for name, mean in self._means.items()}

    def settle(self) -> None:
        """Let the model go."""
        self.stop()

    def follow(self, cut: Cut) -> None:
        """Watch what is left: modules behind a removed layer have other names, and widths are other ones."""
        super().follow(cut)
        self.discard()
        self._means = _stacked({need: cut.units(means) for need, means in self.means.items()})
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
        for need, name in ((need, name) for need in _NEEDS for name in groups):
            found = told.get(need, {}).get(name)
            if found is None or len(found) != groups[name].units:
                raise PruningError(
                    f"The pruning state must have running means of all groups. Received: {need} of '{name}' "
                    f"{'missing' if found is None else 'of another size'}"
                )
        self._means = _stacked({need: {name: told[need][name] for name in groups} for need in _NEEDS})
        if self._handles:
            self.stop()
            self.start()

    def _watched(self) -> list[Group]:
        wanted = set(self.groups)
        return [group for group in self.live.groups if group.name in wanted]

    def _hook(self, read: list[tuple[Group, Slice]]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        places = [(group, self._index(group, part)) for group, part in read]

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
                self._see(places, _by_sample(module, _product(seen, gradient), rows))

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
                gate = _product(seen, gradient).flatten(1).sum(1, keepdim=True, dtype=torch.float32)
                self._add(group, unit, gate)

            value.register_hook(see)  # type: ignore[no-untyped-call]

        return after_forward

    @torch.no_grad()
    def _see(self, places: list[tuple[Group, Tensor | None]], gates: Tensor) -> None:
        """Add one batch, ``(samples, width)``."""
        for group, index in places:
            own = gates if index is None else gates[:, index.to(gates.device)]
            if own.shape[1] > group.units:
                own = own.reshape(len(own), group.units, -1).sum(-1)
            self._add(group, 0, own)

    def _add(self, group: Group, first: int, gate: Tensor) -> None:
        """Take the gate gradients of one batch, ``(samples, units)``, of units from `first` on."""
        if (group.name, first) in self._seen:
            self._fold()  # what accumulates over batches does so as means
        self._seen[group.name, first] = gate

    @torch.no_grad()
    def _fold(self) -> None:
        """Let what was seen of a batch be pending: all groups at once, where the gates are."""
        alike: dict[tuple[torch.device, int], list[tuple[str, int]]] = {}
        for key, gate in self._seen.items():
            alike.setdefault((gate.device, len(gate)), []).append(key)
        for keys in alike.values():
            found = [self._seen[key] for key in keys]
            gates = torch.cat(found, 1)
            means = torch.stack([gates, gates.square(), gates.abs()]).mean(1)
            for (name, first), mean in zip(keys, torch.split(means, [one.shape[1] for one in found], 1)):
                units = self._means[name].shape[1]
                if name not in self._pending:
                    whole = mean.shape[1] == units
                    self._pending[name] = mean if whole else mean.new_zeros(len(_NEEDS), units)
                    if whole:
                        continue
                self._pending[name][:, first : first + mean.shape[1]] += mean
        self._seen = {}

    def _index(self, group: Group, part: Slice) -> Tensor | None:
        """Return where a reader reads a group's units; ``None``: they are all that it reads, in their order."""
        index, reader = part.index(torch.arange(group.units), group.per_part), self.live.tensors[part.parameter]
        whole = torch.equal(index, torch.arange(reader.shape[part.dim]))
        return None if whole else index.to(reader.device)


def _product(seen: Tensor, gradient: Tensor) -> Tensor:
    """Return activation times gradient: in float32, as fp16 would underflow; bf16 has the range, and less to move."""
    if seen.dtype == gradient.dtype == torch.bfloat16:
        return seen * gradient
    return (seen.float() * gradient).float()


def _stacked(means: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what is by need and group by group, all needs in one tensor."""
    return {name: torch.stack([means[need][name] for need in _NEEDS]) for name in means[_NEEDS[0]]}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU: a session goes on summing up in place."""
    return {name: one.detach().to("cpu", copy=True) for name, one in tensors.items()}


def _by_sample(module: nn.Module, product: Tensor, rows: Tensor | None) -> Tensor:
    """Sum what a module reads over all but samples and width, ``(samples, width)``.

    Args:
        module: The reader; it says which axis is which.
        product: Activation times gradient: ``(samples, …, width)``, for convolutions ``(samples, width, …)``.
        rows: Of a packed sequence: the sample that each token belongs to.
    """
    gates = product
    if rows is not None:
        gates = gates.float()
        return gates.new_zeros(int(rows.max()) + 1, gates.shape[-1]).index_add(0, rows.to(gates.device), gates)
    if isinstance(module, nn.RNNBase) and not module.batch_first:
        gates = gates.transpose(0, 1)  # time comes first
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        gates = gates.movedim(1, -1)
    return gates.flatten(1, -2).sum(1, dtype=torch.float32) if gates.ndim > 2 else gates.float()
