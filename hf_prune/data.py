"""Data for recipes: local files, names on the Hub and the embedded digits become datasets ready for a Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import PruningError, did_you_mean
from .files import sha256_of
from .labels import Classes

DIGITS = "digits"  # the data set inside scikit-learn: 1797 images of 8 x 8
_HELD_OUT_SEED = 0  # what is held out is the same in every run, whatever the seed of the training
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


class DataSettings(BaseModel):
    """Where the data is, which columns matter, and how much of it to use.

    Args:
        name: A data set on the Hub, a local folder (``train.parquet``, ``validation.parquet`` …; also csv, json, jsonl,
            txt), a local file, or ``"digits"`` (splits train and test, columns image and label; no downloads).
        config: Configuration on the Hub (``"sst2"`` of ``nyu-mll/glue``).
        files: Instead of `name`: split -> one or several local files.
        train: The split to train on.
        evaluation: The splits to evaluate on, taken together.
        test_size: For a source with one split: the fraction of `train`, in (0, 1), held out instead of `evaluation`;
            stratified where the label is a class, and the same rows in every run.
        text: The column with the text, or two columns for pairs.
        image: The column with image arrays.
        label: The column with the label: a class (number or string), or a float for regression.
        max_length: Tokens per row at most.
        train_limit: Train on so many rows at most, drawn at random.
        train_seed: Seed of that draw.
    """

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    config: str | None = None
    files: dict[str, str | list[str]] | None = None
    train: str = "train"
    evaluation: list[str] = Field(default=["validation"], min_length=1)
    test_size: float | None = Field(default=None, gt=0, lt=1)
    text: str | list[str] | None = None
    image: str | None = None
    label: str = "label"
    max_length: int = Field(default=128, ge=1)
    train_limit: int | None = Field(default=None, ge=1)
    train_seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way_only(self) -> DataSettings:
        if (self.name is None) == (self.files is None):
            raise ValueError(f"give either name or files. Received: name={self.name!r}, files={self.files!r}")
        if self.test_size is not None and "evaluation" in self.model_fields_set:
            raise ValueError("give either evaluation (splits) or test_size (a part of train), not both")
        if isinstance(self.text, list) and len(self.text) not in (1, 2):
            raise ValueError(f"text must be one column or a pair of columns. Received: {self.text}")
        return self

    @property
    def texts(self) -> list[str]:
        """The text columns as a list."""
        return [self.text] if isinstance(self.text, str) else self.text or []


class Splits(NamedTuple):
    """Rows to train on and rows to evaluate on, each a `datasets.Dataset`."""

    train: Any
    evaluation: Any


def load_split(settings: DataSettings, fit: Callable[..., Classes] | None = None) -> Splits:
    """Load, check, and cut the data as the settings say; whatever does not fit is an error before any training.

    Labels that are strings become class numbers (names sorted, taken from `train`), or those that `fit` says.

    Args:
        settings: What to load.
        fit: From the data's classes to a model's, such as `labels.fit_classes` for its config; gets ``numbered``.

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
    splits = _load(settings, wanted)
    for split in wanted:
        _check_split(splits, split, settings)
        _check_columns(splits[split], split, settings)
    names = _class_names(splits[settings.train], settings)
    train, *others = [_with_classes(_used(splits[split], settings), split, settings.label, names) for split in wanted]
    if fit is not None:
        train, *others = _renumbered([train, *others], settings.label, fit, numbered=names is None)
    if settings.test_size:
        train, held_out = _hold_out(train, settings.label, settings.test_size)
    else:
        held_out = concatenate_datasets([_like(other, train.features) for other in others])
    return Splits(_limit(train, settings), held_out)


def load_rows(settings: DataSettings) -> Any:
    """Load rows of the split `train` alone, with no label: at most `train_limit`, with all columns.

    Raises:
        PruningError: As in `load_split`.
    """
    splits = _load(settings, [settings.train])
    _check_split(splits, settings.train, settings)
    _check_columns(splits[settings.train], settings.train, settings, labelled=False)
    return _limit(splits[settings.train], settings)


def data_revision(settings: DataSettings, dataset: Any) -> dict[str, str]:
    """Return what identifies the rows for someone else: the SHA-256 of each local file, or the commit on the Hub.

    Args:
        settings: What was loaded.
        dataset: Rows from `load_split`; their cache lies in a folder that the Hub's commit names.

    Returns:
        File or data set name -> revision; empty where neither is known.
    """
    if files := _local_files(settings):
        return {path.name: f"sha256:{sha256_of(path)}" for path in files}
    cached = [re.search(r"[/\\]([0-9a-f]{40})[/\\]", file["filename"]) for file in dataset.cache_files]
    return {str(settings.name): commit[1] for commit in cached if commit}


def label_names(dataset: Any, label: str = "label") -> list[str] | None:
    """Return the names of the classes, or ``None`` where the label is a bare number."""
    return getattr(dataset.features[label], "names", None)


