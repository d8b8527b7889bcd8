"""What modules get, token by token, without padding where a model is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .handed import Seen, width_last


class Tokens:
    """Which tokens of a batch count: those that attention sees.

    What has another shape than the attention mask counts in full: images, tokens that were sorted by expert, and all of
    encoder-decoders, whose two masks cannot be told apart by their shapes.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def watch(self, model: nn.Module) -> Any:
        """Hook a model, to be told of each batch's padding; return the hook's handle."""
        both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

        def before_forward(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            self._mask = mask.bool() if torch.is_tensor(mask) and mask.ndim == 2 and not both else None

        hook = torch.compiler.disable(before_forward)  # type: ignore[no-untyped-call]
        return model.register_forward_pre_hook(hook, with_kwargs=True)

    def of(self, seen: Seen) -> Tensor:
        """Return what a module reads, ``(tokens, width)`` in float32 or better."""
        return self.flat(width_last(seen.module, seen.value)) if seen.rows is None else _precise(seen.value)

    def flat(self, values: Tensor) -> Tensor:
        """Return ``(samples, …, width)`` as ``(tokens, width)`` in float32 or better."""
        if values.ndim == 3 and self._mask is not None and values.shape[:2] == self._mask.shape:
            return _precise(values[self._mask.to(values.device)])
        return _precise(values.reshape(-1, values.shape[-1]))


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
