"""The rows that a recipe trains and evaluates on: loaded, checked, and cut as its settings say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import PruningError, shown
from ..files import sha256_of
from ..labels import Classes
from .classes import (
    Labels,
    as_whole_numbers,
    class_names,
    element,
    is_listed,
    joined,
    label_names,
    occurring,
    renumbered,
    with_classes,
)
from .lines import check_tags, rows_told
from .settings import DataSettings
from .sources import file_of, files_alone, headless, hold_out, load_source, local_files, missing

_LOOKED_AT = 50  # rows
_FILE = re.compile(r"\S.*\.(wav|flac|ogg|opus|mp3|m4a|aiff|au|png|jpe?g|bmp|gif|webp|tiff?)\s*", re.IGNORECASE)


class Splits(NamedTuple):
    """Rows to train on and rows to evaluate on, each a `datasets.Dataset`."""

    train: Any
    evaluation: Any


def load_split(settings: DataSettings, fit: Callable[..., Classes] | None = None, labels: Labels = "classes") -> Splits:
    """Load, check, and cut the data as the settings say; whatever does not fit is an error before any training.

    Labels that are strings become class numbers (names sorted, taken from `train`), or those that `fit` says.

    Args:
        settings: What to load.
        fit: From the data's classes to a model's, such as `labels.fit_classes` for its config; gets ``numbered``.
        labels: What a row has: ``"classes"``: one class or float, or a list of classes; a ``"list"`` of classes;
            something ``"free"`` that stays as it is (a text to write, an answer); ``"none"``.

    Returns:
        The rows to train on (at most `train_limit`) and to evaluate on, with the columns that the settings name (all,
        where they name no input).

    Raises:
        PruningError: A file, folder, data set, split or column is missing, a text column does not hold text, or rows
            have no label.

    Example:
        >>> train, evaluation = load_split(DataSettings(name="digits", evaluation=["test"], image="image"))
        >>> len(train), len(evaluation)
        (1257, 540)
    """
    from datasets import concatenate_datasets

    wanted = [settings.train] if settings.test_size else [settings.train, *settings.evaluation]
    train, *others = _labelled(_checked(settings, wanted, labels), wanted, settings, fit, labels)
    if settings.test_size:
        one = labels == "classes" and not is_listed(train.features[settings.label_column])
        train, held_out = hold_out(train, settings.label_column if one else None, settings.test_size)
    else:
        held_out = concatenate_datasets([_like(other, train.features) for other in others])
    return Splits(_limit(train, settings), held_out)


def _checked(settings: DataSettings, wanted: list[str], labels: Labels) -> list[Any]:
    """Return each wanted split, with the columns that are used."""
    splits = load_source(settings, wanted)
    for split in wanted:
        _check_split(splits, split, settings)
        _check_columns(splits[split], split, settings, labels)
    return [_used(splits[split], settings, labelled=labels != "none") for split in wanted]


def _labelled(
    splits: list[Any], names: list[str], settings: DataSettings, fit: Callable[..., Classes] | None, labels: Labels
) -> list[Any]:
    """Return the splits with the numbers of classes for labels."""
    if labels in ("free", "none"):
        return splits
    label, splits = settings.label_column, [joined(one, settings) for one in splits]
    if labels == "list" and not is_listed(splits[0].features[label]):
        raise PruningError(f"data.label: rows must have a list of labels. Received: {splits[0].features[label]}")
    if labels == "classes":
        splits = as_whole_numbers(splits, label)
    train = splits[0]
    told = class_names(train, label)
    if labels == "classes":
        _check_classes(train, label, told)
    numbered = told is None or label_names(train, label) is not None  # else they are the order of the alphabet
    splits = [with_classes(one, name, train, label, told) for one, name in zip(splits, names, strict=True)]
    return splits if fit is None else renumbered(splits, names, label, fit, numbered=numbered)


def _check_classes(train: Any, label: str, told: list[str] | None) -> None:
    """Refuse rows with one class alone, and lists of fractions."""
    kind = str(getattr(element(train.features[label]), "dtype", ""))
    if is_listed(train.features[label]):
        if "float" in kind:
            raise PruningError(
                f"data.label: lists of column '{label}' must hold classes, or 0 and 1 for each class. Received: {kind}"
            )
        return
    found = sorted(occurring(train, label)) if told is None else told
    if "float" not in kind and len(found) < 2:
        raise PruningError(f"data.label: column '{label}' must have two classes or more. Received: {found}")


def load_rows(settings: DataSettings) -> Any:
    """Load rows of the split `train` alone, with no label: at most `train_limit`, with all columns.

    Raises:
        PruningError: As in `load_split`.
    """
    splits = load_source(settings, [settings.train])
    _check_split(splits, settings.train, settings)
    _check_columns(splits[settings.train], settings.train, settings, "none")
    return _limit(splits[settings.train], settings)


def data_revision(settings: DataSettings, dataset: Any) -> dict[str, str]:
    """Return what identifies the rows for someone else: the SHA-256 of each local file, or the commit on the Hub.

    Args:
        settings: What was loaded.
        dataset: Rows from `load_split`; their cache lies in a folder that the Hub's commit names.

    Returns:
        File or data set name -> revision; empty where neither is known.
    """
    if files := local_files(settings):
        return {path.name: f"sha256:{sha256_of(path)}" for path in files}
    cached = [re.search(r"[/\\]([0-9a-f]{40})[/\\]", file["filename"]) for file in dataset.cache_files]
    return {str(settings.name): commit[1] for commit in cached if commit}


# what must hold before training
def _check_split(splits: Any, split: str, settings: DataSettings) -> None:
    if split not in splits:
        key = "train" if split == settings.train else "evaluation"
        hint = " (data.test_size holds out a part of the only split)" if len(splits) == 1 else ""
        raise missing(f"data.{key}: no split '{split}'{hint}", split, splits)
    if not len(splits[split]):
        raise PruningError(f"data: split '{split}' must have rows. Received: none")


def _check_columns(dataset: Any, split: str, settings: DataSettings, labels: Labels) -> None:
    label = settings.label_columns if labels != "none" else []
    columns = [
        *(("text", one) for one in settings.texts),
        ("image", settings.image),
        ("audio", settings.audio),
        *(("label", one) for one in label),
    ]
    named = [column for _, column in columns if column is not None]
    if twice := [column for column in named if named.count(column) > 1]:
        raise PruningError(f"data: text, image, audio, label must be different columns. Received: '{twice[0]}' twice")
    for key, column in columns:
        if column is None:
            continue
        if column not in dataset.column_names:
            hint = headless(settings, dataset, dataset.column_names) or files_alone(dataset)
            what = f"data.{key}: no column '{column}' in split '{split}'{hint and f'. {hint}'}"
            raise missing(what, column, dataset.column_names)
        _check_column(dataset, split, key, column, labels, file_of(settings, split))
    listed = [one for _, one in columns if one is not None and is_listed(dataset.features[one])]
    if labels == "list" and len(listed) == 2:
        check_tags(dataset, listed[0], listed[1], file_of(settings, split))


def _check_column(dataset: Any, split: str, key: str, column: str, labels: Labels, file: Path | None) -> None:
    """Check that a column is filled in each row, and holds what it is used for."""
    import pyarrow.compute as pc

    which, kind = f"data.{key}: column '{column}' of split '{split}'", dataset.features[column]
    dtype, empty = str(getattr(element(kind), "dtype", "")), np.array([], int)
    if dataset.data.column(column).null_count:
        empty = np.flatnonzero(pc.is_null(dataset.data.column(column)))
    if key == "label" and "float" in dtype and not is_listed(kind):
        empty = np.flatnonzero(~np.isfinite(np.array(dataset[column][:], dtype=float)))
    if len(empty):
        raise PruningError(
            f"{which} must be filled in every row; NA, NULL, None and NaN of a csv file count as empty. "
            f"Received: {len(empty)} empty rows of {len(dataset):,}: {rows_told(empty.tolist(), len(dataset), file)}"
        )
    told = f"fields {', '.join(kind)}" if isinstance(kind, dict) else dtype or type(kind).__name__
    told = f"lists of {told}" if is_listed(kind) else told
    if key == "text" and ("string" not in dtype or (is_listed(kind) and labels != "list")):
        raise PruningError(f"{which} must hold text. Received: {told}.")
    if key == "label" and labels in ("classes", "list") and not re.search("int|float|bool|string", dtype):
        raise PruningError(f"{which} must hold names of classes, or numbers. Received: {told}.")
    if "string" in dtype and (key in ("audio", "image") or (key == "text" and _holds_names(dataset, column))):
        raise PruningError(
            f"{which} must hold what files hold, not their names: give --data a folder with the files and a "
            f"metadata.csv, whose column file_name has these names. Received: {told}, {shown(dataset[column][0])}."
        )
    if key == "audio" and type(kind).__name__ != "Audio":
        raise PruningError(f"{which} must hold sounds. Received: {told}.")


def _holds_names(dataset: Any, column: str) -> bool:
    """Whether texts are all names of files with sounds or images: no model is to learn from these."""
    values = dataset[column][:_LOOKED_AT]
    return all(isinstance(value, str) and _FILE.fullmatch(value) for value in values)


def _used(dataset: Any, settings: DataSettings, *, labelled: bool) -> Any:
    """Return the columns that the settings name; all of them for one who prepares the inputs himself."""
    inputs = [*settings.texts, *(one for one in (settings.image, settings.audio) if one)]
    return dataset.select_columns([*inputs, *(settings.label_columns if labelled else [])]) if inputs else dataset


def _like(dataset: Any, features: Any) -> Any:
    """Return the rows in the types of `train`: one file may say int32 and another int64."""
    same = dataset.features == features or set(dataset.features) != set(features)
    return dataset if same else dataset.cast(features)


def _limit(train: Any, settings: DataSettings) -> Any:
    if settings.train_limit is None or settings.train_limit >= len(train):
        return train
    # the draw of pandas' ``sample(n, random_state=seed)``, so that scripts without this library can use the same rows
    rows = np.random.RandomState(settings.train_seed).permutation(len(train))[: settings.train_limit]
    return train.select(rows)
