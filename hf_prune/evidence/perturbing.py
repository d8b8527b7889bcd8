"""How much what units hand on changes with what the model is given: a random direction, and two forwards."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError
from ..live import LiveModel
from ..structure import Group
from .base import Calibration, register_evidence
from .handed import HandedOn, Place, Seen
from .tokens import Tokens

_SHARE = {torch.float32: 1e-3, torch.float64: 1e-5}  # of the embeddings' root mean square; of half precisions more
_SHARE_OF_HALF = 0.1


@register_evidence("input_sensitivity")
class InputSensitivity(HandedOn):
    """Means over tokens of ``|da/dx v|``: x are the embeddings, v a normal direction of each token and entry.

    The derivative is a difference of two forwards on calibration data, so that any model has it. One direction tells of
    all units at once, as the mean of ``(J v)^2`` over directions is the squared norm of J.
    """

    takes = "data"
    rows = ("input_sensitivity", "count")
    powers = (0, 0)

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self._tokens = Tokens()
        self._before: list[Tensor] | None = None  # what modules have read of embeddings as they are, in their order
        self._moves, self._size = False, 0.0

    def watches(self) -> bool:
        """Whether a measurement is going on."""
        return self._before is not None

    @torch.no_grad()
    def measure(self, calibration: Calibration) -> None:
        """See each batch twice, the second time with embeddings that have moved."""
        draw = torch.Generator().manual_seed(self.seed)
        self.reset()
        self.start()
        self.handles.append(self._tokens.watch(self.live.model))
        self.handles.append(_embeddings(self.live.model).register_forward_hook(self._move(draw)))
        try:
            for batch in calibration.batches:
                self._before, self._size = [], 0.0
                for self._moves in (False, True):
                    calibration.loss_of(batch)
                self.commit()
        finally:
            self._before = None
            self.stop()

    def see(self, places: list[Place], seen: Seen) -> None:
        """Compare what an output projection reads with what it has read before."""
        changes = self._change(self._tokens.of(seen))
        if changes is None:
            return
        for place in places:
            self._add(place.group, 0, place.units_of(changes))

    def see_whole(self, group: Group, unit: int, seen: Seen, given: Tensor | None) -> None:
        """Compare what a layer changes or a branch adds."""
        changes = self._change(self._tokens.flat(seen.value))
        if changes is not None:
            self._add(group, unit, changes[:, None])

    def _add(self, group: Group, first: int, own: Tensor) -> None:
        """Add what units' entries of each token have changed by, ``(tokens, units, entries)``."""
        sums = own.mean(-1).sum(0)
        self.add(group.name, torch.stack([sums, torch.full_like(sums, len(own))]), first)

    def _change(self, values: Tensor) -> Tensor | None:
        """Return how much values differ from those of the first forward, per length of the way."""
        assert self._before is not None
        if not self._moves:
            self._before.append(values)
            return None
        before = self._before.pop(0)
        if before.shape != values.shape:  # a router has sent other tokens to this expert
            return None
        return (values - before).abs() / self._size

    def _move(self, draw: torch.Generator) -> Any:
        def after_embedding(module: nn.Module, args: Any, result: Any) -> Any:
            if not torch.is_tensor(result) or not result.is_floating_point():
                raise PruningError(
                    "Score 'input_sensitivity' moves what embeddings return, one tensor. Received: "
                    f"{type(result).__name__} of {type(module).__name__}"
                )
            if not self._moves:
                root = float(result.float().square().mean().sqrt())
                self._size = self._size or root * _SHARE.get(result.dtype, _SHARE_OF_HALF)
                return result
            direction = torch.randn(result.shape, generator=draw).to(result.device, result.dtype)
            return result + self._size * direction

        return after_embedding


def _embeddings(model: nn.Module) -> nn.Module:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise PruningError(
            "Score 'input_sensitivity' needs a model that says what its embeddings are (get_input_embeddings). "
            f"Received: {type(model).__name__}"
        )
    return found
