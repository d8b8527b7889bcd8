"""How much memory one forward needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors that operators make and that are alive at once.

    What an operator needs only inside itself is not seen; the figure is the same on each run and each machine.

    Args:
        known: Tensors that were there before, and count for nothing.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive = {one.untyped_storage().data_ptr() for one in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self._meet(one.untyped_storage())
        return made

    def _meet(self, storage: Any) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place and place not in self._alive:
            self._alive.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


def peak_bytes(model: Any, inputs: Any, run: Callable[[], object]) -> int:
    """Return the bytes of a model's weights and of what one forward makes beside them, at its highest.

    Args:
        model: On the CPU, where tensors are counted, or on a CUDA device, which counts itself.
        inputs: What the forward takes, on the same device.
        run: Runs it once.
    """
    weights = [*model.parameters(), *model.buffers()]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in weights}
    device = next((one.device for one in weights), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(sum(held.values()) + torch.cuda.max_memory_allocated(device) - before)
    given = [one for one in inputs.values() if isinstance(one, torch.Tensor)]
    with AliveBytes([*weights, *given]) as alive:
        run()
    return int(sum(held.values()) + alive.most)
