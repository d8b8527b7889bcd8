"""What the loss is without each unit, one at a time, on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..live import Cut, Units, masked_for_now
from ..sharding import average_over_processes
from ..structure import Group
from .base import Calibration, Evidence, MissingEvidence, register_evidence

Unit = tuple[str, int]  # of a group: its name, and which


@register_evidence("loss_without")
class LossWithout(Evidence):
    """How much the mean loss over calibration data rises without a unit: as many passes over it as there are units."""

    takes = "data"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.live.sharded:
            raise PruningError(
                "Losses without a unit are measured on whole parameters. Received: a model sharded by FSDP"
            )
        self.rises: dict[str, Tensor] = {}

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return what was measured.

        Raises:
            MissingEvidence: Nothing was.
        """
        if group.name not in self.rises:
            raise MissingEvidence("losses on calibration data: pass data=.")
        return self.rises[group.name]

    def measure(self, calibration: Calibration) -> None:
        """Measure the loss without each unit that is there; what is gone, or is the last one, rises nothing."""
        units = calibration.units
        losses = self.losses(calibration, units)
        whole = float(self._means([self._loss(calibration, units)]))
        self.rises = self.numbers(units, {unit: loss - whole for unit, loss in losses.items()})

    def losses(self, calibration: Calibration, units: Units) -> dict[Unit, float]:
        """Return the loss without each unit that may leave now: the same in all processes."""
        from transformers.utils import logging

        candidates = [
            (group.name, unit)
            for group in units.named(self.groups)
            for unit in units.kept[group.name]
            if len(units.kept[group.name]) > max(1 if group.units > 1 else 0, group.least)
        ]
        shown = logging.tqdm(candidates, desc="Measuring", leave=False)
        found = [self._loss(calibration, _without(units, one)) for one in shown]
        return dict(zip(candidates, self._means(found).tolist())) if found else {}

    def numbers(self, units: Units, known: Mapping[Unit, float], other: float = 0.0) -> dict[str, Tensor]:
        """Return one number a unit by group, ``(units,)``."""
        return {
            group.name: torch.tensor(
                [known.get((group.name, unit), other) for unit in range(group.units)], dtype=torch.float64
            )
            for group in units.named(self.groups)
        }

    @torch.no_grad()
    def _loss(self, calibration: Calibration, units: Units) -> float:
        with masked_for_now(self.live, units.kept):
            return sum(float(calibration.loss_of(batch)) for batch in calibration.batches) / len(calibration.batches)

    def _means(self, losses: list[float]) -> Tensor:
        device = next(self.live.model.parameters()).device
        precise = torch.float32 if device.type == "mps" else torch.float64
        return average_over_processes(torch.tensor(losses, dtype=precise, device=device)).cpu()

    def follow(self, cut: Cut) -> None:
        """Keep what is known of those that are left."""
        super().follow(cut)
        self.rises = cut.units(self.rises)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured last."""
        return {"rises": dict(self.rises)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was measured last."""
        self.rises = dict(state["rises"])


@register_evidence("greedy_order")
class GreedyOrder(LossWithout):
    """In which order units leave when each time the one goes without which the loss is smallest, then.

    The first is 1. It ends when as many as are due have left; the others follow by what the loss was without each of
    them last.
    """

    at_once = True

    def measure(self, calibration: Calibration) -> None:
        """Let one unit leave after the other.

        Raises:
            PruningError: It is not known how many leave.
        """
        if calibration.leaving is None:
            raise PruningError(
                "Score 'greedy' must know how many units leave: in prune(), with one pruner and its sparsity. "
                "Received: none of them"
            )
        units, order = calibration.units, list[Unit]()
        while True:
            losses = self.losses(calibration, units)
            ranked = sorted(losses, key=lambda one: losses[one])
            if not ranked or len(order) >= calibration.leaving - 1:
                break
            order.append(ranked[0])
            units = _without(units, ranked[0])
        places = {unit: float(number) for number, unit in enumerate([*order, *ranked], 1)}
        self.rises = self.numbers(calibration.units, places, len(places) + 1.0)


def _without(units: Units, one: Unit) -> Units:
    name, unit = one
    return units.keep({name: [other for other in units.kept[name] if other != unit]})
