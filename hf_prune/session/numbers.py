"""The numbers that a log shows: how sparse a model is by now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..dense import dense_note
from ..evidence import Evidence
from ..live import LiveModel, Masking
from ..masks import count_masked, entries_left
from ..report import Measurement, count
from .tasks import Tasks


@dataclass(frozen=True)
class Zeros:
    """What was counted over all shards when masks last changed: a log, perhaps of one process, must not wait.

    Args:
        sparsity: Share of zeros in all matrices that units are cut from or that single weights leave.
        sparsity_weight: Share of masked weights where there are masks, of units that are there.
    """

    sparsity: float
    sparsity_weight: float


def measure_dense(live: LiveModel) -> Measurement:
    """Count the dense model: before anything is masked, and by what is noted of it where units had left before."""
    return replace(count(live.model, live.groups), **dense_note(live.model))


class Numbers:
    """What is counted of a run.

    Args:
        live: The live model.
        masking: What is masked.
        tasks: What is pruned.
        evidence: What scores are made from.
        dense: What the dense model costs.

    Attributes:
        dense: As it was given.
        zeros: What was counted when masks last changed.
    """

    def __init__(
        self, live: LiveModel, masking: Masking, tasks: Tasks, evidence: Iterable[Evidence], dense: Measurement
    ) -> None:
        self._live, self._masking, self._tasks, self._evidence = live, masking, tasks, list(evidence)
        self.dense = dense
        self._follows_weights = bool(masking.returning) or any(one.heavy for one in self._evidence)
        self._most_bytes = 0
        self.zeros = Zeros(0.0, 0.0)

    def count(self) -> None:
        """Count what is masked or gone now; under FSDP all processes call it."""
        live, masking = self._live, self._masking
        tensors, in_scope = live.tensors, {name for task in self._tasks for name in task.weights}
        owned = {part.parameter for group in live.groups for part in group.slices if not part.adapter}
        matrices = {name for name in owned if tensors[name].ndim > 1}
        beside = (in_scope | set(masking.weights)) - matrices
        total = live.dense_macs + sum(tensors[name].numel() for name in beside)
        left = entries_left(matrices | beside, tensors, masking.units.vectors, masking.weights)
        masked, prunable = count_masked(tensors, masking.units.vectors, masking.weights)
        self.zeros = Zeros(round(1 - left / total, 6), round(masked / prunable, 6) if prunable else 0.0)

    def remember_bytes(self) -> None:
        """Remember the most memory that was needed so far."""
        self._most_bytes = max(self._most_bytes, self._bytes())

    def settle(self) -> None:
        """No mask changes any more."""
        self._follows_weights = False

    def macs_left(self) -> float:
        """Return the share of the dense model's prunable multiply-accumulates that remains, in (0, 1]."""
        return self._masking.units.macs / self._live.dense_macs if self._live.groups else 1.0

    def logs(self) -> dict[str, float]:
        """Return what a log should show: sparsity in all and by kind, and the share of MACs left."""
        result = {"sparsity": self.zeros.sparsity}
        for kind in dict.fromkeys(kind for task in self._tasks for kind in task.kinds):
            names = [name for task in self._tasks for name in task.kinds.get(kind, ())]
            result[f"sparsity_{kind}"] = round(1 - self._left(names) / self._dense(names), 6)
        if self._tasks.weights or self._masking.weights:
            result["sparsity_weight"] = self.zeros.sparsity_weight
        if self._follows_weights or self._most_bytes:
            result["reversible_mb"] = round(max(self._most_bytes, self._bytes()) / 1e6, 3)
        if self._live.groups:
            result["macs_left"] = round(self.macs_left(), 6)
        return result

    def _left(self, names: Iterable[str]) -> int:
        alive = self._masking.units.alive
        return sum(int(alive[name].sum()) for name in names if name in alive)

    def _dense(self, names: Iterable[str]) -> int:
        return sum(self._live.dense_units[name] for name in names)

    def _bytes(self) -> int:
        return self._masking.nbytes + sum(one.nbytes for one in self._evidence)

    def state_dict(self) -> dict[str, Any]:
        """Return what the dense model costs, and the most memory that was needed."""
        return {"dense": asdict(self.dense), "most_bytes": self._most_bytes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.dense, self._most_bytes = Measurement(**state["dense"]), state["most_bytes"]
