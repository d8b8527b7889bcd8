"""Where data comes from: files, folders, the Hub and the embedded digits become `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PruningError, did_you_mean
from .settings import DataSettings
from .sounds import METADATA, find_sounds, rows_of_sounds, with_metadata, without_decoding

DIGITS = "digits"  # the data set inside scikit-learn: 1797 images of 8 x 8
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")  # what files and splits are usually called
_LOOKED_AT = 1000  # rows
_HELD_OUT_SEED = 0  # what is held out is the same in every run, whatever the seed of the training


def load_source(settings: DataSettings, wanted: list[str] | None = None) -> Any:
    """Return split name -> dataset; it may hold fewer or more than what is wanted (``None``: whatever there is)."""
    return without_decoding(_load_any(settings, wanted))


def _load_any(settings: DataSettings, wanted: list[str] | None) -> Any:
    if settings.files is not None:
        return _load_files({split: _as_list(paths) for split, paths in settings.files.items()}, "data.files")
    name = str(settings.name)
    if name == DIGITS and not Path(name).exists():
        return _load_digits()
    path = Path(name).expanduser()
    if path.is_file():
        return _load_files({settings.train: [str(path)]}, "data.name")
    return _load_folder(path, wanted) if path.is_dir() else _load_hub(name, settings.config)


def local_files(settings: DataSettings) -> list[Path]:
    """Return the local files that hold the splits in use."""
    if settings.files is not None:
        return [Path(path).expanduser() for several in settings.files.values() for path in _as_list(several)]
    path = Path(str(settings.name)).expanduser()
    if not path.is_dir():
        return [path] if path.is_file() else []
    wanted = {settings.train, *(() if settings.test_size else settings.evaluation)}
    return [file for file in sorted(path.iterdir()) if file.is_file() and file.name.split(".")[0] in wanted]


def headless(settings: DataSettings, dataset: Any, columns: Iterable[str]) -> str:
    """Return what to do about a file whose first line is a row of data, not names; empty where it has a header.

    Args:
        settings: What was loaded.
        dataset: Its rows; their columns have the names that the first line says.
        columns: Names to look at: a number above numbers, or a text that stands below itself again, is no name.
    """
    files = [path for path in local_files(settings) if _format(path) == "csv"]
    counted = dataset.column_names == [str(number) for number in range(len(dataset.column_names))]  # as pandas does
    if not files or counted or not any(_is_value(dataset, name) for name in columns):
        return ""
    names = ",".join(["text", "label", *(f"column{n}" for n in range(3, 99))][: len(dataset.column_names)])
    return (
        f"The first line of '{files[0].name}' looks like data, and must be names of columns: write a line such as "
        f"{names} above it"
    )


def _is_value(dataset: Any, column: str) -> bool:
    """Whether a column's name looks like one of its values."""
    kind = str(getattr(dataset.features[column], "dtype", ""))
    if "int" in kind or "float" in kind:
        return re.fullmatch(r"[+-]?\d+(\.\d+)*", column) is not None  # datasets call a second 1 "1.1"
    return "string" in kind and dataset[column][:_LOOKED_AT].count(column) > 1


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _load_files(files: dict[str, list[str]], key: str) -> Any:
    paths = [Path(path).expanduser() for several in files.values() for path in several]
    for path in paths:
        if not path.is_file():
            raise PruningError(f"{key}: no such file. Received: '{path}'.")
    formats = {_format(path) for path in paths}
    separators = {_separator(path) if _format(path) == "csv" else "," for path in paths}
    if len(formats) != 1 or None in formats or len(separators) != 1:
        raise PruningError(f"{key}: files must all be of one type of {', '.join(_FORMATS)}. Received: {files}.")
    expanded = {split: [str(Path(path).expanduser()) for path in several] for split, several in files.items()}
    builder = str(formats.pop())
    told = {"sep": separators.pop()} if builder == "csv" else {}
    # one call a split: within one call, all splits must have the same columns
    return {
        split: _call_datasets(key, builder, data_files={split: expanded[split]}, **told)[split] for split in expanded
    }


