"""Numbers that are learned beside a model: an Adam of their own, and the price that makes them meet a goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from .base import Aim

_RATE, _HIGHEST_RATE = 0.01, 0.1  # CoFi's learning rate, and what a short run may have
_WAY = 10.0  # how far a value can go until its goal is reached
_PRICES = (0.0, 10.0)  # a and b at first
How = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Learned:
    """Tensors by name that an Adam changes; they can be cut and saved under their names, moments with them.

    Attributes:
        values: The tensors.
        steps: How many steps were taken.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.values: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Learn these too, from where they are."""
        self.values |= values
        self._first |= {name: torch.zeros_like(one) for name, one in values.items()}
        self._second |= {name: torch.zeros_like(one) for name, one in values.items()}

    @torch.no_grad()
    def descend(self, gradients: Mapping[str, Tensor], rate: float = _RATE) -> None:
        """Take one step down these gradients; what has none does as if it were zero.

        Args:
            gradients: By name, of the values' shapes.
            rate: The learning rate; the order of values that only move does not depend on it.
        """
        values = list(self.values.values())
        steps = [torch.tensor(float(self.steps)) for _ in values]
        named = self.values.items()
        adam(
            values,
            [gradients[name].to(one) if name in gradients else torch.zeros_like(one) for name, one in named],
            list(self._first.values()),
            list(self._second.values()),
            [],
            steps,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        self.steps += 1

    def change(self, how: How) -> None:
        """Let all be changed alike: cut, or handed over."""
        self.values, self._first, self._second = how(self.values), how(self._first), how(self._second)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(one.nbytes for held in (self.values, self._first, self._second) for one in held.values())

    def state_dict(self, how: How) -> dict[str, Any]:
        """Return the values, their moments, and how many steps were taken."""
        held = {"values": self.values, "first": self._first, "second": self._second}
        return {**{key: how(one) for key, one in held.items()}, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], how: How) -> None:
        """Take up what `state_dict` returned."""
        self.values, self._first, self._second = (how(state[key]) for key in ("values", "first", "second"))
        self.steps = state["steps"]


class Lagrangian:
    """The price of what is open: it rises while more is open than is to remain, and falls below nothing where less is.

    With e = (expected share that is left) - (goal), the loss has ``N (a e + b e^2)`` more, as in Wang, Wohlwend and Lei
    2020 (arXiv:1910.04732) and CoFi (Xia et al. 2022, arXiv:2204.00408); N = 1 / (mean share that one unit costs) makes
    ``a`` the price of a mean unit in the unit of the loss, however many there are. An Adam lets ``a`` and ``b``
    ascend.
    """

    def __init__(self) -> None:
        self._prices = Learned()

    def price(self, aims: Sequence[Aim], opened: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """Return the derivative of this loss by how open each unit is, and let prices go one step.

        Args:
            aims: What is to remain.
            opened: How open units or weights are, in [0, 1], by name.
            rate: The prices' learning rate.
        """
        slopes, found, ascent = dict[str, Tensor](), {str(i): torch.tensor(_PRICES) for i in range(len(aims))}, {}
        self._prices.add({name: one for name, one in found.items() if name not in self._prices.values})
        for number, aim in enumerate(aims):
            excess = _left(aim, opened) - aim.goal
            linear, square = self._prices.values[str(number)].tolist()
            units = sum(one.numel() for name, one in opened.items() if name in aim.costs)
            mean = sum(aim.costs[name] * one.numel() for name, one in opened.items() if name in aim.costs) / units
            for name in aim.costs.keys() & opened.keys():
                slope = (linear + 2 * square * excess) * aim.costs[name] / mean
                slopes[name] = slope * _alive(aim, name, opened[name])
            ascent[str(number)] = -torch.tensor([excess, excess**2])
        self._prices.descend(ascent, rate)
        return slopes

    def state_dict(self) -> dict[str, Any]:
        """Return the prices."""
        return self._prices.state_dict(copies)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._prices.load_state_dict(state, copies)


def rate_of(aims: Sequence[Aim]) -> float:
    """Return a learning rate for values under these aims: CoFi's, and a larger one where a run is short."""
    steps = min((aim.steps for aim in aims), default=1)
    return min(max(_RATE, _WAY / steps), _HIGHEST_RATE) if aims else _RATE


def _alive(aim: Aim, name: str, like: Tensor) -> Tensor:
    return aim.alive[name].to(like) if name in aim.alive else torch.ones_like(like)


def _left(aim: Aim, opened: Mapping[str, Tensor]) -> float:
    """Return the share that is expected to be left."""
    total = aim.fixed
    for name, cost in aim.costs.items():
        if name in opened:
            total += cost * float((opened[name] * _alive(aim, name, opened[name])).sum())
        else:
            total += cost * int(aim.alive[name].sum())
    return total


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU."""
    return {name: one.detach().to("cpu", copy=True) for name, one in tensors.items()}
