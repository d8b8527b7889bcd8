"""Graphs with past that optimum exports itself: each layer's cache has the heads that its layer has left."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from ..plan import BLOCK


def follow_heads(convert: Any) -> None:
    """Teach optimum's exporter the caches of pruned models; it takes every layer's heads from the config.

    Args:
        convert: The module `optimum.exporters.onnx.convert`.
    """
    stock = convert.export_pytorch

    @wraps(stock)
    def export_pytorch(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(model, "config", None), BLOCK, None) is not None and getattr(config, "use_past", False):
            _fit(config, model)
        return stock(model, config, *args, **kwargs)

    convert.export_pytorch = export_pytorch


def _fit(config: Any, model: Any) -> None:
    """Let one export's description draw and name caches as this model makes them."""
    draw, name = config.generate_dummy_inputs, config.add_past_key_values

    @wraps(draw)
    def generate_dummy_inputs(*args: Any, **kwargs: Any) -> Any:
        inputs = draw(*args, **kwargs)
        if "past_key_values" in inputs:
            inputs["past_key_values"] = _fitting(inputs["past_key_values"], model)
        return inputs

    @wraps(name)
    def add_past_key_values(axes: dict[str, dict[int, str]], direction: str) -> None:
        name(axes, direction)
        for one in [key for key in axes if direction == "inputs" and key.startswith("past_key_values.")]:
            axes[one] |= {1: f"{one}.heads", 3: f"{one}.size"}  # ORTModel's first, empty cache has the config's heads

    config.generate_dummy_inputs, config.add_past_key_values = generate_dummy_inputs, add_past_key_values


@torch.no_grad()
def _fitting(drawn: Any, model: Any) -> Any:
    """Return caches as long as those drawn, with each layer's own heads; as drawn, where they have another form."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        encoded = torch.zeros(1, 1, model.config.get_text_config(decoder=True).hidden_size)
        inputs = {"decoder_input_ids": ids, "encoder_outputs": (encoded,)}
    cache = model(**inputs, use_cache=True, return_dict=True).past_key_values
    made = cache.to_legacy_cache() if hasattr(cache, "to_legacy_cache") else cache
    if [len(layer) for layer in made] != [len(layer) for layer in drawn]:
        return drawn
    return [tuple(map(_like, layer, real)) for layer, real in zip(drawn, made)]


def _like(drawn: Any, real: torch.Tensor) -> Any:
    made = torch.rand(len(drawn), real.shape[1], drawn.shape[2], real.shape[3])
    return made.to(drawn.dtype) if torch.is_tensor(drawn) else made.numpy().astype(drawn.dtype)
