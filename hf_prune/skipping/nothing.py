"""What runs in place of a layer, a block, a projection or a convolution of which nothing is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forwards import by_name, hidden_states
from .replacement import Packing, Replacement

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(eq=False, repr=False)
class HandOn(Packing):
    """Of a removed layer: the hidden states that it gets."""

    counted: tuple[tuple[nn.Module, str], ...]  # modules that know their layer's number, and what they call it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _reaching(self.module, hidden_states(args, kwargs))
        given = by_name(self.names, args, kwargs)
        for module, number in self.counted:
            self.lengthen_cache(module, number, given, hidden)
        return self.packed(hidden, args, kwargs)


@dataclass(eq=False, repr=False)
class Nothing(Packing):
    """Of a core without units: what the output projection makes of nothing; without one inside, no entries."""

    output: nn.Module | None
    number: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, given = hidden_states(args, kwargs), by_name(self.names, args, kwargs)
        if self.number is not None and kwargs.get("encoder_hidden_states") is None:
            self.lengthen_cache(self.module, self.number, given, hidden)
        if self.output is None:
            value = hidden.new_zeros((*hidden.shape[:-1], 0))
        else:
            value = self.output.forward(hidden)
            if given.get("residual") is not None:  # BLOOM's attention adds it itself
                value = value + given["residual"]
        return self.packed(_reaching(self.module, value), args, kwargs)


@dataclass(eq=False, repr=False)
class ProjectNothing(Replacement):
    """Of an output projection that reads nothing: its bias."""

    axis: int  # of the weight, along which what comes out lies

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Any = self.module
        width, bias = output.weight.shape[self.axis], getattr(output, "bias", None)
        constant: Tensor = hidden.new_zeros(width) if bias is None or not bias.numel() else bias.to(hidden.dtype)
        if isinstance(output, CONVOLUTIONS):
            sizes = _sizes(output, hidden)
            return constant.view(-1, *[1 for _ in sizes]).expand(len(hidden), width, *sizes).contiguous()
        return constant.expand(*hidden.shape[:-1], width).contiguous()  # what comes after may write into it


class ProjectZero(ProjectNothing):
    """Of a removed branch's output projection: zeros, masked or cut."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _reaching(self.module, torch.zeros_like(super().__call__(hidden).detach()))


class BaseAlone(Replacement):
    """Of a projection that reads nothing and has an adapter around it: what it says without the adapter."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.module.base_layer(hidden)  # type: ignore[operator]
        return _reaching(self.module, result)


class NoChannels(Replacement):
    """Of a convolution or a batch norm: no channels, of the height and width that there would be."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_zeros(len(hidden), 0, *_sizes(self.module, hidden))


class NoEntries(Replacement):
    """Of a projection that puts nothing out: no entries."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden[..., :0]


class NoBias(Replacement):
    """Of a position bias without heads: none."""

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        return 0.0


class Zeros(Packing):
    """Of a block that hands its result on itself: zeros."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.packed(torch.zeros_like(hidden_states(args, kwargs)), args, kwargs)


def _reaching(module: nn.Module, value: Tensor) -> Tensor:
    """Return the value; under DDP, which waits for a gradient of every parameter, each gets one that is zero."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
        value = value + sum(0 * one.flatten()[0] for one in module.parameters() if one.numel() and one.requires_grad)
    return value


def _sizes(module: nn.Module, hidden: Tensor) -> list[int]:
    """Return height and width after a convolution (a norm keeps them)."""
    sizes = list(hidden.shape[2:])
    if not isinstance(module, CONVOLUTIONS) or module.padding == "same":
        return sizes
    pads = [0] * len(sizes) if isinstance(module.padding, str) else module.padding
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(module.dilation, module.kernel_size)]
    return [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(sizes, pads, reach, module.stride)]
