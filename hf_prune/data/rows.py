"""Rows as a model reads them: texts, words with tags, questions with answers, texts to write, images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import PruningError, shown
from .classes import IGNORED, is_listed
from .damage import check_images
from .lines import check_tags
from .settings import DataSettings

logger = logging.getLogger(__name__)


def prepare_text(dataset: Any, tokenizer: Any, settings: DataSettings, *, num_labels: int | None = None) -> Any:
    """Tokenise; what is left are the model's inputs and ``labels``. Padding is left to the collator.

    Args:
        dataset: Rows from `load_split`.
        tokenizer: Of the model; it says which inputs the model takes.
        settings: Names the columns and the longest row.
        num_labels: Of the model; 1 makes whole-number labels floats, as regression needs them.

    Returns:
        A dataset with the columns of ``tokenizer.model_input_names`` that the tokenizer makes, and ``labels``.
    """
    columns, label = _text_columns(settings), settings.label_column
    convert = label_converter(dataset.features[label], num_labels)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[one] for one in columns), truncation=True, max_length=settings.max_length)
        return {**encoded, "labels": [convert(one) for one in batch[label]]}

    return _tokenised(dataset, tokenise, tokenizer)


def prepare_tokens(dataset: Any, tokenizer: Any, settings: DataSettings) -> Any:
    """Tokenise lists of words; the first token of each word has the word's label, others -100.

    Args:
        dataset: Rows from `load_split`, with a list of words and one of classes.
        tokenizer: Of the model, a fast one.
        settings: Names the columns and the longest row.
    """
    (column,) = _text_columns(settings, 1)
    check_fast(tokenizer)
    check_tags(dataset, column, settings.label_column)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        told = tokenizer(batch[column], is_split_into_words=True, truncation=True, max_length=settings.max_length)
        words = [told.word_ids(row) for row in range(len(batch[column]))]
        return {**told, "labels": list(map(_of_first_tokens, words, batch[settings.label_column]))}

    return _tokenised(dataset, encode, tokenizer)


def _of_first_tokens(words: list[int | None], labels: list[int]) -> list[int]:
    first = [word is not None and word != before for word, before in zip(words, [None, *words])]
    return [labels[word] if new and word is not None else IGNORED for word, new in zip(words, first)]


def prepare_language(dataset: Any, tokenizer: Any, settings: DataSettings) -> Any:
    """Join texts, and cut them into rows of exactly `max_length` tokens (what is left over makes a shorter last one).

    Args:
        dataset: Rows with a text.
        tokenizer: Of the model; its end-of-text token, if it has one, stands between texts.
        settings: Names the column and the length.
    """
    (column,), length = _text_columns(settings, 1), settings.max_length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def join(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = tokenizer([text for text in batch[column] if text.strip()], add_special_tokens=False, verbose=False)
        tokens = [token for text in texts["input_ids"] for token in [*text, *end]]
        rows = [tokens[at : at + length] for at in range(0, len(tokens), length)]
        whole = [row for row in rows if len(row) == length] or [row for row in rows if len(row) > 1]
        return {"input_ids": whole, "attention_mask": [[1] * len(row) for row in whole]}

    joined = dataset.map(join, batched=True, remove_columns=dataset.column_names)
    if not len(joined):
        raise PruningError(f"data.text: column '{column}' must hold texts of two tokens or more. Received: none")
    return joined


def prepare_texts(dataset: Any, tokenizer: Any, settings: DataSettings) -> Any:
    """Tokenise texts that have no label; a collator hides tokens of them.

    Args:
        dataset: Rows with a text.
        tokenizer: Of the model.
        settings: Names the column and the longest row.
    """
    (column,) = _text_columns(settings, 1)
    filled = dataset.filter(lambda row: bool(row[column].strip()))

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(batch[column], truncation=True, max_length=settings.max_length))

    return _tokenised(filled, tokenise, tokenizer)


def prepare_seq2seq(dataset: Any, tokenizer: Any, settings: DataSettings) -> Any:
    """Tokenise a text, and the text to write, which are the ``labels``.

    Args:
        dataset: Rows with two texts.
        tokenizer: Of the model.
        settings: Names the columns and the longest row.
    """
    (column,), label = _text_columns(settings, 1), settings.label_column
    if "string" not in getattr(dataset.features[label], "dtype", ""):
        raise PruningError(
            f"data.label: column '{label}' must hold a text to write. Received: {dataset.features[label]}"
        )
    how: dict[str, Any] = {"truncation": True, "max_length": settings.max_length}

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        told = tokenizer(batch[column], **how)
        return {**told, "labels": tokenizer(text_target=batch[label], **how)["input_ids"]}

    return _tokenised(dataset, tokenise, tokenizer)


def prepare_pairs(dataset: Any, tokenizer: Any, settings: DataSettings) -> Any:
    """Tokenise two sentences, each by itself; ``labels`` is what their cosine is to be.

    Args:
        dataset: Rows with two texts and a score.
        tokenizer: Of the model.
        settings: Names the columns and the longest row, and says which score is a cosine of 1.

    Returns:
        A dataset in which each input of the model is a pair.
    """
    columns, label, full = _text_columns(settings, 2), settings.label_column, settings.full_score
    if not any(kind in getattr(dataset.features[label], "dtype", "") for kind in ("int", "float")):
        raise PruningError(f"data.label: column '{label}' must hold scores. Received: {dataset.features[label]}")
    largest = max(map(abs, dataset[label][:]), default=0)
    if largest > full:
        raise PruningError(
            "data.full_score must be the score of two sentences that mean the same, as 5 in STS-B. "
            f"Received: {full:g}, and a score of {largest:g} in '{label}'"
        )

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        told = [tokenizer(batch[one], truncation=True, max_length=settings.max_length) for one in columns]
        pairs = {name: list(map(list, zip(*(one[name] for one in told)))) for name in told[0]}
        return {**pairs, "labels": [score / full for score in batch[label]]}

    return _tokenised(dataset, tokenise, tokenizer)


def prepare_answers(dataset: Any, tokenizer: Any, settings: DataSettings) -> Any:
    """Tokenise questions with their contexts, and find the tokens that each first answer begins and ends with.

    Where there is none, both are the first token. Rows whose answer is cut off are left out: as rows without one they
    would teach, and score, that there is none.

    Args:
        dataset: Rows with a question, a context, and SQuAD's answers: ``{"text": [...], "answer_start": [...]}``.
        tokenizer: Of the model, a fast one.
        settings: Names the columns and the longest row.
    """
    question, context = _text_columns(settings, 2)
    check_fast(tokenizer)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        told = _asked(tokenizer, batch[question], batch[context], settings.max_length)
        offsets = told.pop("offset_mapping")
        rows = [(one, told.sequence_ids(row)) for row, one in enumerate(offsets)]
        found = zip(rows, batch[context], batch[settings.label_column])
        spans = [_span(*row, *_place(text, answers)) for row, text, answers in found]
        return {**told, "start_positions": [a for a, _ in spans], "end_positions": [b for _, b in spans]}

    prepared = _tokenised(dataset, encode, tokenizer)
    whole = prepared.filter(lambda row: row["start_positions"] >= 0)
    cut = (
        f"{len(prepared) - len(whole)} of {len(prepared)} answers are cut off by data.max_length={settings.max_length}"
    )
    if not len(whole):
        raise PruningError(f"data.max_length must leave answers in their contexts. Received: {cut}")
    if len(whole) < len(prepared):
        logger.warning(f"{cut}, and left out.")
    return whole


def _asked(tokenizer: Any, questions: list[str], contexts: list[str], length: int) -> Any:
    """Tokenise questions with as much of their contexts as there is room for."""
    how = {"truncation": "only_second", "max_length": length, "return_offsets_mapping": True}
    try:
        return tokenizer(questions, contexts, **how)
    except Exception as error:  # of a library in Rust, which has no types of its own
        raise PruningError(
            f"data.max_length must leave room for a context behind the longest question. Received: {length}, and "
            f"{shown(max(questions, key=len))} ({error})"
        ) from error


def _place(context: str, answers: Any) -> tuple[int, int]:
    """Return where in its context the first answer begins and ends, without spaces around it; twice 0 for none."""
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise PruningError(
            "data.label must hold answers as SQuAD has them, {text: [...], answer_start: [...]}. "
            f"Received: {answers!r:.80}"
        )
    text = answers["text"][0] if answers["text"] else ""
    if not text.strip():
        return 0, 0
    begin = answers["answer_start"][0]
    there = context[max(begin, 0) : max(begin + len(text), 0)]
    if there.casefold() != text.casefold():
        raise PruningError(
            "data.label: an answer must stand in its context from the letter on that answer_start counts, from 0. "
            f"Received: {shown(text)} at {begin}, where there is {shown(there)}"
        )
    begin += len(text) - len(text.lstrip())
    return begin, begin + len(text.strip())


def _span(offsets: list[tuple[int, int]], parts: list[int | None], begin: int, end: int) -> tuple[int, int]:
    """Return the first and the last token of an answer; twice 0 for none, and twice -1 for one that is cut off."""
    if begin == end:
        return 0, 0
    inside = [at for at, (a, b) in enumerate(offsets) if parts[at] == 1 and a < end and b > begin]
    whole = inside and offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else (-1, -1)


def prepare_images(
    dataset: Any, settings: DataSettings, processor: Any = None, *, num_labels: int | None = None
) -> Any:
    """Make ``pixel_values`` and ``labels`` of images, read as torch tensors.

    Args:
        dataset: Rows from `load_split`; images, or arrays ``(channels, height, width)`` in [0, 1], which go to [-1, 1].
        settings: Names the columns.
        processor: The model's own for images: it is asked as rows are read, so that no second copy of them is stored.
        num_labels: Of the model, where rows have several classes.
    """
    column, label = settings.image, settings.label_column
    if column is None:
        raise PruningError("data.image must name the column with the images. Received: None.")
    convert = label_converter(dataset.features[label], num_labels)
    if holds_images(dataset, column):
        check_images(dataset, column)
        return dataset.with_transform(_reader(processor, column, label, convert))

    def normalise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = np.asarray(batch[column], dtype=np.float32)
        return {"pixel_values": pixels * 2 - 1, "labels": [convert(label) for label in batch[label]]}

    return dataset.map(normalise, batched=True, remove_columns=dataset.column_names).with_format("torch")


def holds_images(dataset: Any, column: str) -> bool:
    """Whether a column holds images, not arrays."""
    return type(dataset.features.get(column)).__name__ == "Image"


def _reader(
    processor: Any, column: str, label: str, convert: Callable[[Any], Any]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what makes tensors of images, with as many channels as the processor's means say."""
    mode = "L" if len(getattr(processor, "image_mean", None) or "RGB") == 1 else "RGB"

    def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
        import torch

        arrays = [np.asarray(image.convert(mode)) for image in batch[column]]
        arrays = [one[..., None] if one.ndim == 2 else one for one in arrays]
        pixels = processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([convert(one) for one in batch[label]])}

    return read


