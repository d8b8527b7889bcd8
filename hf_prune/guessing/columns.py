"""Which columns of a data set a task reads, by their names and types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..data import element, is_audio, is_listed

Columns = dict[str, Any]  # keys of DataSettings
_SAMPLE = 200  # rows that are looked at
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("query", "passage"),
)
_WRITTEN = (
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("source", "target"),
    ("input", "output"),
    ("src", "tgt"),
)
_TEXTS = ("text", "sentence", "content", "review", "document", "body", "comment", "message", "title", "question")
_LABELS = ("label", "labels", "target", "class", "category", "score", "sentiment", "rating", "stars", "similarity", "y")
_SCORES = ("score", "similarity", "similarity_score", "relatedness", "relatedness_score")
_SPOKEN = ("text", "transcription", "transcript", "sentence", "normalized_text")
_WORDS, _TAGS = ("tokens", "words"), ("ner_tags", "tags", "ner", "pos_tags", "labels", "label")


class Asked:
    """A split, and the columns that a person has named.

    Args:
        rows: A `datasets.Dataset`.
        text: The column or columns with the text; empty: to be found.
        image: The column with images.
        label: The column or columns with the label.
        audio: The column with sounds.
    """

    def __init__(
        self,
        rows: Any,
        text: Sequence[str] = (),
        image: str | None = None,
        label: Sequence[str] = (),
        audio: str | None = None,
    ) -> None:
        self.rows, self.text, self.image, self.label, self.audio = rows, list(text), image, list(label), audio

    def of(self, wanted: Callable[[Any], bool]) -> list[str]:
        """Return the columns of a type, in their order."""
        return [name for name, feature in self.rows.features.items() if wanted(feature)]

    def named(self, names: Iterable[str], among: Sequence[str]) -> str | None:
        """Return the first of some names that a column has, whatever its case."""
        by_name = {column.lower(): column for column in among}
        return next((by_name[name] for name in names if name in by_name), None)

    def pair(self, pairs: Iterable[tuple[str, str]]) -> list[str] | None:
        """Return the first pair of names that columns of text have."""
        by_name = {column.lower(): column for column in self.of(_is_text)}
        return next(([by_name[a], by_name[b]] for a, b in pairs if {a, b} <= set(by_name)), None)

    def values(self, column: str) -> list[Any]:
        """Return the first values of a column."""
        return list(self.rows[column][:_SAMPLE])


def _is_text(feature: Any) -> bool:
    return not is_listed(feature) and "string" in getattr(feature, "dtype", "")


def _is_number(feature: Any) -> bool:
    return not is_listed(feature) and any(kind in getattr(feature, "dtype", "") for kind in ("int", "float", "bool"))


def _is_fraction(feature: Any) -> bool:
    return not is_listed(feature) and "float" in getattr(feature, "dtype", "")


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ in ("Image", "Array3D")


def _is_words(feature: Any) -> bool:
    return is_listed(feature) and "string" in getattr(element(feature), "dtype", "")


def _is_fields(feature: Any) -> bool:
    return isinstance(element(feature), dict)


def _is_tags(feature: Any) -> bool:
    kind = getattr(element(feature), "dtype", "")
    return is_listed(feature) and ("int" in kind or "string" in kind)


def longest_text(asked: Asked, but: Sequence[str] = ()) -> str | None:
    """Return the column of text that is named so, or else the one with the longest texts."""
    among = [one for one in asked.of(_is_text) if one not in but]
    lengths = {one: sum(len(value or "") for value in asked.values(one)) for one in among}
    return asked.named(_TEXTS, among) or max(lengths, key=lambda one: lengths[one], default=None)


def _label(asked: Asked, but: Sequence[str] = ()) -> str | list[str] | None:
    """Return the column of the label; several where each says 0 or 1."""
    if asked.label:
        return asked.label[0] if len(asked.label) == 1 else asked.label
    among = [one for one in asked.of(lambda kind: not (_is_image(kind) or is_audio(kind))) if one not in but]
    named = asked.named(_LABELS, among)
    classes = [one for one in among if getattr(element(asked.rows.features[one]), "names", None)]
    flags = [one for one in asked.of(_is_number) if one in among and set(asked.rows.unique(one)) == {0, 1}]
    if named or classes:
        return named or classes[0]
    if len(flags) > 1:
        return flags
    ending = (one for name in _LABELS for one in among if re.split(r"[\W_]", one.lower())[-1] == name)  # star_rating
    return next(ending, None) or next((one for one in among if _may_be_label(asked, one)), None)


def _may_be_label(asked: Asked, column: str) -> bool:
    """Whether a column holds numbers that are not just those of the rows, and no spreadsheet's empty column."""
    if asked.rows.data.column(column).null_count == len(asked.rows):
        return False
    counts = "float" in getattr(asked.rows.features[column], "dtype", "")
    return _is_number(asked.rows.features[column]) and (counts or len(asked.rows.unique(column)) < len(asked.rows))


def _names_of_classes(asked: Asked, but: Sequence[str] = ()) -> str | None:
    """Return the column of text with the fewest different values, if these can be classes."""
    counts = {one: len(asked.rows.unique(one)) for one in asked.of(_is_text) if one not in but}
    found = min(counts, key=lambda one: counts[one], default=None)
    return None if found is None or _is_written(asked, found) else found


def _is_written(asked: Asked, column: str) -> bool:
    """Whether a column holds texts that most rows have alone: no classes."""
    return column in asked.of(_is_text) and 2 * len(asked.rows.unique(column)) > len(asked.rows)


