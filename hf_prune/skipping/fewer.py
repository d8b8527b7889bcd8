"""What goes on with fewer than its code believes: attentions that have lost heads, routers with closed experts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..architectures.conventions import RESHAPE
from .forwards import by_name
from .replacement import Replacement


@dataclass(eq=False, repr=False)
class Selected(Replacement):
    """An attention that has lost heads: it gets the others' share of some arguments."""

    names: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]
    units: tuple[int, ...]
    total: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        for name, where in self.arguments:
            if torch.is_tensor(given.get(name)):
                given[name] = None if where == "none" else self.share(given[name], where)
        with _FreeWidths() if RESHAPE in self.arguments else contextlib.nullcontext():
            return type(self.module).forward(self.module, **given)

    def share(self, value: Tensor, where: str) -> Tensor:
        """Return what is of the heads that stay."""
        index = torch.tensor(self.units, dtype=torch.long, device=value.device)
        if where == "batch":
            return value.view(-1, self.total, *value.shape[1:]).index_select(1, index).flatten(0, 1)
        return value.index_select(int(where), index) if value.shape[int(where)] == self.total else value


@dataclass(eq=False, repr=False)
class Closed(Replacement):
    """A router that never chooses some experts."""

    experts: tuple[int, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _ClosedLogits(self.experts):
            return type(self.module).forward(self.module, *args, **kwargs)


class _FreeWidths(TorchFunctionMode):
    """While an attention runs, the last size in each of its reshapes follows from the others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func in (Tensor.reshape, Tensor.view)
            and len(args) > 2
            and not any(isinstance(size, int) and size == -1 for size in args[1:])
        ):
            args = (*args[:-1], -1)
        return func(*args, **(kwargs or {}))


class _ClosedLogits(TorchFunctionMode):
    """While a router runs, its Linear gives minus infinity for closed experts."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        super().__init__()
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return result
        return result.index_fill(-1, torch.tensor(self.experts, device=result.device), -torch.inf)
