"""From registered scores to numbers: for units of a group, and for single weights; never one that is not finite."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import GateWatcher, Loss, backward_all
from ..errors import PruningError
from ..scores import Score
from ..sharding import join, local, part_of, whole
from ..skipping import is_skipped
from ..structure import Group, named_tensors
from .shadows import Shadows


class Scorer:
    """Scores of a live model, and what they are made from.

    Args:
        model: The live model.
        watcher: Where gate statistics come from; ``None`` where no score needs them.
        shadows: What masked weights would be if they came back.
        seed: For scores that draw numbers.

    Attributes:
        movement: Of parameters whose score needs it: the sum of ``-w * dL/dw``, of the part that lies here.
        scale: What gradients are multiplied by now.
    """

    def __init__(self, model: nn.Module, watcher: GateWatcher | None, shadows: Shadows, seed: int) -> None:
        self.model, self.watcher, self.shadows, self.seed = model, watcher, shadows, seed
        self.movement: dict[str, Tensor] = {}
        self.scale = 1.0
        self._read: dict[str, Tensor] = {}

    def calibrate(
        self,
        data: Iterable[Mapping[str, Any]],
        loss: Loss | None,
        wanted: Iterable[tuple[Score, Sequence[str]]],
        units: Iterable[tuple[Score, Group]] = (),
    ) -> dict[str, Tensor]:
        """Take gate statistics, and scores of weights, from calibration data; gradients stay as they are.

        Returns:
            The scores of groups whose units are scored by their weights' gradients: those are gone afterwards.
        """
        saved = {parameter: parameter.grad for parameter in self.model.parameters()}
        self.model.zero_grad(set_to_none=True)
        if self.watcher is not None:
            self.watcher.fade(0.0)
            self.watcher.start()
        try:
            self.scale = backward_all(self.model, data, loss, self.watcher)
            for score, names in wanted:
                self.add_movement(score, names)
                self.read_weights(score, names)
            return {group.name: self.units(score, group) for score, group in units if "gradient" in score.needs}
        finally:
            self.scale = 1.0
            if self.watcher is not None:
                self.watcher.stop()
            for parameter, gradient in saved.items():
                parameter.grad = gradient

    @torch.no_grad()
    def add_movement(self, score: Score, names: Sequence[str]) -> None:
        """Follow where these gradients move weights, if the score needs it."""
        tensors = named_tensors(self.model)
        for name in names if "movement" in score.needs else ():
            full, gradient = self.shadows.full(name, tensors[name]), local(self._gradient(score, name, tensors[name]))
            if name not in self.movement:
                self.movement[name] = torch.zeros_like(full, dtype=torch.float32)
            self.movement[name].addcmul_(full.float(), gradient.float(), value=-1 / self.scale)

    def read_weights(self, score: Score, names: Sequence[str]) -> None:
        """Hold the scores of these weights until they are taken: gradients will be gone by then."""
        self._read.update(self.weights(score, names))

    def take_weights(self, score: Score, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores that were read, or those of now."""
        if not self._read.keys() >= set(names):
            self.read_weights(score, names)
        return {name: self._read.pop(name) for name in names}

    def units(self, score: Score, group: Group) -> Tensor:
        """Return one score for each unit of a group, ``(units,)``.

        Raises:
            PruningError: One is not finite.
        """
        if score.of == "unit":
            found = score.function(**{need: self._unit_need(need, group) for need in score.needs}).double().cpu()
        else:
            found = self._summed(score, group)
        return _finite(score, group.name, found)

    def weights(self, score: Score, names: Sequence[str]) -> dict[str, Tensor]:
        """Return scores of every weight of these parameters, of their shapes; under FSDP of the local shards.

        Raises:
            PruningError: One is not finite.
        """
        tensors = named_tensors(self.model)
        found = ((name, _finite(score, name, self._weight(score, name, tensors[name]))) for name in names)
        return {name: part_of(values, tensors[name]) for name, values in found}

    def _summed(self, score: Score, group: Group) -> Tensor:
        """Sum the scores of all weights that a unit owns."""
        total, tensors = torch.zeros(group.units, dtype=torch.float64), named_tensors(self.model)
        for part in (one for one in group.slices if not one.adapter):
            entries = self._weight(score, part.parameter, tensors[part.parameter]).double()
            rows = entries.movedim(part.dim, 0).flatten(1).sum(1) if entries.ndim > 1 else entries
            index = part.index(torch.arange(group.units), group.per_part)
            total += rows.cpu()[index].view(group.units, part.per_unit).sum(1)
        for unit, path in enumerate(group.modules):
            for name, weight in self.model.get_submodule(path).named_parameters(prefix=path):
                total[unit] += self._weight(score, name, weight).double().sum().cpu()
        return total

    def _unit_need(self, need: str, group: Group) -> Tensor:
        if need == "noise":
            return torch.rand(group.units, generator=self._generator(group.name))
        assert self.watcher is not None
        return self.watcher.means[need][group.name]

    @torch.no_grad()
    def _weight(self, score: Score, name: str, weight: Tensor) -> Tensor:
        """Return the scores of one tensor: whole in every process, as a score may compare weights with each other."""
        given: dict[str, Tensor] = {}
        if "gradient" in score.needs:
            given["gradient"] = whole(self._gradient(score, name, weight)).float() / self.scale
        if "movement" in score.needs:
            if name not in self.movement:
                self.add_movement(score, [name])
            given["movement"] = join(self.movement[name], weight)
        if "noise" in score.needs:
            given["noise"] = torch.rand(weight.shape, generator=self._generator(name)).to(weight.device)
        return score.function(join(self.shadows.full(name, weight), weight).float(), **given)

    def _gradient(self, score: Score, name: str, weight: Tensor) -> Tensor:
        """Return the gradient of a parameter; zeros where no forward reaches it.

        Raises:
            PruningError: There is none.
        """
        if weight.grad is None and not self._skipped(name):
            raise PruningError(
                f"Score '{score.name}' needs the gradient of '{name}', which is None: call after_backward() between "
                "backward() and optimizer.step(), or pass data=."
            )
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    def _skipped(self, name: str) -> bool:
        """Whether a parameter lies in a module that no forward reaches: a masked layer."""
        parts = name.split(".")
        return any(is_skipped(self.model.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts)))

    def _generator(self, name: str) -> torch.Generator:
        """Return a generator that depends on seed and name alone: the same on every rank and after a resume."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))


def _finite(score: Score, name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise PruningError(f"Score '{score.name}' of '{name}' is not finite; nothing was cut.")
    return values
