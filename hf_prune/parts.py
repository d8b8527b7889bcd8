"""What a model is made of: towers and their names, configs, and transformers' model inside another library's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from .errors import PruningError

# what modules that hold a tower are called: the first words of our names
TOWERS = {
    "vision_model": "vision",
    "vision_tower": "vision",
    "visual": "vision",
    "image_encoder": "vision",
    "vision_encoder": "vision",
    "image_model": "vision",
    "text_model": "text",
    "text_encoder": "text",
    "language_model": "text",
    "audio_model": "audio",
    "audio_tower": "audio",
    "audio_encoder": "audio",
    "encoder": "encoder",
    "decoder": "decoder",
    "qformer": "qformer",
}


def split_tower(name: str) -> tuple[str, str]:
    """Split a group's name into its tower, which may be empty, and what is inside of it.

    Example:
        >>> split_tower("encoder.layers.0.mlp.neurons")
        ('encoder', 'layers.0.mlp.neurons')
    """
    parts = name.split(".")
    starts = [i for i, part in enumerate(parts) if part in ("layers", "stages")]
    numbers = [i - 1 for i, part in enumerate(parts) if part.isdigit()]
    words = next((i for i, part in enumerate(parts) if part not in TOWERS.values()), 0)  # T5's encoder.attention.heads
    at = min([*starts, *numbers], default=words)
    return ".".join(parts[:at]), ".".join(parts[at:])


def configs_inside(config: Any) -> Iterator[Any]:
    """Yield the configs of parts that a config holds, and those inside of them."""
    for value in vars(config).values() if hasattr(config, "model_type") else ():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield value
            yield from configs_inside(value)


def own_configs(model: nn.Module) -> None:
    """Give a model configs of its own, before anything is written into them.

    `AutoModel.from_config` hands one config object to every model that is made of it. What is one object inside this
    model stays one.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if hasattr(value, "model_type") and hasattr(value, "to_dict") and not isinstance(value, nn.Module):
                vars(module)[name] = copy.deepcopy(value, copies)


def of_sentence_transformers(model: Any) -> bool:
    """Whether a model is a SentenceTransformer, CrossEncoder or SparseEncoder: transformers' model is a part of it."""
    return isinstance(model, nn.Module) and any(
        base.__module__.split(".")[0] == "sentence_transformers" for base in type(model).__mro__
    )


def transformers_part(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside one of sentence-transformers, whose folder says its shape; else the same.

    Raises:
        PruningError: There are several inside, or none.
    """
    if not of_sentence_transformers(model):
        return model
    from transformers import PreTrainedModel

    inside = {path: one for path, one in model.named_modules() if isinstance(one, PreTrainedModel)}
    outer = [one for path, one in inside.items() if not any(path.startswith(f"{other}.") for other in inside)]
    if len(outer) != 1:
        raise PruningError(
            f"A {type(model).__name__} can be pruned whole where it holds one model of transformers: prune its parts "
            f"one by one. Received: {', '.join(type(one).__name__ for one in outer) or 'none'}"
        )
    found: nn.Module = outer[0]
    return found
