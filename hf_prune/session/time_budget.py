"""A budget of measured time: a table of widths, widths that lose least, and what was chosen measured as a whole."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocation import bundles_of
from ..dense import dense_twin
from ..errors import PruningError
from ..live import LiveModel, Units
from ..sharding import from_first
from ..structure import Group, Kept
from ..targets import Target
from ..timing import Conditions, LatencyTable, Option, Stopwatch, choose_widths, measured_table
from .budgets import Budget, Limits, register_budget

logger = logging.getLogger(__name__)
_CLOSE, _ROUNDS = (0.97, 1.01), 6  # of the time that was asked for, and how often it is measured until it is met
_OFTEN = 0.85  # a share of the time that was last measured: below it a change on the way is measured, too
_SECONDS = 1.5  # for which a whole model is timed
_OPTIONS = 48  # widths that a group is offered
_ALIGNED = 8  # widths of neurons are multiples, where there are many: what processors take at once


@register_budget("time")
class Time(Budget):
    """Time of a forward, as a share of the dense model's.

    A target's number is a share (`speedup`) or milliseconds (`latency_ms`). The chosen widths lose the least score for
    the time that they save over the whole model (ZipLM: Kurtic, Frantar and Alistarh 2023, arXiv:2302.04089). On the
    way the model is measured several times, and the table corrected: its error grows with what leaves, and must not all
    come due in the last change. There the model that would come of it is measured, and widths are chosen again until
    it meets the time.
    """

    tolerance = 1.05

    def __init__(self, live: LiveModel, target: Target | None = None, names: Collection[str] = ()) -> None:
        told = target or Target(speedup=1)
        self._conditions = Conditions(**{one.name: getattr(told, one.name) for one in fields(Conditions)})
        self._stopwatch: Stopwatch | None = None
        self._measured = 0.0
        self._corrected = 1.0  # the goal at which it was found
        super().__init__(live, target, names or [one.name for one in live.groups if not one.traits.holds_places])
        self._check()
        # the last is the time of the model that this session began with, where the dense one, or another, had more
        self.table, self.dense_ms, self._since = from_first(self._begin)
        self._factor = self._since  # what the whole model takes, over what the table says

    def _check(self) -> None:
        if self.live.sharded:
            raise PruningError("A target of time needs whole parameters. Received: a model sharded by FSDP")
        for group in (one for one in self.live.groups if one.name in self.names):
            if group.modules or group.traits.is_place:
                raise PruningError(
                    "A target of time chooses heads, KV groups, neurons and channels; with min_kept=0 whole branches "
                    f"go. Received: a pruner for '{group.name}'"
                )

    def _begin(self) -> tuple[LatencyTable, float, float]:
        live = self.live
        self._stopwatch = Stopwatch(live.model, self._conditions)
        table = measured_table(live.model, live.groups, self.names, self._conditions, self._stopwatch)
        if not live.record:
            return table, self._stopwatch.dense_ms, 1.0
        twin = dense_twin(live.model, live.groups, live.record)
        if twin is None:
            logger.warning("The dense model of %s cannot be timed: its time now counts", type(live.model).__name__)
            return table, self._stopwatch.dense_ms, 1.0
        dense = Stopwatch(twin, self._conditions)
        return table, dense.dense_ms, dense.ratio(live.model, live.groups, {}, _SECONDS, "fp32")

    def _measure(self, units: Units) -> float:
        assert self._stopwatch is not None  # this is the first process
        return self._since * self._stopwatch.ratio(self.live.model, units.groups, units.kept, seconds=_SECONDS)

    def of_dense(self, live: LiveModel) -> float:
        """Return 1: times are shares."""
        return 1.0

    def share(self, wanted: float) -> float:
        """Return the share of the dense model's time."""
        absolute = self.target is not None and self.target.latency_ms is not None
        return min(1.0, wanted / self.dense_ms) if absolute else wanted

    def left(self, units: Units) -> float:
        """Return the time of what is there: by the table, corrected by what was measured last."""
        return self.table.predict(_counts(units)) * self._factor

    def costs(self, units: Units, groups: Sequence[Group]) -> dict[str, float]:
        """Return what leaves with the next unit of each of these groups."""
        counts, of = _counts(units), self.table.of
        saved = {one.name: of(one.name, counts[one.name]) - of(one.name, counts[one.name] - 1) for one in groups}
        return {name: max(1e-9, self._factor * one) for name, one in saved.items()}

    def choose(
        self,
        units: Units,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        goal: float,
        limits: Limits,
        last: bool,
    ) -> Kept | None:
        """Return the units that lose least in this time; see `Budget.choose`."""
        offers = {group.name: _offer(group, scores[group.name], units, limits[group.name]) for group in groups}
        if not last:
            kept = self._solve(units, offers, goal)
            if goal < _OFTEN * self._corrected:
                chosen, self._corrected = units.keep(kept), goal
                self._factor = from_first(partial(self._measure, chosen)) / self.table.predict(_counts(chosen))
            return kept
        tried = list[tuple[float, float, dict[str, list[int]]]]()  # how far off, the time, what stays
        for _ in range(_ROUNDS):
            kept = self._solve(units, offers, goal)
            if any(kept == before for *_, before in tried):
                break
            chosen = units.keep(kept)
            measured, predicted = from_first(partial(self._measure, chosen)), self.table.predict(_counts(chosen))
            tried.append((abs(measured / goal - 1), measured, kept))
            if _CLOSE[0] <= measured / goal <= _CLOSE[1]:
                break
            self._factor = measured / predicted
        _, self._measured, kept = min(tried, key=lambda one: one[0])
        self._factor = self._measured / self.table.predict(_counts(units.keep(kept)))
        return kept

    def facts(self) -> dict[str, Any]:
        """Return what was asked, what the table said of the chosen widths, and what was measured, in milliseconds."""
        times = {"dense": 1.0, "asked": 1.0 if self.target is None else self.target.budget[1]}
        if self.target is not None and self.target.latency_ms is not None:  # may be more than the dense model takes
            times["asked"] /= self.dense_ms
        if self._measured:
            times |= {"predicted": self._measured / self._factor, "measured": self._measured}
        return {f"{name}_ms": round(share * self.dense_ms, 4) for name, share in times.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the table, too: another machine would measure another one."""
        told = {"factor": self._factor, "measured": self._measured, "dense_ms": self.dense_ms}
        told |= {"corrected": self._corrected}
        return {**super().state_dict(), **told, "table": asdict(self.table)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state)
        self._factor, self._measured, self.dense_ms = state["factor"], state["measured"], state["dense_ms"]
        self._corrected = state["corrected"]
        self.table = LatencyTable(**state["table"])
        if self._stopwatch is not None and self.live.record != self.live.before:  # units have left since it began
            self._since = self._stopwatch.dense_ms / self.dense_ms

    def _solve(self, units: Units, offers: Mapping[str, _Offer], goal: float) -> dict[str, list[int]]:
        """Return the units that stay of each group: all, where they take no longer; a grid of times rounds up."""
        if self.left(units) <= goal:
            return {name: list(units.kept[name]) for name in offers}
        fixed = self.table.predict({name: n for name, n in _counts(units).items() if name not in offers})
        options = [
            [Option(loss, self.table.of(name, width)) for width, loss in zip(offer.widths, offer.losses)]
            for name, offer in offers.items()
        ]
        chosen = choose_widths(options, goal / self._factor - fixed)
        gone = {name: set(offer.gone(offer.widths[i])) for (name, offer), i in zip(offers.items(), chosen)}
        return {name: [one for one in units.kept[name] if one not in those] for name, those in gone.items()}


@dataclass(frozen=True)
class _Offer:
    """Widths that a group may have, the widest first.

    Args:
        widths: How many units stay.
        losses: The scores of those that leave, summed up.
        order: In which they leave.
    """

    widths: list[int]
    losses: list[float]
    order: list[int]

    def gone(self, width: int) -> list[int]:
        """Return the units that leave where so many stay."""
        return self.order[: self.widths[0] - width]


def _offer(group: Group, score: Tensor, units: Units, limit: tuple[int, int]) -> _Offer:
    alive = units.alive[group.name]
    found = list(bundles_of(group, score, alive, 1.0, *limit))
    sizes = [0, *(one.units.shape[1] for one in found for _ in one.values)]
    losses = torch.cat([torch.zeros(1, dtype=torch.float64), *(one.values * one.units.shape[1] for one in found)])
    widths = (int(alive.sum()) - torch.tensor(sizes).cumsum(0)).tolist()
    taken, summed = _some(widths), losses.cumsum(0).tolist()
    order = [unit for one in found for unit in one.units.flatten().tolist()]
    return _Offer([widths[i] for i in taken], [summed[i] for i in taken], order)


def _counts(units: Units) -> dict[str, int]:
    return {name: int(alive.sum()) for name, alive in units.alive.items()}


def _some(left: Sequence[int]) -> list[int]:
    """Return which widths are offered: all where they are few, else multiples of 8; the widest and the least always."""
    many = len(left) > _OPTIONS
    found = [i for i, width in enumerate(left) if not many or i in (0, len(left) - 1) or width % _ALIGNED == 0]
    step = -(-len(found) // _OPTIONS)
    return sorted({*found[::step], found[-1]})