def check_fast(tokenizer: Any) -> None:
    """Check that a tokenizer says where its tokens come from.

    Raises:
        PruningError: It cannot.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PruningError(f"This task needs a fast tokenizer (a tokenizer.json). Received: {type(tokenizer).__name__}")


def _text_columns(settings: DataSettings, count: int | None = None) -> list[str]:
    """Return the text columns, as many as the task reads."""
    if not settings.texts:
        raise PruningError("data.text must name the column(s) with the text. Received: None.")
    if count is not None and len(settings.texts) != count:
        raise PruningError(f"data.text must name {count} column(s) for this task. Received: {settings.texts}")
    return settings.texts


def _tokenised(dataset: Any, encode: Callable[[dict[str, list[Any]]], dict[str, Any]], tokenizer: Any) -> Any:
    """Return what a tokenizer makes of the rows: the model's inputs and labels."""
    given = {name: f"given {name}" for name in dataset.column_names}  # or `labels` would keep the type that it had
    renamed = dataset.rename_columns(given)

    def call(batch: Any) -> dict[str, Any]:
        return encode({name: batch[given[name]] for name in given})

    prepared = renamed.map(call, batched=True, remove_columns=renamed.column_names)
    wanted = [*tokenizer.model_input_names, "labels", "start_positions", "end_positions"]
    return prepared.select_columns([name for name in wanted if name in prepared.features])


def label_converter(feature: Any, num_labels: int | None) -> Callable[[Any], Any]:
    """Return what makes a number of a label, or 0 and 1 for each of several classes of a list."""
    if is_listed(feature):
        return lambda numbers: [float(number in numbers) for number in range(num_labels or 0)]
    return float if num_labels == 1 or "float" in feature.dtype else int
