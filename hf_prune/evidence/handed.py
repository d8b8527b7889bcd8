"""What units hand on, seen by hooks: where output projections read them, and what whole layers and branches return."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..live import LiveModel
from ..structure import Group, Slice
from .running import Running


class Place(NamedTuple):
    """Where a module reads a group's units: `where` among its inputs, in units' order; ``None``: they are all of them.

    Args:
        group: Whose units.
        part: Of its slices the one that reads.
        where: Numbers of the inputs.
    """

    group: Group
    part: Slice
    where: Tensor | None

    def units_of(self, values: Tensor) -> Tensor:
        """Return of ``(n, width)`` what each unit has, ``(n, units, entries)``."""
        own = values if self.where is None else values[:, self.where.to(values.device)]
        return own.reshape(len(own), self.group.units, -1)


class Seen(NamedTuple):
    """What a module has got of a batch.

    Args:
        module: Who reads, or who it comes from.
        value: What is read: ``(samples, …, width)``, for convolutions ``(samples, width, …)``.
        gradient: Of the loss to it; ``None`` where only the forward is looked at.
        rows: Of a packed sequence: the sample that each token belongs to.
    """

    module: nn.Module
    value: Tensor
    gradient: Tensor | None = None
    rows: Tensor | None = None


class HandedOn(Running):
    """Sums of what units hand on, of units behind shut gates too.

    `see` gets what an output projection reads, `see_whole` what a layer or branch adds: with its gradient where the
    evidence takes gradients, in the forward where it does not.
    """

    sees_masked = True

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self._shut: Mapping[str, Tensor] = {}

    def see(self, places: list[Place], seen: Seen) -> None:
        """Look at what an output projection reads."""

    def see_whole(self, group: Group, unit: int, seen: Seen, given: Tensor | None) -> None:
        """Look at what a layer changes or a branch adds (`seen`), and at what it was given."""

    def watches(self) -> bool:
        """Whether this forward counts: evaluations do not."""
        return self.active and torch.is_grad_enabled()

    def start(self) -> None:
        """Hook what hands units on: output projections once each, layers and whole blocks by what they return."""
        by_module: dict[str, list[tuple[Group, Slice]]] = {}
        for group in self.watched():
            for part in group.read:
                by_module.setdefault(part.parameter.rpartition(".")[0], []).append((group, part))
            whole = {"input": (), "change": group.modules, "output": (group.core,)}[group.gate]
            for unit, path in enumerate(whole):
                module = self.live.model.get_submodule(path)
                hook = torch.compiler.disable(self._whole(group, unit))  # type: ignore[no-untyped-call]
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for path, read in by_module.items():
            # not compiled: with a hook on a tensor inside, torch 2.13 loses what a forward sets (BERT's problem_type)
            hook = torch.compiler.disable(self._hook(read))  # type: ignore[no-untyped-call]
            self.handles.append(self.live.model.get_submodule(path).register_forward_pre_hook(hook))

    def shut(self, gone: Mapping[str, Tensor]) -> None:
        """Shut the gates of masked units: what they would bring is seen, and is not there."""
        self._shut = gone

    def _hook(self, read: list[tuple[Group, Slice]]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        places = [Place(group, part, self._index(group, part)) for group, part in read]

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            inputs, rows = args[0], None
            if not self.active:
                return None
            if isinstance(inputs, nn.utils.rnn.PackedSequence):
                rows = torch.cat([torch.arange(int(count)) for count in inputs.batch_sizes])
                inputs = inputs.data
            watching = self.watches() and inputs.is_floating_point()
            if watching and self.takes == "gradients" and not inputs.requires_grad:
                inputs.requires_grad_()  # nothing before it is trained, as under adapters
            seen, gated = inputs.detach(), self._gated(read, inputs)
            if watching:
                self._watch(gated, lambda gradient: self.see(places, Seen(module, seen, gradient, rows)))
            return None if gated is inputs else (gated, *args[1:])

        return before_forward

    def _watch(self, value: Tensor, see: Callable[[Tensor | None], None]) -> None:
        """Look now, or where the gradient of a value has come."""
        look = torch.no_grad()(see)
        if self.takes == "gradients":
            value.register_hook(look)  # type: ignore[no-untyped-call]
        else:
            look(None)

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
            if not (self.watches() and torch.is_tensor(value)):
                return
            if self.takes == "gradients" and not value.requires_grad:
                return
            given = next((one.detach() for one in (*args, *kwargs.values()) if torch.is_tensor(one)), None)
            seen = value.detach()
            if group.gate == "change" and given is not None and given.shape == value.shape:
                seen = seen - given
            self._watch(value, lambda gradient: self.see_whole(group, unit, Seen(module, seen, gradient), given))

        return after_forward

    def _index(self, group: Group, part: Slice) -> Tensor | None:
        """Return where a reader reads a group's units; ``None``: they are all that it reads, in their order."""
        index, reader = part.index(torch.arange(group.units), group.per_part), self.live.tensors[part.parameter]
        whole = torch.equal(index, torch.arange(reader.shape[part.dim]))
        return None if whole else index.to(reader.device)


def by_sample(seen: Seen, product: Tensor) -> Tensor:
    """Sum what a module reads over all but samples and width, ``(samples, width)``.

    Args:
        seen: It says which axis is which.
        product: Of the shape of what was read, such as activation times gradient.
    """
    if seen.rows is not None:
        values = product.float()
        none = values.new_zeros(int(seen.rows.max()) + 1, values.shape[-1])
        return none.index_add(0, seen.rows.to(values.device), values)
    values = width_last(seen.module, product)
    return values.flatten(1, -2).sum(1, dtype=torch.float32) if values.ndim > 2 else values.float()


def width_last(module: nn.Module, values: Tensor) -> Tensor:
    """Return what a module reads with samples first and width last."""
    if isinstance(module, nn.RNNBase) and not module.batch_first and values.ndim == 3:
        return values.transpose(0, 1)  # time comes first
    return values.movedim(1, -1) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else values
