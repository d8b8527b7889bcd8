"""Where data comes from: files, folders, the Hub and the embedded digits become `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PruningError, did_you_mean
from .lines import with_line
from .settings import DataSettings
from .sheets import check_encoding, is_conll, is_headless, options_of, tidied
from .sounds import METADATA, find_sounds, rows_of_sounds, with_metadata, without_decoding

DIGITS = "digits"  # the data set inside scikit-learn: 1797 images of 8 x 8
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")  # what files and splits are usually called
_ALSO = {"training": "train", "evaluation": "eval", "testing": "test"}  # what folders of them are called too
_TAGGED = (".conll", ".bio", ".iob", ".iob2")  # words with their tags, which nobody reads here
_HELP = {  # what `datasets` and pandas say, and what that means
    "Error tokenizing data": 'a text with the separator in it, or with a line break, stands in "quotes"',
    "Failed to parse string": "a column must hold numbers in all rows, or text in all, as a parquet file says",
    "truncated converting to int": "a column must hold whole numbers in all rows, or fractions in all, such as 1.0",
    "JSON parse error": "a jsonl file has one whole object in each line, a json file a list of them",
    "corresponds to no data": "there are no rows",
    "StopIteration": "there are no rows",
}
_NAMED = 5  # files or folders in a message
_HELD_OUT_SEED = 0  # what is held out is the same in every run, whatever the seed of the training
logger = logging.getLogger(__name__)


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
    return [file for split, file in _by_split(path).items() if split in wanted]


def file_of(settings: DataSettings, split: str) -> Path | None:
    """Return the local file that holds a split; ``None``: there are several, or it is no file of rows."""
    if settings.files is not None:
        several = _as_list(settings.files.get(split, []))
        return Path(several[0]).expanduser() if len(several) == 1 else None
    path = Path(str(settings.name)).expanduser()
    return _by_split(path).get(split) if path.is_dir() else path if path.is_file() else None


def headless(settings: DataSettings, dataset: Any, columns: Iterable[str]) -> str:
    """Return what to do about a file whose first line is a row of data, not names; empty where it has a header.

    Args:
        settings: What was loaded.
        dataset: Its rows; their columns have the names that the first line says.
        columns: Names to look at.
    """
    files = [path for path in local_files(settings) if _format(path) == "csv"]
    if not files or not is_headless(dataset, columns):
        return ""
    names = ",".join(["text", "label", *(f"column{n}" for n in range(3, 99))][: len(dataset.column_names)])
    return (
        f"The first line of '{files[0].name}' looks like data, and must be names of columns: write a line such as "
        f"{names} above it (where they are names, say --text and --label)"
    )


def files_alone(dataset: Any) -> str:
    """Return what a folder of sounds or images must have where its files say nothing else; empty where they do."""
    if [type(kind).__name__ for kind in dataset.features.values()] not in (["Audio"], ["Image"]):
        return ""
    return (
        "Files need a label: put those of each class into a folder of its own, or write a metadata.csv beside them, "
        "with the columns file_name and label (for speech: file_name and text)"
    )


def evaluation_splits(splits: Iterable[str]) -> list[str]:
    """Return the splits that are called, or whose names begin, as one to evaluate on: ``validation_matched`` too."""
    found = [name for usual in SPLITS[1:] for name in splits if name.startswith(usual)]
    exact = [usual for usual in SPLITS[1:] if usual in found]
    return list(dict.fromkeys([*exact, *found]))


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _load_files(files: dict[str, list[str]], key: str) -> Any:
    paths = [Path(path).expanduser() for several in files.values() for path in several]
    for path in paths:
        if not path.is_file():
            raise PruningError(f"{key}: no such file. Received: '{path}'.")
        if path.suffix in _TAGGED:
            raise _no_rows(key, path)
    formats = {_format(path) for path in paths}
    if len(formats) != 1 or None in formats:
        raise PruningError(f"{key}: files must all be of one type of {', '.join(_FORMATS)}. Received: {files}.")
    builder = str(formats.pop())
    # one call a split: within one call, all splits must have the same columns
    return {split: _load_split(key, builder, split, several) for split, several in files.items()}


def _load_split(key: str, builder: str, split: str, files: list[str]) -> Any:
    paths = [Path(path).expanduser() for path in files]
    for path in paths if builder != "parquet" else ():
        check_encoding(path)
        if builder in ("csv", "text") and is_conll(path):
            raise _no_rows(key, path)
    told = [options_of(path) for path in paths] if builder == "csv" else [{}]
    if any(one != told[0] for one in told):
        raise PruningError(f"{key}: files of one split must have one separator between columns. Received: {files}")
    utf8 = {"encoding": "utf-8-sig"} if builder == "text" else {}  # else a mark at the beginning is text
    data_files = {split: [str(path) for path in paths]}
    rows = _call_datasets(key, builder, data_files=data_files, **told[0], **utf8)[split]
    return tidied(rows, paths[0].name) if builder == "csv" else rows


def _no_rows(key: str, path: Path) -> PruningError:
    """Return the error for words with their tags, of which sentences are to be made first."""
    return PruningError(
        f"{key}: each line must be a text, or a row below a header. Of a CoNLL file, with a word and its tag in each "
        f"line, docs/howto/own_csv.md has lines that make a jsonl file. Received: '{path}'"
    )


def _format(path: Path) -> str | None:
    """Say which of our formats a file has; compressed ones (``.csv.gz``) count."""
    return next((_FORMATS[suffix] for suffix in reversed(path.suffixes[-2:]) if suffix in _FORMATS), None)


def _load_folder(folder: Path, wanted: list[str] | None) -> Any:
    """Read ``<split>.<type>`` for each wanted split; a folder laid out otherwise is left to `datasets`."""
    saved = _load_saved(folder, wanted)
    if saved is not None:
        return saved
    by_split = _by_split(folder)
    wanted = [name for name in by_split if name in SPLITS] if wanted is None else wanted
    if not set(wanted) & set(by_split):
        return _load_sounds(folder) or _load_images(folder) or _load_others(folder, [*wanted, "train"][0])
    for split in wanted:
        if split not in by_split:
            raise missing(f"data.name: folder '{folder}' has no file for split '{split}'", split, by_split)
    return _load_files({split: [str(by_split[split])] for split in wanted}, "data.name")


def _by_split(folder: Path) -> dict[str, Path]:
    """Return split -> its file, which may be called otherwise: ``Training.csv``, where there is no ``train.csv``."""
    files = {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if _format(path) and path.is_file()}
    return {_split_of(name) or name: path for name, path in files.items()} | files


def _load_others(folder: Path, train: str) -> Any:
    """Read the only file of a folder as we read files; what is laid out otherwise is left to `datasets`."""
    there = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    for path in there:
        if path.suffix in _TAGGED:
            raise _no_rows("data.name", path)
    if len(there) == 1 and _format(there[0]) and there[0].is_file():
        return _load_files({train: [str(there[0])]}, "data.name")
    return _call_datasets("data.name", str(folder))


def _load_saved(folder: Path, wanted: list[str] | None) -> Any:
    """Read what `save_to_disk` has written: a DatasetDict, or one Dataset, which is the split to train on."""
    from datasets import load_from_disk

    several = (folder / "dataset_dict.json").is_file()
    if not several and not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    try:
        found = load_from_disk(str(folder)).with_format(None)  # a format would make tensors of values
    except Exception as error:  # a damaged folder: as many types as there are files
        raise PruningError(f"data.name: cannot be loaded: {_reason(error)}. Received: '{folder}'") from error
    return found if several else {(wanted or ["train"])[0]: found}


def _load_sounds(folder: Path) -> dict[str, Any]:
    """Read a folder of sounds, or one for each split: by their ``metadata``, else by the folders that they lie in.

    `datasets` wants torchcodec for such folders, only to note their names.
    """
    files = find_sounds(folder)
    if not files:
        return {}
    places = _split_folders(folder, files)
    if places and _has_metadata(folder):
        return _by_place(_sounds_of(folder), "audio", folder, places)
    found = {split: _sounds_of(place) for split, place in (places or {"train": folder}).items()}
    return {split: rows for split, rows in found.items() if rows is not None}


def _load_images(folder: Path) -> dict[str, Any] | None:
    """Read a folder of images, or one for each split.

    `datasets` alone would take ``cat/my test.png`` for a split, and leave out all that is not in one.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    rows = any(_format(path) for path in files if path.name not in METADATA)
    images = [path for path in files if path.suffix.lower() in _IMAGES and not path.name.startswith(".")]
    if rows or not images:
        return None
    places = _split_folders(folder, images)
    if places and _has_metadata(folder):
        return _by_place(_images_of(folder), "image", folder, places)
    # one call a split, as that for a public test set may have no classes
    return {split: _by_folder(_images_of(place)) for split, place in (places or {"train": folder}).items()}