def _separator(path: Path) -> str:
    """Say what stands between a file's columns, by its first line: many a spreadsheet writes ``;`` into a csv."""
    import fsspec

    if ".tsv" in path.suffixes:
        return "\t"
    with fsspec.open(str(path), "rt", encoding="utf-8", errors="replace", compression="infer") as file:
        head = file.readline()
    return next((one for one in (",", ";", "\t") if one in head), ",")


def _format(path: Path) -> str | None:
    """Say which of our formats a file has; compressed ones (``.csv.gz``) count."""
    return next((_FORMATS[suffix] for suffix in reversed(path.suffixes[-2:]) if suffix in _FORMATS), None)


def _load_folder(folder: Path, wanted: list[str] | None) -> Any:
    """Read ``<split>.<type>`` for each wanted split; a folder laid out otherwise is left to `datasets`."""
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        from datasets import load_from_disk

        return load_from_disk(str(folder))
    by_split = {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if _format(path) and path.is_file()}
    wanted = [name for name in by_split if name in SPLITS] if wanted is None else wanted
    if not set(wanted) & set(by_split):
        return _load_sounds(folder) or _call_datasets("data.name", str(folder))
    for split in wanted:
        if split not in by_split:
            raise missing(f"data.name: folder '{folder}' has no file for split '{split}'", split, by_split)
    return _load_files({split: [str(by_split[split])] for split in wanted}, "data.name")


def _load_sounds(folder: Path) -> dict[str, Any]:
    """Read a folder of sounds, or one for each split: by their ``metadata``, else by the folders that they lie in.

    `datasets` wants torchcodec for such folders, only to note their names.
    """
    places = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in SPLITS}
    found = {split: _sounds_of(place) for split, place in (places or {"train": folder}).items()}
    return {split: rows for split, rows in found.items() if rows is not None}


def _sounds_of(folder: Path) -> Any:
    files = find_sounds(folder)
    told = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if not files:
        return None
    if told is None:
        return rows_of_sounds(files, folder)
    return with_metadata(_load_files({"train": [str(told)]}, "data.name")["train"], told)


def _load_hub(name: str, config: str | None) -> Any:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in _FORMATS:
        raise PruningError(f"data.name: no such file or folder. Received: '{name}'.")
    return _call_datasets("data.name", name, config)


def _call_datasets(key: str, *args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # offline, unknown name, broken file: datasets raises a dozen types
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise PruningError(f"{key}: cannot be loaded: {reason}. Received: {kwargs or args}.") from error


def _load_digits() -> dict[str, Any]:
    """Return scikit-learn's digits as images ``(1, 8, 8)`` in [0, 1]; 30 % are held out, equally of each digit."""
    from datasets import Array3D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"image": Array3D((1, 8, 8), "float32"), "label": ClassLabel(names=list("0123456789"))})
    images = (digits.images / 16).astype(np.float32)[:, None]
    dataset = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    return dict(zip(("train", "test"), hold_out(dataset, "label", 0.3), strict=True))


def hold_out(dataset: Any, label: str | None, fraction: float) -> tuple[Any, Any]:
    """Split rows in two, with as many of each class in both parts where every class has rows enough.

    Args:
        dataset: The rows.
        label: The column whose classes count; ``None``: rows have none.
        fraction: Of the second part.
    """
    from sklearn.model_selection import train_test_split

    stratify = None if label is None or "float" in dataset.features[label].dtype else dataset[label][:]
    _, counts = np.unique([] if stratify is None else stratify, return_counts=True)
    held_out = int(np.ceil(fraction * len(dataset)))
    if not len(counts) or counts.min() < 2 or min(held_out, len(dataset) - held_out) < len(counts):
        stratify = None
    rows = range(len(dataset))
    kept, others = train_test_split(rows, test_size=fraction, random_state=_HELD_OUT_SEED, stratify=stratify)
    return dataset.select(kept), dataset.select(others)


def missing(what: str, name: str, known: Iterable[str]) -> PruningError:
    """Return the error for a name that is not there."""
    known = list(known)
    return PruningError(f"{what}; there are: {', '.join(known)}. Received: '{name}'.{did_you_mean(name, known)}")