def names_two_texts(asked: Asked) -> bool:
    """Whether a person has named two texts, the second perhaps as the label, and no label of classes."""
    return any(_is_written(asked, one) for one in asked.label) if asked.label else len(asked.text) > 1


def _texts(asked: Asked, label: str | list[str] | None) -> str | list[str] | None:
    if asked.text:
        return asked.text[0] if len(asked.text) == 1 else asked.text
    labels = [label] if isinstance(label, str) else label or []
    return asked.pair(_PAIRS) or longest_text(asked, labels)


def _text_and_label(asked: Asked) -> Columns | None:
    label = _label(asked, asked.text)
    text = _texts(asked, label)
    if text is not None and label is None:
        label = _names_of_classes(asked, [text] if isinstance(text, str) else text)
    return None if text is None or label is None else {"text": text, "label": label}


def _image_and_label(asked: Asked) -> Columns | None:
    image = asked.image or next(iter(asked.of(_is_image)), None)
    label = _label(asked, [image or ""])
    label = label or _names_of_classes(asked)
    return None if image is None or label is None else {"image": image, "label": label}


def _audio_and_label(asked: Asked) -> Columns | None:
    audio = _audio(asked)
    label = _label(asked, [audio or ""])
    return None if audio is None or label is None else {"audio": audio, "label": label}


def _audio_and_text(asked: Asked) -> Columns | None:
    audio = _audio(asked)
    spoken = [one for one in asked.of(_is_text) if one in asked.label or one.lower() not in _LABELS]
    text = asked.label[0] if asked.label else asked.named(_SPOKEN, spoken) or next(iter(spoken), None)
    return None if audio is None or text not in spoken else {"audio": audio, "label": text}


def _audio(asked: Asked) -> str | None:
    return asked.audio or next(iter(asked.of(is_audio)), None)


def _pair_and_score(asked: Asked) -> Columns | None:
    pair = asked.text or asked.pair(_PAIRS)
    scores = asked.of(_is_fraction)
    named = asked.named(_LABELS, scores) or asked.named(_SCORES, asked.of(_is_number))
    label = asked.label[0] if asked.label else named or next(iter(scores), None)
    return None if pair is None or len(pair) != 2 or label is None else {"text": pair, "label": label}


def is_whole_score(asked: Asked, columns: Columns) -> bool:
    """Whether a classifier would take for classes what are scores of pairs, in whole numbers."""
    text, label = columns.get("text"), columns.get("label")
    if not isinstance(text, list) or not isinstance(label, str):
        return False
    return label.lower() in _SCORES and "int" in getattr(asked.rows.features[label], "dtype", "")


def _words_and_tags(asked: Asked) -> Columns | None:
    words = asked.text[0] if asked.text else asked.named(_WORDS, asked.of(_is_words))
    words = words or next(iter(asked.of(_is_words)), None)
    among = [one for one in asked.of(_is_tags) if one != words]
    tags = asked.label[0] if asked.label else asked.named(_TAGS, among) or next(iter(among), None)
    return None if words is None or tags is None else {"text": words, "label": tags}


def _question_and_answers(asked: Asked) -> Columns | None:
    columns = asked.text or ["question", "context"]
    label = (asked.label or ["answers"])[0]
    there = set(asked.rows.column_names) >= {*columns, label} and len(columns) == 2
    found = there and (_is_fields(asked.rows.features[label]) or not asked.label)  # one that is named may be of classes
    return {"text": columns, "label": label} if found else None


def _two_texts(asked: Asked) -> Columns | None:
    texts = asked.of(_is_text)
    pair = [*asked.text, *asked.label] or asked.pair(_WRITTEN) or texts
    return {"text": pair[0], "label": pair[1]} if len(pair) == 2 else None


def _one_text(asked: Asked) -> Columns | None:
    text = asked.text[0] if asked.text else longest_text(asked)
    return None if text is None else {"text": text}


def unread(rows: Any, columns: Mapping[str, Any]) -> list[str]:
    """Return the columns that a task does not read."""
    read = {one for several in columns.values() for one in _as_list(several)}
    return [name for name in rows.column_names if name not in read]


def can_evaluate(rows: Any, train: Any, columns: Mapping[str, Any]) -> bool:
    """Whether a split has the columns that a task reads, and is no public test set without labels.

    Args:
        rows: The split.
        train: The split to train on.
        columns: Those of `train`.
    """
    labels, texts = (_as_list(columns.get(key, [])) for key in ("label", "text"))
    if not {*labels, *texts} <= {*rows.column_names} or not len(rows):
        return False
    return not any(_is_hidden(rows, one) and not _is_hidden(train, one) for one in labels)


def _as_list(columns: str | list[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else columns


def _is_hidden(rows: Any, label: str) -> bool:
    """Whether labels are all empty or -1; those of named classes also where some are."""
    kind = rows.features[label]
    if is_listed(kind) or not hasattr(kind, "dtype"):  # such as answers
        return False
    found = {None if one in (-1, "") else one for one in rows.unique(label)}
    return found == {None} or (bool(getattr(kind, "names", None)) and None in found)


# what each task reads; the first that fits is meant where neither a person nor the model says it
FINDERS: dict[str, Callable[[Asked], Columns | None]] = {
    "audio-classification": _audio_and_label,
    "speech-recognition": _audio_and_text,
    "speech-recognition-ctc": _audio_and_text,
    "image-classification": _image_and_label,
    "token-classification": _words_and_tags,
    "question-answering": _question_and_answers,
    "text-classification": _text_and_label,
    "sentence-similarity": _pair_and_score,
    "seq2seq": _two_texts,
    "causal-lm": _one_text,
    "masked-lm": _one_text,
}
