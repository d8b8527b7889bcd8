"""What recipes do with sounds: batches by the model's own extractor, and texts of what a model has heard."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoProcessor, Trainer

from .distillation.outputs import positions
from .errors import RecipeError
from .metrics import Texts
from .recipe import Recipe
from .sharding import unwrap

_IGNORED = -100


def load_extractor(recipe: Recipe) -> Any:
    """Return the model's feature extractor."""
    return _load(recipe, AutoFeatureExtractor.from_pretrained)


def load_processor(recipe: Recipe) -> Any:
    """Return the model's processor, with an extractor and a tokenizer, which writes in the recipe's language."""
    processor = _load(recipe, AutoProcessor.from_pretrained)
    if not (hasattr(processor, "feature_extractor") and hasattr(processor, "tokenizer")):
        raise RecipeError(
            f"model.name must have a feature extractor and a tokenizer. Received: {type(processor).__name__}"
        )
    language = recipe.data.language
    if language is not None and hasattr(processor.tokenizer, "set_prefix_tokens"):
        try:
            processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")
        except ValueError as error:
            reason = str(error).splitlines()[0][:120]
            raise RecipeError(
                f"data.language must be one that the model knows, such as english. Received: '{language}' ({reason})"
            ) from None
    return processor


def _load(recipe: Recipe, load: Callable[..., Any]) -> Any:
    name = recipe.model.name
    if name is None:
        raise RecipeError("model.name must say what reads sounds for a task with them. Received: a config alone")
    try:
        return load(name, revision=recipe.model.revision)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"model.name must have what reads sounds (preprocessor_config.json). Received: '{name}' ({reason})"
        ) from error


def set_language(model: Any, recipe: Recipe) -> None:
    """Make a model of many languages write in the one that is spoken.

    Raises:
        RecipeError: Nobody says which.
    """
    told, language = model.generation_config, recipe.data.language
    if language is None:
        if getattr(told, "is_multilingual", False):
            raise RecipeError(
                "data.language must say what is spoken, as the model knows many languages: data.language=english. "
                "Received: null"
            )
        return
    if getattr(told, "lang_to_id", None):
        told.language, told.task, told.forced_decoder_ids = language, "transcribe", None


class Listener:
    """Makes batches of sounds, with a class each or with the text that was said.

    Args:
        extractor: The model's own.
        tokenizer: For texts; ``None``: there are classes.
        model: Whose decoder is told what came before each token; ``None``: it has none.
    """

    def __init__(self, extractor: Any, tokenizer: Any = None, model: Any = None) -> None:
        self.extractor, self.tokenizer = extractor, tokenizer
        self.config: Any = None if model is None else model.config
        given = inspect.signature(extractor.__call__).parameters.get("padding")
        pads = given is not None and not given.default  # others make one length of all
        self.how: dict[str, Any] = {"return_tensors": "pt", "sampling_rate": extractor.sampling_rate}
        self.how |= {"padding": True} if pads else {}

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """Return the model's inputs and ``labels``."""
        batch = dict(self.extractor([np.asarray(row["sound"]) for row in rows], **self.how))
        labels = [row["labels"] for row in rows]
        if self.tokenizer is None:
            return {**batch, "labels": torch.tensor(labels)}
        padded = self._padded(labels)
        before = {} if self.config is None else {"decoder_input_ids": self._shifted(padded)}
        return {**batch, "labels": padded, **before}

    def _padded(self, labels: list[list[int]]) -> Tensor:
        first = getattr(self.config, "decoder_start_token_id", None)
        if first is not None and all(row[:1] == [first] for row in labels):  # the decoder puts it there itself
            labels = [row[1:] for row in labels]
        rows = [torch.tensor(row, dtype=torch.long) for row in labels]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_IGNORED)

    def _shifted(self, labels: Tensor) -> Tensor:
        first = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat([first, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == _IGNORED, self.config.pad_token_id)


class FrameTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of models that name each frame's letter: it predicts letters, and nothing where a sound has ended."""

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Return the loss, the best letter of each frame, -100 in the padding, and the labels."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if logits is None:
            return loss, logits, labels
        best = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
        real = positions(unwrap(model), inputs, "", best.shape)
        return loss, best if real is None else best.masked_fill(~real.to(best.device), _IGNORED), labels


def texts_of(processor: Any, *, ctc: bool) -> Texts:
    """Return what makes texts of predicted tokens and of labels.

    Args:
        processor: The model's own.
        ctc: Whether tokens are those of frames, of which equal neighbours are one.
    """
    tokenizer = processor.tokenizer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found, right = ({}, {"group_tokens": False}) if ctc else ({"skip_special_tokens": True},) * 2  # CTC's blank is one

    def read(tokens: Any, how: dict[str, Any]) -> list[str]:
        whole = np.where(np.asarray(tokens) == _IGNORED, padding, tokens)
        return [text.strip() for text in tokenizer.batch_decode(whole, **how)]

    return lambda predictions, labels: (read(predictions, found), read(labels, right))
