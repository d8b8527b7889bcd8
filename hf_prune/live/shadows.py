"""What reversible pruners have masked, kept so that it may come back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from ..optimizers import moments
from ..sharding import join, local, part_of


class Shadows:
    """The last values of masked entries: of the part that lies here, in the tensor's own type, one after the other.

    Args:
        zeros: Names of parameters of which no values are kept: what comes back begins at zero.
    """

    def __init__(self, zeros: Collection[str] = ()) -> None:
        self._zeros = frozenset(zeros)
        self.values: dict[str, Tensor] = {}
        self.keep: dict[str, Tensor] = {}  # what is not masked, of the tensors' shapes

    @torch.no_grad()
    def full(self, name: str, tensor: Any) -> Tensor:
        """Return a tensor as it would be with everything back: of the part that lies here."""
        live = local(tensor.detach())
        if name in self._zeros and name in self.keep:
            return live.masked_fill(~self.keep[name], 0)
        return live.masked_scatter(~self.keep[name], self.values[name]) if name in self.values else live

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, Any]) -> None:
        """Write all values back."""
        for name in self.values:
            local(tensors[name].detach()).copy_(self.full(name, tensors[name]))

    @torch.no_grad()
    def move(self, tensors: Mapping[str, Any], keep: Mapping[str, Tensor], optimizer: Any = None) -> None:
        """Write back what is kept from now on, without momentum, and remember what is about to be masked.

        Args:
            tensors: The live tensors by name.
            keep: What is kept from now on, of the parts that lie here.
            optimizer: What comes back begins without moments: those of its mask's time are of gradients at zero.
        """
        for name, now in keep.items():
            full = self.full(name, tensors[name])
            if name in self.keep:
                for moment in moments(optimizer, tensors[name]):
                    local(moment).mul_(self.keep[name])
                local(tensors[name].detach()).copy_(full)
            self.keep[name] = now
            if name not in self._zeros:
                self.values[name] = full[~now]

    def nbytes(self, masks: Mapping[str, Tensor]) -> int:
        """Return the memory in bytes that is used beside these masks."""
        held = [*self.values.values(), *(one for name, one in self.keep.items() if one is not masks.get(name))]
        return sum(one.nbytes for one in held)

    def state(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the values of whole tensors; under FSDP all processes call it."""
        found = {}
        for name, keep in self.keep.items():
            if name in self._zeros:
                continue
            gone = ~join(keep, tensors[name])
            found[name] = join(self.full(name, tensors[name]), tensors[name])[gone].cpu()
        return found

    def load(self, state: Mapping[str, Tensor], tensors: Mapping[str, Any], keep: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned, under the masks of that time; under FSDP all processes call it.

        Raises:
            PruningError: There are more values than masked entries, or fewer.
        """
        self.values, self.keep = {}, {name: keep[name] for name in self._zeros if name in keep}
        for name, values in state.items():
            tensor, gone = tensors[name], ~join(keep[name], tensors[name])
            if len(values) != int(gone.sum()):
                raise PruningError(f"The pruning state of '{name}' must fit its mask. Received: {len(values)} values")
            dense = torch.zeros(gone.shape, dtype=tensor.dtype, device=tensor.device)
            dense.masked_scatter_(gone, values.to(tensor.device, tensor.dtype))
            self.keep[name], self.values[name] = keep[name], part_of(dense, tensor)[~keep[name]]

    def clear(self) -> None:
        """Give the memory back: nothing changes any more."""
        self.values, self.keep = {}, {}
