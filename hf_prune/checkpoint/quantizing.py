"""Quantizers over pruned models: they leave alone what is empty."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn


def spare_empty_modules(base: Any) -> None:
    """Teach transformers' quantizers to leave modules of removed branches as they are.

    Kernels cannot quantize nothing, and the module that a quantizer puts in its place would run what is skipped here.
    All quantizers already leave alone what a model names as to be kept in float32; the names stay there no longer than
    they choose, because loading would really keep these modules in float32.

    Args:
        base: The module `transformers.quantizers.base`.
    """
    stock = base.HfQuantizer.preprocess_model

    @wraps(stock)
    def preprocess_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        empty, named = empty_modules(model), getattr(model, "_keep_in_fp32_modules", None)
        if not empty:
            return stock(self, model, *args, **kwargs)
        model._keep_in_fp32_modules = [*(named or ()), *empty]
        if "keep_in_fp32_modules" in kwargs:  # transformers 4 hands them over
            kwargs["keep_in_fp32_modules"] = [*(kwargs["keep_in_fp32_modules"] or ()), *empty]
        try:
            return stock(self, model, *args, **kwargs)
        finally:
            model._keep_in_fp32_modules = named

    base.HfQuantizer.preprocess_model = preprocess_model


def empty_modules(model: nn.Module) -> list[str]:
    """Return the paths of modules whose weight has no entries."""
    weights = {path: getattr(module, "weight", None) for path, module in model.named_modules()}
    return [path for path, weight in weights.items() if isinstance(weight, nn.Parameter) and not weight.numel()]
