"""Data for recipes: local files, names on the Hub and the embedded digits become datasets ready for a Trainer."""

from .classes import Labels, element, is_listed, label_count, label_names, numbers_as_names
from .damage import check_tokens
from .rows import (
    holds_images,
    prepare_answers,
    prepare_images,
    prepare_language,
    prepare_pairs,
    prepare_seq2seq,
    prepare_text,
    prepare_texts,
    prepare_tokens,
)
from .settings import DataSettings
from .sounds import is_audio, prepare_sounds, prepare_speech
from .sources import DIGITS, SPLITS, evaluation_splits, files_alone, headless, load_source
from .splits import Splits, data_revision, load_rows, load_split

__all__ = [
    "DIGITS",
    "DataSettings",
    "Labels",
    "SPLITS",
    "Splits",
    "check_tokens",
    "data_revision",
    "element",
    "evaluation_splits",
    "files_alone",
    "headless",
    "holds_images",
    "is_audio",
    "is_listed",
    "label_count",
    "label_names",
    "load_rows",
    "load_source",
    "load_split",
    "numbers_as_names",
    "prepare_answers",
    "prepare_images",
    "prepare_language",
    "prepare_pairs",
    "prepare_seq2seq",
    "prepare_sounds",
    "prepare_speech",
    "prepare_text",
    "prepare_texts",
    "prepare_tokens",
]
