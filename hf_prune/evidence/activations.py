"""What units hand on and what weights get: means, mean absolutes, second moments, norms; streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError
from ..live import Cut, LiveModel
from ..sharding import whole
from ..structure import Group
from .base import MissingEvidence, register_evidence
from .handed import HandedOn, Place, Seen, by_sample
from .running import Running
from .tokens import Tokens

_UNIT_NEEDS = ("activation_mean", "activation", "activation_square", "contribution")
_INPUT_NEEDS = ("input_mean", "input_absolute", "input_square")


@register_evidence(*_UNIT_NEEDS)
class Activations(HandedOn):
    """Means over tokens of what units hand on: plain, absolute and squared, and of what comes of it.

    A head's numbers are means over its entries. Its contribution is the squared norm of what it adds to the output,
    ``||W_u a_u||^2`` with the columns of the output projection that read it; of a convolution's kernel all entries
    count as if they saw different pixels. Of a layer they are of what it changes, of a branch of what it adds.
    """

    takes = "forwards"
    rows = (*_UNIT_NEEDS, "count")
    powers = (0,) * 5

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self._tokens = Tokens()

    def start(self) -> None:
        """Hook what hands units on, and the model: it is told of padding."""
        super().start()
        self.handles.append(self._tokens.watch(self.live.model))

    def see(self, places: list[Place], seen: Seen) -> None:
        """Add one batch, of what an output projection reads."""
        tokens = self._tokens.of(seen)
        for place in places:
            own = place.units_of(tokens)
            reader = whole(seen.module.get_parameter(place.part.parameter.rpartition(".")[2]))
            self._add(place.group, 0, own, _contribution(own, place, reader.detach().to(own.dtype)))

    def see_whole(self, group: Group, unit: int, seen: Seen, given: Tensor | None) -> None:
        """Add one batch, of what a layer changes or a branch adds."""
        own = self._tokens.flat(seen.value)[:, None]
        self._add(group, unit, own, own.square().sum((0, 2)))

    def _add(self, group: Group, first: int, own: Tensor, contribution: Tensor) -> None:
        """Add what units have of each token, ``(tokens, units, entries)``."""
        sums = [one.mean(-1).sum(0) for one in (own, own.abs(), own.square())]
        count = torch.full_like(contribution, len(own))
        self.add(group.name, torch.stack([*sums, contribution, count]), first)


def _contribution(own: Tensor, place: Place, reader: Tensor) -> Tensor:
    """Return the sum over tokens of ``||W_u a_u||^2`` as ``tr(W_u G_u W_u^T)``, G_u: sum of ``a_u a_u^T``."""
    columns = reader.movedim(place.part.dim, 0).flatten(1)
    index = place.part.index(torch.arange(place.group.units), place.group.per_part).to(reader.device)
    read = columns[index].view(place.group.units, own.shape[2], -1)
    grams = own.movedim(1, 0).transpose(1, 2) @ own.movedim(1, 0)  # of each unit, entries by entries
    return ((grams @ read) * read).sum((1, 2))


@register_evidence("activation_gradient")
class ActivationGradients(HandedOn):
    """Means over samples of ``sum |dL/da|`` over tokens: a head's is a mean over its entries."""

    rows = ("activation_gradient",)
    powers = (1,)

    def see(self, places: list[Place], seen: Seen) -> None:
        """Add one batch, of what an output projection reads."""
        assert seen.gradient is not None
        sizes = by_sample(seen, seen.gradient.float().abs()).mean(0, keepdim=True)
        for place in places:
            self.add(place.group.name, place.units_of(sizes).mean(-1))

    def see_whole(self, group: Group, unit: int, seen: Seen, given: Tensor | None) -> None:
        """Add one batch, of what a layer changes or a branch adds."""
        assert seen.gradient is not None
        tokens = seen.gradient.float().abs().mean(-1)
        self.add(group.name, tokens.flatten(1).sum(1).mean().view(1, 1), unit)


