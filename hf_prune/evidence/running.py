"""Running sums of what hooks see of batches, each under the name of a group or a parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..live import Cut, LiveModel
from ..sharding import average_over_processes
from ..structure import Group
from .base import Evidence

DECAY = 0.95  # of running sums: about the last 20 steps that were read
_READ_FIRST, _READ_EVERY = 16, 4  # the first steps' batches are read, and then one step's of four


class Running(Evidence):
    """Sums over batches, pending until `commit`: a step that a GradScaler leaves out counts for nothing.

    All rows of a name lie in one tensor, ``(rows, n)``, where its batches are: each small call costs a GPU's host more
    than the sum itself. A row named ``"count"`` makes means of the others: they are per token then, however tokens are
    shared among batches and processes.

    Attributes:
        rows: What is summed up, in this order.
        powers: Of the loss' scale, that each row is too large by.
        sums: Name to ``(rows, n)``; steps that were read long ago have faded.
        pending: The same of the batches of this step.
        handles: Of hooks.
    """

    rows: tuple[str, ...] = ()
    powers: tuple[int, ...] = ()

    def __init__(self, live: LiveModel, groups: Collection[str], weights: Collection[str] = (), seed: int = 0) -> None:
        super().__init__(live, groups, weights, seed)
        self.sums = {name: torch.zeros(len(self.rows), size) for name, size in self.sizes().items()}
        self.pending: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def sizes(self) -> dict[str, int]:
        """Return how many numbers there are under each name now; here the units of each group."""
        return {group.name: group.units for group in self.watched()}

    def watched(self) -> list[Group]:
        """Return the groups that are still there."""
        wanted = set(self.groups)
        return [group for group in self.live.groups if group.name in wanted]

    @property
    def means(self) -> dict[str, dict[str, Tensor]]:
        """Row -> name -> ``(n,)``."""
        return {row: {name: one[number] for name, one in self.sums.items()} for number, row in enumerate(self.rows)}

    def mean(self, row: str, name: str) -> Tensor:
        """Return a row of a name, ``(n,)``; where counts are kept, by count, 0 where nothing has come."""
        found = self.sums[name][self.rows.index(row)]
        return found / self.sums[name][-1].clamp(min=1e-30) if self.rows[-1] == "count" else found

    def of_units(self, need: str, group: Group) -> Tensor:
        """Return a running mean."""
        return self.mean(need, group.name)

    def stop(self) -> None:
        """Remove the hooks; the sums stay."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def prepare(self, step: int, until_change: int | None) -> None:
        """Decide whether the next step's batches are read: reading takes time, and means move slowly."""
        self.active = until_change is not None and (step <= _READ_FIRST or until_change % _READ_EVERY == 0)

    def add(self, name: str, values: Tensor, first: int = 0) -> None:
        """Let numbers of a batch be pending, ``(rows, n)`` of those from `first` on; the tensor is ours from now on."""
        size = self.sums[name].shape[1]
        if name not in self.pending:
            if values.shape[1] == size:
                self.pending[name] = values
                return
            self.pending[name] = values.new_zeros(len(self.rows), size)
        self.pending[name][:, first : first + values.shape[1]] += values

    def fold(self) -> None:
        """Let everything that was seen be pending, where that is put off."""

    def commit(self, scale: float = 1.0, *, may_overflow: bool = False) -> None:
        """Let what is pending count: it is of a step that was taken."""
        self.fold()
        pending = self.pending if not may_overflow or self.is_finite() else {}
        for name, value in pending.items():
            self.sums[name] = self.sums[name].to(value.device)
        if scale != 1:
            powers = torch.tensor([[scale**power] for power in self.powers])
            pending = {name: value / powers.to(value.device) for name, value in pending.items()}
        if pending:
            torch._foreach_add_([self.sums[name] for name in pending], list(pending.values()))
        self.discard()

    def discard(self) -> None:
        """Forget what is pending."""
        self.pending = {}

    def is_finite(self) -> bool:
        """Whether all that is pending is finite."""
        self.fold()
        by_device: dict[torch.device, list[Tensor]] = {}
        for one in self.pending.values():
            by_device.setdefault(one.device, []).append(one.flatten())
        return all(bool(torch.cat(those).isfinite().all()) for those in by_device.values())

    def step(self) -> None:
        """Let a step that was read count more than those before it, however many batches were in it."""
        if self.active:
            self.fade(DECAY)

    def reset(self) -> None:
        """Forget the sums, and read all batches that follow."""
        self.fade(0.0)

    def fade(self, left: float) -> None:
        """Leave of the sums only a part, in [0, 1]."""
        if self.sums:
            torch._foreach_mul_(list(self.sums.values()), left)

    def synchronize(self) -> None:
        """Average the sums over all processes."""
        device = next(self.live.model.parameters()).device
        self.sums = {name: average_over_processes(one.to(device)) for name, one in self.sums.items()}

    def settle(self) -> None:
        """Let the model go."""
        self.stop()

    def follow(self, cut: Cut) -> None:
        """Watch what is left: modules behind a removed layer have other names, and widths are other ones."""
        super().follow(cut)
        self.discard()
        self.sums = self.remaining(cut)
        self._start_again()

    def remaining(self, cut: Cut) -> dict[str, Tensor]:
        """Return of the sums what has stayed."""
        return {name: one.T.contiguous() for name, one in cut.units({n: s.T for n, s in self.sums.items()}).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"means": {row: _copies(means) for row, means in self.means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the sums.

        Raises:
            PruningError: They are of other groups.
        """
        told, sizes = state["means"], self.sizes()
        for row, name in ((row, name) for row in self.rows for name in sizes):
            found = told.get(row, {}).get(name)
            if found is None or len(found) != sizes[name]:
                raise PruningError(
                    f"The pruning state must have running means of all groups. Received: {row} of '{name}' "
                    f"{'missing' if found is None else 'of another size'}"
                )
        self.sums = {name: torch.stack([told[row][name] for row in self.rows]) for name in sizes}
        self._start_again()

    def _start_again(self) -> None:
        if self.handles:
            self.stop()
            self.start()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU: a session goes on summing up in place."""
    return {name: one.detach().to("cpu", copy=True) for name, one in tensors.items()}