def label_count(dataset: Any, label: str = "label") -> int:
    """Return how many outputs a model needs for this label column: the classes, or 1 for a float (regression)."""
    feature = dataset.features[label]
    if getattr(feature, "names", None):
        return len(feature.names)
    return 1 if "float" in feature.dtype else max(2, int(np.max(dataset[label][:])) + 1)


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
    if not settings.texts:
        raise PruningError("data.text must name the column(s) with the text. Received: None.")
    convert = _label_type(dataset.features[settings.label].dtype, num_labels)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        columns = [batch[column] for column in settings.texts]
        encoded = tokenizer(*columns, truncation=True, max_length=settings.max_length)
        return {**encoded, "labels": [convert(label) for label in batch[settings.label]]}

    prepared = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names)
    return prepared.select_columns(
        [name for name in [*tokenizer.model_input_names, "labels"] if name in prepared.features]
    )


def prepare_images(dataset: Any, settings: DataSettings) -> Any:
    """Turn image arrays in [0, 1] into ``pixel_values`` in [-1, 1] and ``labels``, both read as torch tensors.

    Args:
        dataset: Rows from `load_split`; images are ``(channels, height, width)``.
        settings: Names the columns.
    """
    column = settings.image
    if column is None:
        raise PruningError("data.image must name the column with the images. Received: None.")
    convert = _label_type(dataset.features[settings.label].dtype, None)

    def normalise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = np.asarray(batch[column], dtype=np.float32)
        return {"pixel_values": pixels * 2 - 1, "labels": [convert(label) for label in batch[settings.label]]}

    return dataset.map(normalise, batched=True, remove_columns=dataset.column_names).with_format("torch")


def _label_type(dtype: str, num_labels: int | None) -> Callable[[Any], int | float]:
    return float if num_labels == 1 or "float" in dtype else int


# --- where the data comes from ---------------------------------------------------------------------------------------


def _load(settings: DataSettings, wanted: list[str]) -> Any:
    """Return split name -> dataset; it may hold fewer or more than what is wanted."""
    if settings.files is not None:
        return _load_files({split: _as_list(paths) for split, paths in settings.files.items()}, "data.files")
    name = str(settings.name)
    if name == DIGITS and not Path(name).exists():
        return _load_digits()
    path = Path(name).expanduser()
    if path.is_file():
        return _load_files({settings.train: [str(path)]}, "data.name")
    return _load_folder(path, wanted) if path.is_dir() else _load_hub(name, settings.config)


def _local_files(settings: DataSettings) -> list[Path]:
    """Return the local files that hold the splits in use."""
    if settings.files is not None:
        return [Path(path).expanduser() for several in settings.files.values() for path in _as_list(several)]
    path = Path(str(settings.name)).expanduser()
    if not path.is_dir():
        return [path] if path.is_file() else []
    wanted = {settings.train, *(() if settings.test_size else settings.evaluation)}
    return [file for file in sorted(path.iterdir()) if file.is_file() and file.name.split(".")[0] in wanted]


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _load_files(files: dict[str, list[str]], key: str) -> Any:
    paths = [Path(path).expanduser() for several in files.values() for path in several]
    for path in paths:
        if not path.is_file():
            raise PruningError(f"{key}: no such file. Received: '{path}'.")
    formats = {_format(path) for path in paths}
    if len(formats) != 1 or None in formats:
        raise PruningError(f"{key}: files must all be of one type of {', '.join(_FORMATS)}. Received: {files}.")
    expanded = {split: [str(Path(path).expanduser()) for path in several] for split, several in files.items()}
    builder = str(formats.pop())
    # one call a split: within one call, all splits must have the same columns
    return {split: _call_datasets(key, builder, data_files={split: expanded[split]})[split] for split in expanded}


def _format(path: Path) -> str | None:
    """Say which of our formats a file has; compressed ones (``.csv.gz``) count."""
    return next((_FORMATS[suffix] for suffix in reversed(path.suffixes[-2:]) if suffix in _FORMATS), None)


def _load_folder(folder: Path, wanted: list[str]) -> Any:
    """Read ``<split>.<type>`` for each wanted split; a folder laid out otherwise is left to `datasets`."""
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        from datasets import load_from_disk

        return load_from_disk(str(folder))
    by_split = {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if _format(path) and path.is_file()}
    if not set(wanted) & set(by_split):
        return _call_datasets("data.name", str(folder))
    for split in wanted:
        if split not in by_split:
            raise _missing(f"data.name: folder '{folder}' has no file for split '{split}'", split, by_split)
    return _load_files({split: [str(by_split[split])] for split in wanted}, "data.name")


def _load_hub(name: str, config: str | None) -> Any:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in _FORMATS:
        raise PruningError(f"data.name: no such file or folder. Received: '{name}'.")
    return _call_datasets("data.name", name, config)