@register_evidence(*_INPUT_NEEDS, "input_norm")
class Inputs(Running):
    """Means over tokens of what each column of a weight is multiplied with, and the root of the second moment.

    Of a convolution's weight it is the channel that an entry reads, over all pixels.
    """

    takes = "forwards"
    rows = (*_INPUT_NEEDS, "count")
    powers = (0,) * 4

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        if groups:
            raise PruningError(
                "Norms of inputs are of single weights: use WeightPruner, or of units score='output_norm'. Received: "
                f"a pruner of {', '.join(list(groups)[:2])} …"
            )
        self._tokens = Tokens()
        super().__init__(live, groups, weights, seed)

    def sizes(self) -> dict[str, int]:
        """Return how many inputs the module of each parameter reads."""
        tensors = self.live.tensors
        return {name: _inputs_of(self._module(name), name, tensors[name]) for name in self.weights}

    def start(self) -> None:
        """Hook each module that has one of these weights, and the model: it is told of padding."""
        self.handles.append(self._tokens.watch(self.live.model))
        for name in self.weights:
            hook = torch.compiler.disable(self._hook(name))  # type: ignore[no-untyped-call]
            self.handles.append(self._module(name).register_forward_pre_hook(hook))

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return a mean for each weight, of its shape; 0 where nothing has come, as to an expert without tokens.

        Raises:
            MissingEvidence: No batch was seen.
        """
        if not any(bool(one[-1].any()) for one in self.sums.values()):
            raise MissingEvidence("inputs of batches, of which none was seen: train, or pass data=.")
        means = self.mean("input_square", name).sqrt() if need == "input_norm" else self.mean(need, name)
        return _spread(means, self._module(name), weight.shape).to(weight.device)

    def remaining(self, cut: Cut) -> dict[str, Tensor]:
        """Return of the sums what has stayed; where inputs of grouped channels have left, they begin anew."""
        sums, sizes = {}, self.sizes()
        for before, old in self.sums.items():
            name = cut.names.get(before)
            if name is None:
                continue
            vector = cut.vectors.get((before, _axis(self._module(name)) or 0))
            kept = old if vector is None else old[:, vector.nonzero().view(-1).to(old.device)]
            sums[name] = kept if kept.shape[1] == sizes[name] else old.new_zeros(len(self.rows), sizes[name])
        return sums

    def _module(self, name: str) -> nn.Module:
        return self.live.model.get_submodule(name.rpartition(".")[0])

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not (self.active and torch.is_grad_enabled()):
                return
            with torch.no_grad():
                tokens = self._tokens.of(Seen(module, args[0].detach()))
                sums = [one.sum(0) for one in (tokens, tokens.abs(), tokens.square())]
                self.add(name, torch.stack([*sums, torch.full_like(sums[0], len(tokens))]))

        return before_forward


def _axis(module: nn.Module) -> int | None:
    """Return along which axis of its weight a module's inputs lie; ``None``: one by one they do not."""
    if type(module).__name__ == "Conv1D":  # transformers' transposed Linear
        return 0
    return 1 if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None


def _inputs_of(module: nn.Module, name: str, weight: Tensor) -> int:
    axis = _axis(module)
    if axis is None:
        raise PruningError(
            "Norms of inputs are those of Linear, Conv1D and Conv1d to 3d; leave other weights out by exclude. "
            f"Received: '{name}' of {type(module).__name__}"
        )
    return int(weight.shape[axis]) * int(getattr(module, "groups", 1))


def _spread(inputs: Tensor, module: nn.Module, shape: torch.Size) -> Tensor:
    """Return what is known of each input for each weight that reads it."""
    if _axis(module) == 0:
        return inputs[:, None].expand(shape)
    groups = int(getattr(module, "groups", 1))  # each group of outputs reads its own share of the inputs
    rows = inputs.view(groups, 1, -1).expand(groups, shape[0] // groups, -1).reshape(shape[:2])
    return rows.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
