"""L0 regularisation: stochastic gates on units, learned beside the model until a goal is met."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError
from ..live import Cut, LiveModel
from ..sharding import average_over_processes, scale_along
from ..structure import Group, Slice
from .base import Evidence, MissingEvidence, register_evidence
from .learning import Lagrangian, Learned, copies, rate_of

_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # temperature and stretch of the paper
_SHIFT = -_BETA * math.log(-_LOW / _HIGH)
_OPEN = 2.5  # log alpha at first: a gate is 1 in evaluation, and open in 98 of 100 draws


@register_evidence("l0")
class HardConcrete(Evidence):
    """Hard-concrete gates (Louizos, Welling and Kingma 2018, arXiv:1712.01312), one for each unit.

    With u uniform in (0, 1), ``s = sigmoid((log u - log(1 - u) + log_alpha) / beta)`` and ``z = clamp(1.2 s - 0.1, 0,
    1)``, and a gate multiplies what a unit hands to its output projection: in training by z, drawn anew for each step;
    in evaluation by ``clamp(1.2 sigmoid(log_alpha) - 0.1, 0, 1)``. It is open with probability ``P = sigmoid(log_alpha
    - beta log(0.1 / 1.1))``, which is the score. `log_alpha` is learned by an Adam of its own, from the gradient of
    the loss through z, and from a `Lagrangian` that asks for what is to remain: in multiply-accumulates, parameters,
    time.

    When masks change for the last time, the gates of evaluation are multiplied into the output projections of the units
    that stay, and the model is itself again. All processes draw the same.
    """

    late = True
    learns = True

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self._check()
        self._gates, self._prices = Learned(), Lagrangian()
        self._gates.add({group.name: torch.full((group.units,), _OPEN) for group in self._watched()})
        self._leaves = self._fresh_leaves()
        self._drawn: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return how likely each gate is open.

        Raises:
            MissingEvidence: The gates have learned nothing yet.
        """
        if not self._gates.steps:
            raise MissingEvidence(
                "gates that have learned: train with it, from the training batches themselves (without data=), and let "
                "the first change come later than the first step."
            )
        return torch.sigmoid(self._gates.values[group.name] + _SHIFT)

    # batches
    def start(self) -> None:
        """Put a gate before each output projection."""
        for group in self._watched():
            for part in group.read:
                hook = torch.compiler.disable(self._gate(group, part))  # type: ignore[no-untyped-call]
                self._handles.append(self.live.model.get_submodule(part.module).register_forward_pre_hook(hook))

    def stop(self) -> None:
        """Take the gates away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def prepare(self, step: int, until_change: int | None) -> None:
        """Draw for the next step: by its number, so that a resumed run draws the same."""
        for name, value in self._gates.values.items():
            seed = zlib.crc32(f"{self.seed} {step} {name}".encode())
            drawn = torch.rand(len(value), generator=torch.Generator().manual_seed(seed))
            self._drawn[name] = drawn.clamp(1e-6, 1 - 1e-6).logit()

    def commit(self, scale: float = 1.0, *, may_overflow: bool = False) -> None:
        """Let gradients of gates be as large as those of the loss; leave out those that have overflowed."""
        for leaf in self._leaves.values():
            if leaf.grad is not None and may_overflow and not bool(leaf.grad.isfinite().all()):
                leaf.grad = None
            elif leaf.grad is not None:
                leaf.grad /= scale

    def discard(self) -> None:
        """Forget the gradients of gates."""
        for leaf in self._leaves.values():
            leaf.grad = None

    # steps
    def step(self) -> None:
        """Learn: from the loss, and from what is to remain."""
        if not self._gates.values:
            return
        device = next(self.live.model.parameters()).device
        found = {name: one.grad for name, one in self._leaves.items() if one.grad is not None}
        slopes = {name: average_over_processes(found[name].to(device)).cpu() for name in sorted(found)}
        opened = {name: torch.sigmoid(one + _SHIFT) for name, one in self._gates.values.items()}
        rate = rate_of(self.aims)
        for name, price in self._prices.price(self.aims, opened, rate).items():
            slopes[name] = slopes.get(name, 0) + price * opened[name] * (1 - opened[name])
        self._gates.descend(slopes, rate)
        self.discard()

    def settle(self) -> None:
        """Multiply what is left of the gates into the output projections, and let the model go."""
        self.stop()
        with torch.no_grad():
            for group in (one for one in self._watched() if one.name in self._gates.values):
                gates = _in_evaluation(self._gates.values[group.name])
                for part in group.read:
                    index = part.index(torch.arange(group.units), group.per_part)
                    tensor = self.live.tensors[part.parameter]
                    scale_along(tensor, part.dim, index, gates.repeat_interleave(part.per_unit))
        self._gates.change(lambda named: {})
        self._leaves = {}

    # a part of a session
    def follow(self, cut: Cut) -> None:
        """Keep the gates of what is left, and what this step's batches have brought."""
        super().follow(cut)
        brought = cut.units({name: one.grad for name, one in self._leaves.items() if one.grad is not None})
        self._gates.change(cut.units)
        self._leaves = self._fresh_leaves()
        for name, gradient in brought.items():
            self._leaves[name].grad = gradient
        self._again()

    def state_dict(self) -> dict[str, Any]:
        """Return gates and prices."""
        return {"gates": self._gates.state_dict(copies), "prices": self._prices.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            PruningError: It is of other groups.
        """
        told, units = state["gates"]["values"], {group.name: group.units for group in self._watched()}
        if told and {name: len(one) for name, one in told.items()} != units:
            raise PruningError(f"The pruning state must have gates of all groups. Received: {sorted(told)[:4]}")
        self._gates.load_state_dict(state["gates"], copies)
        self._prices.load_state_dict(state["prices"])
        self._leaves = self._fresh_leaves()
        self._again()

    def _again(self) -> None:
        if self._handles:
            self.stop()
            self.start()

    def _watched(self) -> list[Group]:
        return [group for group in self.live.groups if group.name in set(self.groups)]

    def _fresh_leaves(self) -> dict[str, Tensor]:
        """Return tensors that share the gates' memory, and collect gradients."""
        return {name: one.detach().requires_grad_() for name, one in self._gates.values.items()}

    def _check(self) -> None:
        for group in self._watched():
            readers = [self.live.model.get_submodule(part.module) for part in group.read]
            linear = [isinstance(one, nn.Linear) or type(one).__name__ == "Conv1D" for one in readers]
            if not readers or not all(linear):
                raise PruningError(
                    "Gates are learned where a Linear reads units: of heads, KV groups and neurons, but not of stacked "
                    f"experts, layers, branches and channels. Received: score='l0' for '{group.name}'"
                )

    def _gate(self, group: Group, part: Slice) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        index = part.index(torch.arange(group.units), group.per_part)

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs, leaf = args[0], self._leaves[group.name]
            gates = _drawn(leaf, self._drawn[group.name]) if module.training else _in_evaluation(leaf.detach())
            every = torch.ones(inputs.shape[-1]).scatter(0, index, gates.repeat_interleave(part.per_unit))
            every = every.to(inputs.device)
            if inputs.dtype == torch.float16:  # a gate's gradient is a sum over all tokens, which would overflow
                return (inputs.float() * every).to(inputs.dtype), *args[1:]
            return inputs * every.to(inputs.dtype), *args[1:]

        return before_forward


def _drawn(log_alpha: Tensor, logit: Tensor) -> Tensor:
    """Return gates of training."""
    return (torch.sigmoid((logit + log_alpha) / _BETA) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _in_evaluation(log_alpha: Tensor) -> Tensor:
    """Return gates of evaluation."""
    return (torch.sigmoid(log_alpha) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
