"""What each width of each block costs in time: measured on whole models, one kind of block at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray
from rich.progress import track
from scipy.optimize import nnls
from torch import nn

from ..errors import PruningError
from ..files import read_json, write_text
from ..report import environment
from ..structure import Group, Shapes, live_shapes
from .stopwatch import Conditions, Stopwatch

_SHARES = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the dense width
_MOST = 42  # measured models, over all kinds of blocks
_ATTEMPTS, _TOO_MUCH = 3, 1.25  # how often it is measured until blocks take no more than this share of the whole
_LEAST = 1e-3  # of the dense time: where clocks have said that blocks take more than all of it
CACHE = Path(HF_HOME) / "hf_prune" / "latency"


@dataclass(frozen=True)
class LatencyTable:
    """Times of groups by how many units are left, as shares of the dense model's time.

    Args:
        blocks: Group name to its kind of block: groups of one shape share their times.
        widths: Kind of block to the numbers of units that were measured, ascending.
        times: Kind of block to the time of one such block at each of these widths.
        whole: Time of the model with all units, in the precision that times are meant in: 1 in fp32.
    """

    blocks: Mapping[str, str]
    widths: Mapping[str, Sequence[int]]
    times: Mapping[str, Sequence[float]]
    whole: float

    def of(self, group: str, units: int) -> float:
        """Return the time of a group of which so many units are left."""
        block = self.blocks[group]
        return float(np.interp(units, self.widths[block], self.times[block]))

    def predict(self, units: Mapping[str, int]) -> float:
        """Return the time of a model, as a share of the dense one's; of groups that are not in the model: 0 units."""
        saved = sum(self.of(name, self._dense(name)) - self.of(name, units.get(name, 0)) for name in self.blocks)
        return max(_LEAST, self.whole - saved)

    def _dense(self, group: str) -> int:
        return self.widths[self.blocks[group]][-1]


def measured_table(
    model: nn.Module, groups: Sequence[Group], names: Collection[str], conditions: Conditions, watch: Stopwatch
) -> LatencyTable:
    """Measure a table, or read one that was measured for such a model on this machine before.

    Args:
        model: The model; it is copied.
        groups: All of its groups.
        names: Of those whose times are wanted; what else there is counts as not changing.
        conditions: Under which times are meant.
        watch: What measures.
    """
    shapes = live_shapes(model)
    chosen = [one for one in groups if one.name in set(names)]
    blocks = {group.name: _block(group, shapes) for group in chosen}
    file = CACHE / f"{_fingerprint(model, shapes, blocks, conditions)}.json"
    if file.is_file():
        with contextlib.suppress(PruningError, TypeError):  # one that cannot be read is measured again
            return LatencyTable(**read_json(file))
    table = _measure(model, groups, chosen, blocks, watch)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(asdict(table)))
    return table


def _measure(
    model: nn.Module, groups: Sequence[Group], chosen: Sequence[Group], blocks: Mapping[str, str], watch: Stopwatch
) -> LatencyTable:
    alike = {
        block: [group for group in chosen if blocks[group.name] == block] for block in dict.fromkeys(blocks.values())
    }
    most = max(3, _MOST // max(1, len(alike)))
    planned = {block: _widths(those[0], most) for block, those in alike.items()}
    wanted = [(block, width) for block, widths in planned.items() for width in widths]
    for _ in range(_ATTEMPTS):
        whole = 1.0 if watch.conditions.dtype == "fp32" else watch.ratio(model, groups, {})
        found: dict[str, list[float]] = {block: [] for block in alike}
        for block, width in track(wanted, "measuring the latency table", transient=True):
            kept = {group.name: _first(group, width) for group in alike[block]}
            found[block].append((whole - watch.ratio(model, groups, kept)) / len(alike[block]))  # saved by each
        times = {block: _times([*planned[block], those[0].units], found[block]) for block, those in alike.items()}
        together = sum(times[block][those[0].units] * len(those) for block, those in alike.items())
        if together <= _TOO_MUCH * whole:
            widths = {block: list(one) for block, one in times.items()}
            return LatencyTable(dict(blocks), widths, {b: list(one.values()) for b, one in times.items()}, whole)
    raise PruningError(
        "A target of time needs a machine that keeps its pace: stop what else runs on it, or give a target of macs. "
        f"Received: blocks that seem to take {together / whole:.0%} of the model's time, measured {_ATTEMPTS} times"
    )


def _widths(group: Group, most: int) -> list[int]:
    """Return at which widths below the dense one a group is measured: equal numbers in each part."""
    step = group.parts * group.multiple
    least = -(-group.least // step) * step if group.least else 0
    rounded = {max(least, round(share * group.units / step) * step) for share in _SHARES}
    if group.units // step <= len(_SHARES):
        rounded = set(range(least, group.units, step))
    widths = sorted(one for one in rounded if one < group.units)
    return widths if len(widths) <= most else [widths[round(i)] for i in np.linspace(0, len(widths) - 1, most)]


def _first(group: Group, width: int) -> list[int]:
    """Return so many units, equally many of each part."""
    inside = width // group.parts
    return [part * group.per_part + unit for part in range(group.parts) for unit in range(inside)]


def _times(widths: Sequence[int], saved: Sequence[float]) -> dict[int, float]:
    """Return times by width, from 0 units to all: those nearest to what was measured that have a plain form.

    That is a step at the first unit, and then a line that never falls and bends upwards only. Clocks err by more than a
    few units take, and a choice among many widths finds those that seem to be free.

    Args:
        widths: Ascending; the last is the dense one.
        saved: What each of them saves, but for the last.
    """
    whole = saved[0] if widths[0] == 0 else saved[0] * 1.02  # a block that keeps a unit keeps a little time
    times = {width: whole - one for width, one in zip(widths, [*saved, 0.0], strict=True) if width}
    at = np.array(list(times)) / widths[-1]

    def form(where: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack([np.ones_like(where), where, np.maximum(0, where[:, None] - at[1:-1])])

    found, _ = nnls(form(at), np.array(list(times.values())))
    units = sorted({1, *times})
    return {0: 0.0, **dict(zip(units, map(float, form(np.array(units) / widths[-1]) @ found), strict=True))}


def _block(group: Group, shapes: Shapes) -> str:
    """Name what tells groups of equal time: kind, numbers, and the shapes of what is cut."""
    owned = sorted((*shapes[part.parameter], part.dim, part.per_unit) for part in group.slices)
    told = json.dumps([group.kind, group.units, group.parts, group.least, group.multiple, owned])
    return f"{group.kind} {hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _fingerprint(model: nn.Module, shapes: Shapes, blocks: Mapping[str, str], conditions: Conditions) -> str:
    """Return what tells machine, versions, model and conditions apart."""
    machine = {name: value for name, value in environment().items() if name != "date"}
    config = getattr(model, "config", None)
    # ALBERT's layers share their weights, so that no shape tells how many there are
    names = ("hidden_act", "image_size", "num_hidden_layers", "_attn_implementation")
    said = [getattr(config, name, None) for name in names]
    told = [machine, type(model).__name__, shapes, blocks, asdict(conditions), said]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]
