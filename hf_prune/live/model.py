"""The live model with its optimizer: the only one who changes shapes, and what all others must follow then."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..architectures import find_groups
from ..dense import dense_macs, note_dense
from ..depth import check_depth
from ..errors import PruningError
from ..masks import local_masks
from ..plan import Record, read_record
from ..removal import cut
from ..sharding import any_sharded, join, whole_copy
from ..stock import write_record
from ..structure import Group, KeepVectors, Kept, Shapes, TensorPlaces, live_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """What a live model has just lost, for everyone that keeps something of its tensors' or groups' sizes.

    Args:
        kept: Group name to the live numbers, of before, of units that stayed.
        vectors: Which entries stayed of what has lost some, under the tensors' names of before.
        names: Tensor name of before to that of now: layers behind a removed one have another name.
        groups: Names of the groups that are left.
    """

    kept: Kept
    vectors: KeepVectors
    names: Mapping[str, str]
    groups: frozenset[str]

    def tensors(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of parameters' shapes as they are now, under the parameters' names of now."""
        found = {name: one for name, one in named.items() if name in self.names}
        for (name, dim), vector in self.vectors.items():
            if name in found:
                index = vector.nonzero().view(-1).to(found[name].device)
                found[name] = found[name].index_select(dim, index)
        return {self.names[name]: one for name, one in found.items()}

    def units(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``(units,)`` tensors by group as they are now."""
        left = {name: one for name, one in named.items() if name in self.groups}
        return {name: one[list(self.kept[name])] if name in self.kept else one for name, one in left.items()}


class LiveModel:
    """The model as it is now, and its optimizer.

    Args:
        model: The model, not wrapped.
        optimizer: Its moments are cut along with the model; ``None``: there is none.
        structured: Whether units may go: then their groups are found.

    Attributes:
        groups: Where units are.
        record: What has been removed so far.
        before: What had been removed before this session.
        dense_units: Group name to how many units the dense model has.
        dense_macs: Prunable multiply-accumulates of the dense model per token.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, *, structured: bool = True) -> None:
        self.model, self.optimizer = model, optimizer
        self.groups: Sequence[Group] = find_groups(model) if structured else []
        self.record = self.before = read_record(model)
        self.dense_units = {group.name: group.units for group in self.dense_groups()}
        self.dense_macs = dense_macs(model, self.groups, self.record) if self.groups else 0
        self._shapes: Shapes | None = None
        self._places = TensorPlaces(model)

    def dense_groups(self) -> list[Group]:
        """Return the dense model's groups, to be counted and chosen from by name."""
        return self.record.dense_groups(self.groups)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name: asked for anew each time, as FSDP exchanges them."""
        return self._places.tensors()

    @property
    def shapes(self) -> Shapes:
        """The shape of every parameter and buffer by name."""
        if self._shapes is None:
            self._shapes = live_shapes(self.model)
        return self._shapes

    @property
    def sharded(self) -> bool:
        """Whether FSDP spreads the parameters over processes."""
        return any_sharded(self.model.parameters())

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies on the CPU of what is kept of parameters' shapes; under FSDP all processes call it."""
        tensors = self.tensors
        return {name: join(one, tensors[name]).detach().to("cpu", copy=True) for name, one in named.items()}

    def local(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take up what `whole` returned: on the tensors' devices, under FSDP the local parts.

        Raises:
            PruningError: A parameter is missing, or has another shape.
        """
        tensors = self.tensors
        for name, one in named.items():
            if name not in tensors or one.shape != tensors[name].shape:
                raise PruningError(f"The pruning state must be of this model. Received: '{name}', {tuple(one.shape)}")
        return local_masks(tensors, named)

    def check(self, kept: Kept) -> None:
        """Raise where the model's config could not say that only these units are left.

        Raises:
            PruningError: Layers would be left that no config can describe.
        """
        check_depth(self.model, self.groups, kept)

    def cut(self, kept: Kept, vectors: KeepVectors) -> Cut:
        """Remove all other units physically; return what everyone has to follow.

        Args:
            kept: Group name to the live numbers of units that stay: a closed plan.
            vectors: The same by tensor.

        Raises:
            PruningError: Somebody else has cut the model since: a second session, or `shrink`.
        """
        self._check_untouched()
        before, self.record = self.record, self.record.after(self.groups, kept)
        if self.record:
            note_dense(self.model, self.groups, before)
        tensors = self.tensors
        cut(self.model, self.groups, kept, optimizer=self.optimizer)
        write_record(self.model, self.record)
        self._look_again()
        live = {id(one): name for name, one in self.tensors.items()}
        self.groups = find_groups(self.model)
        return Cut(
            kept,
            vectors,
            {name: live[id(one)] for name, one in tensors.items() if id(one) in live},
            frozenset(group.name for group in self.groups),
        )

    def _check_untouched(self) -> None:
        known, now = ({one.name: one.units for one in groups} for groups in (self.groups, find_groups(self.model)))
        other = [name for name, units in known.items() if now.get(name) != units]
        if other:
            raise PruningError(
                "Only one session may cut a model: give all pruners to one Pruning or PruningCallback. What was masked "
                f"are zeros, which hf_prune.shrink(model) removes. Received: another size of '{other[0]}'"
            )

    def gather(self) -> bool:
        """Go on with a plain copy of a sharded model; return whether units can be removed now."""
        if not self.sharded:
            return True
        plain = whole_copy(self.model)
        if plain is None:
            logger.warning(
                f"{type(self.model).__name__} is sharded, and has no config by which to build a whole one: it stays "
                "so, with zeros. Load its full state dict into a plain model, and call hf_prune.shrink where units are "
                "to go."
            )
            return False
        self.model, self.optimizer = plain, None
        self.groups = find_groups(plain) if self.groups else []
        self._look_again()
        return True

    def _look_again(self) -> None:
        """Forget what was true of a model with more modules, or with other shapes."""
        self._shapes, self._places = None, TensorPlaces(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what was removed, and what the dense model had."""
        record, before = ({name: list(one) for name, one in told.items()} for told in (self.record, self.before))
        return {
            "record": record,
            "before": before,
            "dense_units": dict(self.dense_units),
            "dense_macs": self.dense_macs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, of a model that has the same units now."""
        self.record, self.before = (
            Record({name: (list(kept), dense) for name, (kept, dense) in state[told].items()})
            for told in ("record", "before")
        )
        self.dense_units, self.dense_macs = dict(state["dense_units"]), state["dense_macs"]
        if self.groups:
            self.groups = find_groups(self.model)
        self._look_again()
        write_record(self.model, self.record)


def check_alike(name: str, found: int, units: int) -> None:
    """Check that a state has as many units of a group as the model.

    Raises:
        PruningError: It has not.
    """
    if found != units:
        raise PruningError(f"The pruning state of '{name}' must have the model's {units} units. Received: {found}")
