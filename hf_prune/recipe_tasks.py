"""What a recipe's task means: which class its models are of, and how rows become batches; one row a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from .data import (
    Labels,
    prepare_answers,
    prepare_images,
    prepare_language,
    prepare_seq2seq,
    prepare_text,
    prepare_texts,
    prepare_tokens,
)
from .errors import CheckpointError, RecipeError, shown
from .metrics import Problem
from .recipe import Recipe


class RecipeTask(NamedTuple):
    """The class of a task's models, and how rows become batches."""

    reads: str  # for whoever has data
    auto_class: Any
    processor: Callable[[Recipe], Any]
    rows: Callable[[Any, Any, Recipe, Any], Any]  # from a split, the processor, the recipe and the model
    collator: Callable[[Any, Any], Callable[[list[Any]], dict[str, Any]]]  # from the processor and the model
    problem: Callable[[Any], Problem]  # from the model
    labels: Labels = "classes"
    outputs: tuple[str, ...] = ("logits",)  # of the model, which metrics read
    answers: tuple[str, ...] = ("labels",)  # of a batch, which they are compared with

    @property
    def has_classes(self) -> bool:
        """Whether its models have classes that must be those of the data."""
        return self.labels in ("classes", "list")

    @property
    def head(self) -> str:
        """How the names of its models' classes end."""
        return str(self.auto_class.__name__).removeprefix("AutoModel")


def _tokenizer(recipe: Recipe) -> Any:
    if recipe.model.name is None:
        raise RecipeError("model.name must say where the tokenizer is for a task with texts. Received: a config alone")
    try:
        return AutoTokenizer.from_pretrained(recipe.model.name, revision=recipe.model.revision)
    except RecursionError:
        raise CheckpointError(
            f"The tokenizer's files must not be nested so deeply. Received: '{recipe.model.name}'"
        ) from None


def _padding_tokenizer(recipe: Recipe) -> Any:
    """Return a tokenizer that can pad; those of language models often have no token for it."""
    tokenizer = _tokenizer(recipe)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _image_processor(recipe: Recipe) -> Any:
    """Return the model's own image processor, or none for arrays and for models that have none."""
    if recipe.model.name is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(recipe.model.name, revision=recipe.model.revision)
    except (OSError, ValueError):
        return None


def _plain_processor(config: Any) -> Any:
    """Return what scales images to a model's size, and their values to [-1, 1]: for a model without a processor."""
    made = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor  # 5 wants torchvision
    side, channels = getattr(config, "image_size", None) or 224, getattr(config, "num_channels", None) or 3
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    halves = [0.5] * channels
    return made(size={"height": height, "width": width}, image_mean=halves, image_std=halves)


def _images(split: Any, processor: Any, recipe: Recipe, model: Any) -> Any:
    processor = processor or _plain_processor(model.config)
    return prepare_images(split, recipe.data, processor, num_labels=model.config.num_labels)


def _texts(split: Any, tokenizer: Any, recipe: Recipe, model: Any) -> Any:
    return prepare_text(split, tokenizer, recipe.data, num_labels=model.config.num_labels)


def _same_masks(tokenizer: Any, model: Any) -> Any:
    return _SameMasks(tokenizer)


class _SameMasks(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Hide the same tokens of the same batch each time, so that two models are asked the same."""

    def torch_mask_tokens(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(inputs.sum()))
            return super().torch_mask_tokens(inputs, *args, **kwargs)


def _class_problem(model: Any) -> Problem:
    if model.config.problem_type == "multi_label_classification":
        return "multi_label"
    return "regression" if model.config.num_labels == 1 else "classification"


RECIPE_TASKS = {
    "text-classification": RecipeTask(
        "text, or text: [first, second]; label: a class, a number, or several columns of 0 and 1",
        AutoModelForSequenceClassification,
        _tokenizer,
        _texts,
        lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
        _class_problem,
    ),
    "image-classification": RecipeTask(
        "image: pictures or arrays; label: a class",
        AutoModelForImageClassification,
        _image_processor,
        _images,
        lambda processor, model: default_data_collator,
        _class_problem,
    ),
    "token-classification": RecipeTask(
        "text: a list of words; label: a list of classes, as long",
        AutoModelForTokenClassification,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_tokens(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorForTokenClassification(tokenizer),
        lambda model: "tokens",
        "list",
    ),
    "question-answering": RecipeTask(
        "text: [question, context]; label: answers as in SQuAD",
        AutoModelForQuestionAnswering,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_answers(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
        lambda model: "answers",
        "free",
        ("start_logits", "end_logits"),
        ("start_positions", "end_positions"),
    ),
    "causal-lm": RecipeTask(
        "text, joined and cut into rows of data.max_length",
        AutoModelForCausalLM,
        _padding_tokenizer,
        lambda split, tokenizer, recipe, model: prepare_language(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        lambda model: "causal_lm",
        "none",
    ),
    "masked-lm": RecipeTask(
        "text, of which tokens are hidden",
        AutoModelForMaskedLM,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_texts(split, tokenizer, recipe.data),
        _same_masks,
        lambda model: "masked_lm",
        "none",
    ),
    "seq2seq": RecipeTask(
        "text; label: the text to write",
        AutoModelForSeq2SeqLM,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_seq2seq(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer, model=model),
        lambda model: "seq2seq",
        "free",
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
        raise RecipeError(
            f"model.config must describe a model for {recipe.task}: {error}. Received: {shown(settings.config)}"
        ) from error


def saved_model(recipe: Recipe, folder: str | Path) -> Any:
    """Load a model that an earlier run of the recipe has saved: its dense one, or a smaller one."""
    auto_class = RECIPE_TASKS[recipe.task].auto_class
    return auto_class.from_pretrained(folder, dtype=torch.float32, **_attention(recipe))


def _attention(recipe: Recipe) -> dict[str, str]:
    """Return how attention must be computed; transformers 4 cannot change that of every model later."""
    eager = recipe.distillation is not None and recipe.distillation.uses("attention")
    return {"attn_implementation": "eager"} if eager else {}
