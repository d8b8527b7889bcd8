"""Movement by an Adam of its own, as its paper trains scores; and soft movement, whose scores meet a goal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..live import Cut, Masking
from ..sharding import join, local
from ..structure import Group
from .base import MissingEvidence, register_evidence
from .gates import Gates
from .gradient import Gradients
from .learning import Lagrangian, Learned, copies, rate_of

_NONE = (
    "scores that have learned: train with it, from the training batches themselves (without data=), and let the first "
    "change come later than the first step."
)


@register_evidence("movement_adam")
class AdamMovement(Gradients):
    """A score of each weight, from 0, that an Adam moves by the straight-through gradient ``w * dL/dw``.

    Sanh, Wolf and Rush 2020, arXiv:2005.07683: the plain sum (`Movement`) weighs steps by their gradients, and an Adam
    each by the size that gradients of this very weight usually have. Of a masked weight, w is its last value.
    """

    of_step = False
    heavy = True
    late = True
    first = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scores, self._slopes = Learned(), dict[str, Tensor]()

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return the scores of a parameter.

        Raises:
            MissingEvidence: No step was taken yet.
        """
        if name not in self._scores.values or not self._scores.steps:
            raise MissingEvidence(_NONE)
        return join(self._scores.values[name], weight)

    @torch.no_grad()
    def read(self, masking: Masking, ahead: Collection[str]) -> None:
        """Remember what these gradients say of scores, and score what is new."""
        tensors = self.live.tensors
        for name in (one for one in self.weights if one in ahead):
            full, gradient = masking.full(name, tensors[name]).float(), local(self.of_part(name, tensors[name])).float()
            self._slopes[name] = full * gradient / self.scale
            if name not in self._scores.values:
                self._scores.add({name: torch.full_like(full, self.first)})

    def discard(self) -> None:
        """Forget gradients of a step that was not taken."""
        self._slopes = {}

    def step(self) -> None:
        """Learn."""
        if self._scores.values:
            self._scores.descend(self._slopes)
        self._slopes = {}

    def settle(self) -> None:
        """Give the memory back."""
        self._slopes = {}
        self._scores.change(lambda named: {})

    @property
    def nbytes(self) -> int:
        """Sixteen bytes a weight: the score, two moments and the gradient."""
        return self._scores.nbytes + sum(one.nbytes for one in self._slopes.values())

    def follow(self, cut: Cut) -> None:
        """Keep the scores of what is left."""
        super().follow(cut)
        self._slopes = cut.tensors(self._slopes)
        self._scores.change(cut.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return whole scores and moments."""
        return {"scores": self._scores.state_dict(self.live.whole)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up whole scores and moments."""
        self._slopes = {}
        self._scores.load_state_dict(state["scores"], self.live.local)


@register_evidence("soft_movement")
class SoftMovement(AdamMovement):
    """Scores S as `AdamMovement`'s, whose ``sigmoid(S)`` a `Lagrangian` presses down to the share that is to remain.

    Sanh, Wolf and Rush 2020 (arXiv:2005.07683) keep what lies above a threshold, and penalise ``lambda * mean
    sigmoid(S)`` with a lambda that is found by trying. Here lambda is the multiplier, so that scores and threshold
    come together: what scores least is cut, exactly as much as the sparsity says.
    """

    learns = True
    first = 3.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.live.sharded:
            raise PruningError("Soft movement needs whole parameters. Received: a model sharded by FSDP")
        self._prices = Lagrangian()

    def of_weight(self, need: str, name: str, weight: Tensor) -> Tensor:
        """Return ``sigmoid(S)``."""
        return super().of_weight(need, name, weight).sigmoid()

    def step(self) -> None:
        """Learn, and pay for what is open."""
        opened = {name: one.sigmoid() for name, one in self._scores.values.items()}
        rate = rate_of(self.aims)
        for name, price in self._prices.price(self.aims, opened, rate).items() if opened else ():
            slope = price * opened[name] * (1 - opened[name])
            self._slopes[name] = self._slopes[name] + slope if name in self._slopes else slope
        if opened:
            self._scores.descend(self._slopes, rate)
        self._slopes = {}

    def state_dict(self) -> dict[str, Any]:
        """Return whole scores and moments, and prices."""
        return {**super().state_dict(), "prices": self._prices.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state)
        self._prices.load_state_dict(state["prices"])


@register_evidence("gate_adam")
class AdamGates(Gates):
    """A score of each unit, from 0, that an Adam moves by the gradient of the loss to a gate on it."""

    late = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scores = Learned()
        self._scores.add({name: torch.zeros_like(mean) for name, mean in self.means["gate"].items()})

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return the scores of a group.

        Raises:
            MissingEvidence: No step was taken yet.
        """
        if not self._scores.steps:
            raise MissingEvidence(_NONE)
        return self._scores.values[group.name]

    def prepare(self, step: int, until_change: int | None) -> None:
        """Read every step's batches."""
        self.active = until_change is not None

    def step(self) -> None:
        """Learn from this step's gradients alone."""
        if self.active:
            self.synchronize()
            self._scores.descend({name: mean.cpu() for name, mean in self.means["gate"].items()})
            self.fade(0.0)

    def follow(self, cut: Cut) -> None:
        """Keep the scores of what is left."""
        super().follow(cut)
        self._scores.change(cut.units)

    def state_dict(self) -> dict[str, Any]:
        """Return scores and moments too."""
        return {**super().state_dict(), "scores": self._scores.state_dict(copies)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state)
        self._scores.load_state_dict(state["scores"], copies)
