"""What a recipe's task means: which class its models are of, and how rows become batches; one row a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)

from .data import prepare_images, prepare_text
from .errors import CheckpointError, RecipeError
from .recipe import Recipe


class RecipeTask(NamedTuple):
    """The class of a task's models, and how rows become batches."""

    auto_class: Any
    processor: Callable[[Recipe], Any]
    rows: Callable[[Any, Any, Recipe, Any], Any]  # from a split, the processor, the recipe and the model
    collator: Callable[[Any], Callable[[list[Any]], dict[str, Any]]]  # from the processor


def _tokenizer(recipe: Recipe) -> Any:
    try:
        return AutoTokenizer.from_pretrained(recipe.model.name, revision=recipe.model.revision)
    except RecursionError:
        raise CheckpointError(
            f"The tokenizer's files must not be nested so deeply. Received: '{recipe.model.name}'"
        ) from None


RECIPE_TASKS = {
    "text-classification": RecipeTask(
        AutoModelForSequenceClassification,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_text(
            split, tokenizer, recipe.data, num_labels=model.config.num_labels
        ),
        DataCollatorWithPadding,
    ),
    "image-classification": RecipeTask(
        AutoModelForImageClassification,
        lambda recipe: None,
        lambda split, processor, recipe, model: prepare_images(split, recipe.data),
        lambda processor: default_data_collator,
    ),
}


# the model that a recipe begins with
def dense_config(recipe: Recipe) -> Any:
    """Return what the dense model says of itself; ``None``: it will be a new one, or cannot be loaded."""
    try:
        return (
            AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision) if recipe.model.name else None
        )
    except (OSError, ValueError):
        return None  # `dense_model` says what is wrong


def dense_model(recipe: Recipe, auto_class: Any, labels: dict[str, Any]) -> Any:
    """Load the dense model, or make a new one from the recipe's config.

    Args:
        recipe: Says its name, or its config.
        auto_class: The task's.
        labels: Options that say which classes it has.

    Raises:
        RecipeError: There is no such model.
    """
    settings, options = recipe.model, {**labels, **_attention(recipe)}
    if settings.name is not None:
        try:
            return auto_class.from_pretrained(settings.name, revision=settings.revision, dtype=torch.float32, **options)
        except OSError as error:
            raise RecipeError(
                f"model.name must be a Hub name or a local folder. Received: '{settings.name}' ({error})"
            ) from error
    config = dict(settings.config or {})
    if "model_type" not in config:
        raise RecipeError(f"model.config needs a model_type, such as vit. Received keys: {', '.join(config) or 'none'}")
    try:
        return auto_class.from_config(AutoConfig.for_model(**config, **options))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.config does not describe a model for {recipe.task}: {error}") from error


def saved_model(recipe: Recipe, folder: str | Path) -> Any:
    """Load a model that an earlier run of the recipe has saved: its dense one, or a smaller one."""
    auto_class = RECIPE_TASKS[recipe.task].auto_class
    return auto_class.from_pretrained(folder, dtype=torch.float32, **_attention(recipe))


def _attention(recipe: Recipe) -> dict[str, str]:
    """Return how attention must be computed; transformers 4 cannot change that of every model later."""
    eager = recipe.distillation is not None and recipe.distillation.uses("attention")
    return {"attn_implementation": "eager"} if eager else {}