def _call_datasets(key: str, *args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # offline, unknown name, broken file: datasets raises a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PruningError(f"{key}: cannot be loaded: {reason} Received: {kwargs or args}.") from error


def _load_digits() -> dict[str, Any]:
    """Return scikit-learn's digits as images ``(1, 8, 8)`` in [0, 1]; 30 % are held out, equally of each digit."""
    from datasets import Array3D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"image": Array3D((1, 8, 8), "float32"), "label": ClassLabel(names=list("0123456789"))})
    images = (digits.images / 16).astype(np.float32)[:, None]
    dataset = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    return dict(zip(("train", "test"), _hold_out(dataset, "label", 0.3), strict=True))


# --- what must hold before training ----------------------------------------------------------------------------------


def _missing(what: str, name: str, known: Iterable[str]) -> PruningError:
    known = list(known)
    return PruningError(f"{what}; there are: {', '.join(known)}. Received: '{name}'.{did_you_mean(name, known)}")


def _check_split(splits: Any, split: str, settings: DataSettings) -> None:
    if split not in splits:
        key = "train" if split == settings.train else "evaluation"
        hint = " (data.test_size holds out a part of the only split)" if len(splits) == 1 else ""
        raise _missing(f"data.{key}: no split '{split}'{hint}", split, splits)


def _check_columns(dataset: Any, split: str, settings: DataSettings, *, labelled: bool = True) -> None:
    label = settings.label if labelled else None
    columns = [("text", text) for text in settings.texts] + [("image", settings.image), ("label", label)]
    for key, column in columns:
        if column is None:
            continue
        if column not in dataset.column_names:
            raise _missing(f"data.{key}: no column '{column}' in split '{split}'", column, dataset.column_names)
        empty = dataset.data.column(column).null_count
        if empty:
            raise PruningError(f"data.{key}: column '{column}' of split '{split}' is empty in {empty} rows.")
        dtype = getattr(dataset.features[column], "dtype", "")
        if key == "text" and "string" not in dtype:
            raise PruningError(f"data.text: column '{column}' of split '{split}' must hold text. Received: {dtype}.")


def _class_names(train: Any, settings: DataSettings) -> list[str] | None:
    """Return the sorted names where labels are strings, else ``None``."""
    is_text = "string" in train.features[settings.label].dtype
    return sorted(train.unique(settings.label)) if is_text else None


def _with_classes(dataset: Any, split: str, label: str, names: list[str] | None) -> Any:
    """Return the split with numbers for string labels, having checked that every row has a class."""
    from datasets import ClassLabel, Value

    if names is not None:
        unknown = set(dataset.unique(label)) - set(names)
        if unknown:
            raise PruningError(f"data.label: split '{split}' has classes that training has not: {sorted(unknown)}.")
        plain = dataset.cast_column(label, Value("string"))  # datasets 5.0 cannot cast a large_string to classes
        return plain.cast_column(label, ClassLabel(names=names))
    if "int" in dataset.features[label].dtype and min(dataset.unique(label), default=0) < 0:
        raise PruningError(f"data.label: split '{split}' has labels below 0: a public test set without labels?")
    return dataset


def _renumbered(splits: list[Any], label: str, fit: Callable[..., Classes], *, numbered: bool) -> list[Any]:
    """Return splits with the numbers and the names that a model has for these classes."""
    from datasets import ClassLabel

    fitted = fit(label_names(splits[0], label) or max(label_count(one, label) for one in splits), numbered=numbered)
    if fitted.names is None or fitted.names == label_names(splits[0], label):
        return splits
    kind = ClassLabel(names=fitted.names)

    def renumber(batch: dict[str, list[Any]]) -> dict[str, list[int]]:
        return {label: [fitted.numbers[number] for number in batch[label]]}

    features = [type(one.features)({**one.features, label: kind}) for one in splits]
    return [one.map(renumber, batched=True, features=told) for one, told in zip(splits, features, strict=True)]


def _used(dataset: Any, settings: DataSettings) -> Any:
    """Return the columns that the settings name; all of them for one who prepares the inputs himself."""
    inputs = [*settings.texts, *([settings.image] if settings.image else [])]
    return dataset.select_columns([*inputs, settings.label]) if inputs else dataset


def _like(dataset: Any, features: Any) -> Any:
    """Return the rows in the types of `train`: one file may say int32 and another int64."""
    same = dataset.features == features or set(dataset.features) != set(features)
    return dataset if same else dataset.cast(features)


def _hold_out(dataset: Any, label: str, fraction: float) -> tuple[Any, Any]:
    from sklearn.model_selection import train_test_split

    classes = None if "float" in dataset.features[label].dtype else dataset[label][:]
    rows = range(len(dataset))
    kept, held_out = train_test_split(rows, test_size=fraction, random_state=_HELD_OUT_SEED, stratify=classes)
    return dataset.select(kept), dataset.select(held_out)


def _limit(train: Any, settings: DataSettings) -> Any:
    if settings.train_limit is None or settings.train_limit >= len(train):
        return train
    # the draw of pandas' ``sample(n, random_state=seed)``, so that scripts without this library can use the same rows
    rows = np.random.RandomState(settings.train_seed).permutation(len(train))[: settings.train_limit]
    return train.select(rows)