def _images_of(folder: Path) -> Any:
    pattern = f"{escape(str(folder))}/**"  # brackets mean something in a pattern
    return _call_datasets("data.name", "imagefolder", data_files={"train": pattern})["train"]


def _by_place(whole: Any, column: str, folder: Path, places: dict[str, Path]) -> dict[str, Any]:
    """Return the rows of each split, where one metadata file names the files of all."""
    kind = type(whole.features[column])
    named = whole.select_columns([column]).cast_column(column, kind(decode=False))[column][:]
    inside = [Path(one["path"]).relative_to(folder.absolute()).parts[0] for one in named]
    return {
        split: whole.select([at for at, one in enumerate(inside) if one == place.name])
        for split, place in places.items()
    }


def _by_folder(rows: Any) -> Any:
    """Return images with the names of their folders for labels: the numbers are only the order of the alphabet."""
    names = getattr(rows.features.get("label"), "names", None)
    if names is None:
        return rows
    labels = [names[number] for number in rows["label"][:]]
    return rows.remove_columns(["label"]).add_column("label", labels)


def _split_folders(folder: Path, files: list[Path]) -> dict[str, Path]:
    """Return split -> its folder, of those that are called as splits are, in capitals too; say what lies beside them.

    Raises:
        PruningError: They hold files alone: of which class each is, nothing says. Two are the same split. Files lie
            beside them, and none is to train on.
    """
    named = [(_split_of(path.name), path) for path in sorted(folder.iterdir()) if path.is_dir()]
    places = {split: path for split, path in named if split}
    called = [path.name for split, path in named if split]
    if len(called) > len(places):
        raise PruningError(f"data.name: one folder must be called as each split. Received: {', '.join(called)}")
    told = [one for one in (folder, *places.values()) if _has_metadata(one)]
    if places and not told and not any(path.is_dir() for place in places.values() for path in place.iterdir()):
        raise PruningError(
            f"data.name: a folder that is called {' or '.join(called)} is a split, and must have a folder for each "
            "class, or a metadata.csv; where it is a class, give it another name, such as test_class. "
            f"Received: '{folder}', where {', '.join(called)} hold files alone"
        )
    beside = [path.relative_to(folder) for path in files if path.relative_to(folder).parts[0] not in called]
    if places and beside:
        _tell_what_lies_beside(beside, folder, called, read="train" in places)
    return places


