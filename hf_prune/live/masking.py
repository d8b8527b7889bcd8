"""What is masked, and the values that may come back: the only writer of zeros."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..masks import (
    Masks,
    apply_masks,
    check_masks,
    check_ranks_agree,
    keep_entries,
    vectors_by_tensor,
    whole_masks,
)
from ..optimizers import swaps_weights
from ..removal import skip_removed, zero_removed
from ..sharding import find_any
from .model import Cut, LiveModel, check_alike
from .shadows import Shadows
from .units import Units


class Masking:
    """What is masked of a live model.

    Args:
        live: The model.
        given: Masks of single weights that stay (parameter name -> boolean, True = keep).
        chosen: Names of all groups that are chosen from.
        returning: Names of parameters whose masked weights, and of groups whose masked units, may come back.
        from_zero: Those of them whose weights then begin at zero: their last values are not kept.

    Attributes:
        units: Which units are there.
        weights: Masks of single weights; under FSDP of the local shards.
        returning: Names of parameters and groups of which something may still come back.
        shown: Whether masked units hold their values now, to be computed behind shut gates.
        leaking: Axes of tensors whose masked entries get gradients, so that they are zeroed after each step.
    """

    def __init__(
        self,
        live: LiveModel,
        given: Mapping[str, Tensor] | None = None,
        chosen: Collection[str] = (),
        returning: Collection[str] = (),
        from_zero: Collection[str] = (),
    ) -> None:
        self.live = live
        self.units = Units.all_of(live.groups, live.shapes)
        self.weights: Masks = check_masks(live.tensors, given or {})
        self.given = dict(self.weights)
        self.chosen, self.returning = tuple(chosen), tuple(returning)
        self.shown, self._unchecked = False, False
        self.leaking: frozenset[tuple[str, int]] = frozenset()
        self._shadows = Shadows(from_zero)
        self._swapping = live.optimizer if swaps_weights(live.optimizer) else None
        apply_masks(live.tensors, self.weights, live.optimizer)

    @property
    def anything(self) -> bool:
        """Whether zeros have to be written again after a step."""
        return bool(self.weights or self.leaking)

    @property
    def nbytes(self) -> int:
        """The memory in bytes of what may come back, in this process."""
        return self._shadows.nbytes(self.weights)

    @property
    def remembers(self) -> bool:
        """Whether there are values that may come back."""
        return bool(self._shadows.keep)

    def full(self, name: str, tensor: Any) -> Tensor:
        """Return a tensor as it would be with everything back: of the part that lies here."""
        return self._shadows.full(name, tensor)

    # one change
    def apply(self, units: Units, weights: Mapping[str, Tensor], facts: Mapping[str, int] | None = None) -> None:
        """Mask these units and weights from now on, and their moments; what comes back has its last value.

        Args:
            units: Which units are there from now on.
            weights: New masks; parameters that are not named keep theirs.
            facts: Numbers that all processes must have found alike.

        Raises:
            PruningError: Processes decided differently; nothing was written.
        """
        tensors, masks = self.live.tensors, {**self.weights, **weights}
        check_ranks_agree({**units.alive, **masks}, tensors, facts)
        self.units, self.weights, self._unchecked = units, masks, True
        self._shadows.move(tensors, self._keep(tensors), self.live.optimizer)
        apply_masks(tensors, self.weights, self.live.optimizer)
        zero_removed(tensors, units.gone, self.live.optimizer)
        skip_removed(self.live.model, self.live.groups, units.kept)

    def hold(self) -> None:
        """Zero again what is masked; also what an optimizer will put in its place when it evaluates."""
        self._zero(self.units.gone)

    def hold_after_step(self) -> None:
        """Zero again what an optimizer's step may have changed: masked weights, and units where gradients leak."""
        self._zero({key: index for key, index in self.units.gone.items() if key in self.leaking})

    def _zero(self, gone: Mapping[tuple[str, int], Tensor]) -> None:
        tensors = self.live.tensors
        apply_masks(tensors, self.weights, self._swapping)
        zero_removed(tensors, gone, self._swapping)

    def settle(self) -> None:
        """Give back what was kept for changes: there will be none any more."""
        self._shadows.clear()
        self.returning = ()

    # what may come back
    def gone(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return which units of these groups are masked and may come back, ``(units,)``; groups without any are out."""
        masked = {name: ~self.units.alive[name] for name in self.returning if name in names}
        return {name: gone for name, gone in masked.items() if gone.any()}

    def reopened(self, groups: Collection[str]) -> Units:
        """Return which units are there if these groups had lost nothing but what others have masked."""
        return self.units.reopened([name for name in self.chosen if name not in set(groups)])

    def show(self) -> None:
        """Let masked units that may come back hold their values, so that they are computed."""
        tensors = self.live.tensors
        self._shadows.put_back(tensors)
        apply_masks(tensors, self.weights)
        zero_removed(tensors, self.reopened(self.returning).gone)
        self.shown = True

    def hide(self) -> None:
        """Let masked units be zeros again."""
        self.shown = False
        self.hold()

    def _keep(self, tensors: Mapping[str, Tensor]) -> Masks:
        """Return what is kept of all tensors in which something may come back."""
        groups = self.units.named(self.returning)
        names = [name for name in self.returning if name in tensors]
        names += [part.parameter for group in groups for part in group.slices]
        stays = vectors_by_tensor(self.units.vectors)
        return {
            name: keep_entries(tensors[name], stays.get(name, {}), self.weights.get(name))
            for name in dict.fromkeys(names)
        }

    # leaks
    def check_leaks(self) -> None:
        """Look, once after a change, which masked entries get gradients (act(0) is not 0).

        Units leak where their readers see them. While readers are held at zero, no gradient reaches the rest of a unit.
        """
        if self._unchecked:
            tensors, gone = self.live.tensors, self.units.gone
            gradients = {key: tensors[key[0]].grad for key in gone.keys() - self.leaking}
            found = find_any({key: one for key, one in gradients.items() if one is not None}, gone)
            self._unchecked, self.leaking = False, self.leaking | found | self._readers_like(found)

    def _readers_like(self, found: set[tuple[str, int]]) -> set[tuple[str, int]]:
        """Return where units of the kinds of which some leak are read: in all layers, as a batch may not reach each."""
        owned = {group.name: {(part.parameter, part.dim) for part in group.slices} for group in self.live.groups}
        kinds = {group.kind for group in self.live.groups if owned[group.name] & found}
        like = [group for group in self.live.groups if group.kind in kinds]
        return {(part.parameter, part.dim) for group in like for part in group.read or group.slices}

    # a part of a session
    def follow(self, cut: Cut) -> None:
        """Go on with what is left: all of its units are there, and nothing that was masked can come back."""
        self.settle()
        self.weights, self.given = cut.tensors(self.weights), cut.tensors(self.given)
        self.units, self.leaking = Units.all_of(self.live.groups, self.live.shapes), frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return which units are there, whole masks, and the values that may come back; all processes call it."""
        tensors = self.live.tensors
        return {
            "alive": dict(self.units.alive),
            "weights": whole_masks(tensors, self.weights),
            "shadows": self._shadows.state(tensors),
            "leaking": sorted(map(list, self.leaking)),
            "unchecked": self._unchecked,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; `write` then masks it. Weights are loaded by whoever saved them.

        Raises:
            PruningError: The state is of other groups, or of another number of units.
        """
        if set(state["alive"]) != set(self.units.alive):
            raise PruningError(
                f"The pruning state must be of this model and these pruners. Received: {sorted(state['alive'])[:4]}"
            )
        for group in self.live.groups:
            check_alike(group.name, len(state["alive"][group.name]), group.units)
        alive = {name: mask.to(torch.bool, copy=True) for name, mask in state["alive"].items()}
        tensors = self.live.tensors
        self.units = Units(self.live.groups, self.live.shapes, alive)
        self.weights = check_masks(tensors, state["weights"])
        self._shadows.load(state["shadows"], tensors, self._keep(tensors))
        self.leaking, self._unchecked = frozenset((name, dim) for name, dim in state["leaking"]), state["unchecked"]

    def write(self) -> None:
        """Let the model be masked as a state that was taken up says."""
        skip_removed(self.live.model, self.live.groups, self.units.kept)
        self.hold()