def _split_of(name: str) -> str | None:
    found = _ALSO.get(name.lower(), name.lower())
    return found if found in SPLITS else None


def _tell_what_lies_beside(files: list[Path], folder: Path, called: list[str], read: bool) -> None:
    """Say which files are in no split: nobody reads them."""
    tops = list(dict.fromkeys(f"'{path.parts[0]}'" for path in files))
    there = ", ".join([*tops[:_NAMED], *(["…"] if len(tops) > _NAMED else [])])
    told = f"{len(files)} files of '{folder}' are in no split, as they lie beside {', '.join(called)}: {there}"
    if not read:
        raise PruningError(f"data.name: move what is to train on into a folder called train. Received: {told}")
    _warn_once(f"{told}. They are left out; what is in a folder of a split is read.")


@cache
def _warn_once(told: str) -> None:
    """Warn, once in a process: rows are loaded several times, to guess and to train."""
    logger.warning(told)


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA)


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
        files = [path for several in kwargs.get("data_files", {}).values() for path in _as_list(several)]
        received = ", ".join(f"'{path}'" for path in files) or args
        reason = _reason(error, [Path(path) for path in files if Path(path).is_file()], kwargs.get("sep", ","))
        raise PruningError(f"{key}: cannot be loaded: {reason}. Received: {received}.") from error


def _reason(error: Exception, files: Iterable[Path] = (), separator: str = ",") -> str:
    """Return what went wrong, in which line of the files, and what helps where it is a frequent one."""
    cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
    reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
    lines = (with_line(reason, path, str(_format(path)), separator) for path in files)
    told = next((line for line in lines if line), reason)
    return told + next((f" ({help})" for words, help in _HELP.items() if words in reason), "")


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

    Raises:
        PruningError: One part would have no rows.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < int(np.ceil(fraction * len(dataset))) < len(dataset):
        raise PruningError(
            f"data.test_size must leave rows in both parts. Received: {fraction:g} of {len(dataset)} rows"
        )
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
