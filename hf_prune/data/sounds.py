"""Sounds: folders of them, and reading one as numbers at the rate that a model hears."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import PruningError
from ..files import is_inside
from .damage import check_each
from .rows import label_converter
from .settings import DataSettings

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TYPES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")
_FILE = "file_name"  # the column of such a file, as `datasets` has it
Sound: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
logger = logging.getLogger(__name__)


# folders
def find_sounds(folder: Path) -> list[Path]:
    """Return the files of a folder, and of those inside, that hold sounds; hidden ones hold other things."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _TYPES and path.is_file()]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def rows_of_sounds(files: Sequence[Path], folder: Path) -> Any:
    """Return rows with ``audio`` and, where sounds lie in folders of their own, ``label``: the folder's name."""
    from datasets import Dataset

    labels = [path.parent.name for path in files]
    labelled = all(path.parent != folder for path in files)
    rows = {"audio": [str(path.absolute()) for path in files], **({"label": labels} if labelled else {})}
    return _as_audio(Dataset.from_dict(rows), "audio")


def with_metadata(rows: Any, file: Path) -> Any:
    """Return the rows of a metadata file, with ``audio`` for the names of files beside it.

    Raises:
        PruningError: It names no files, or one that is not there.
    """
    if _FILE not in rows.column_names:
        raise PruningError(f"{file.name} must have a column {_FILE}. Received: {', '.join(rows.column_names)}")
    paths = [file.parent / str(name) for name in rows[_FILE][:]]
    gone = next((path for path in paths if not is_inside(file.parent, path)), None)
    if gone is not None:
        raise PruningError(f"{file.name}: every {_FILE} must be a file in its folder. Received: '{gone}'")
    named = rows.remove_columns([_FILE]).add_column("audio", [str(path.absolute()) for path in paths])
    return _as_audio(named, "audio")


def without_decoding(splits: Any) -> Any:
    """Return splits whose sounds come as paths and bytes: `datasets` itself would read them by torchcodec."""
    return {split: _each_as_audio(rows) for split, rows in splits.items()} if _any_audio(splits) else splits


def _any_audio(splits: Any) -> bool:
    return any(is_audio(feature) for rows in splits.values() for feature in rows.features.values())


def _each_as_audio(rows: Any) -> Any:
    for name in [name for name, feature in rows.features.items() if is_audio(feature)]:
        rows = _as_audio(rows, name)
    return rows


def _as_audio(rows: Any, column: str) -> Any:
    from datasets import Audio

    return rows.cast_column(column, Audio(decode=False))


def is_audio(feature: Any) -> bool:
    """Whether a column holds sounds."""
    return type(feature).__name__ == "Audio"


# one sound
def read_sound(value: Mapping[str, Any], rate: int) -> Sound:
    """Return one sound as numbers in [-1, 1], of one channel.

    Args:
        value: ``bytes``, or ``path`` of a file.
        rate: Samples per second that are wanted; another rate is resampled.

    Raises:
        PruningError: It cannot be read.
    """
    own, samples = _decode(value)
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return _resampled(mono.astype(np.float32), own, rate)


def seconds_of(value: Mapping[str, Any]) -> float:
    """Return how long a sound is."""
    rate, samples = _decode(value)
    return len(samples) / rate


def _decode(value: Mapping[str, Any]) -> tuple[int, Any]:
    """Return samples per second, and the samples: ``(samples,)`` or ``(samples, channels)``."""
    from scipy.io import wavfile

    data, name = _bytes_of(value), value.get("path") or "bytes"
    if data[:4] in (b"RIFF", b"RIFX", b"RF64"):
        try:
            rate, samples = wavfile.read(BytesIO(data))
        except (ValueError, EOFError, struct.error):  # numbers that scipy does not know, such as ADPCM; damage
            return _by_soundfile(data, name)
        return rate, _in_unit(samples)
    return _by_soundfile(data, name)


def _bytes_of(value: Mapping[str, Any]) -> bytes:
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    try:
        return Path(str(value.get("path"))).read_bytes()
    except OSError as error:
        raise PruningError(f"data.audio: a sound cannot be read ({error.strerror}). Received: {value!r:.200}") from None


def _in_unit(samples: Any) -> Any:
    """Return whole numbers of wav files as fractions; 8 bits are written without a sign."""
    if samples.dtype.kind == "f":
        return samples
    if samples.dtype == np.uint8:
        return samples.astype(np.float32) / 128 - 1
    return samples / -float(np.iinfo(samples.dtype).min)


def _by_soundfile(data: bytes, name: str) -> tuple[int, Any]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the library that it loads is not there
        raise PruningError(
            "data.audio: plain wav files are read as they are, others, if they are not damaged, by soundfile: "
            f"pip install 'hf_prune[audio]'. Received: '{name}'"
        ) from None
    try:
        samples, rate = soundfile.read(BytesIO(data), dtype="float32")
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise PruningError(
            f"data.audio: a sound cannot be read ({reason}): it is damaged, or of a type that is not known. "
            f"Received: '{name}'"
        ) from None
    return rate, samples


def _resampled(sound: Sound, own: int, wanted: int) -> Sound:
    if own == wanted:
        return sound
    from scipy.signal import resample_poly

    common = math.gcd(own, wanted)
    return np.asarray(resample_poly(sound, wanted // common, own // common), dtype=np.float32)


# rows
def prepare_sounds(dataset: Any, extractor: Any, settings: DataSettings, *, num_labels: int | None = None) -> Any:
    """Make ``sound`` and ``labels`` of sounds with a class, as they are asked for: no second copy of them is stored.

    Args:
        dataset: Rows from `load_split`.
        extractor: The model's own; it says at which rate the model hears.
        settings: Names the columns; sounds are cut to `max_seconds`.
        num_labels: Of the model, where rows have several classes.
    """
    column, label, rate = _audio_column(settings), settings.label_column, extractor.sampling_rate
    _lengths(dataset, column)
    most, convert = round(settings.max_seconds * rate), label_converter(dataset.features[label], num_labels)

    def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
        sounds = [read_sound(one, rate)[:most] for one in batch[column]]
        return {"sound": sounds, "labels": [convert(one) for one in batch[label]]}

    return dataset.with_transform(read)


def prepare_speech(dataset: Any, processor: Any, settings: DataSettings, longest: int | None = None) -> Any:
    """Make ``sound`` and ``labels``, the tokens of what was said; longer ones than `max_seconds` are left out.

    Args:
        dataset: Rows from `load_split`.
        processor: The model's own, with a feature extractor and a tokenizer.
        settings: Names the columns.
        longest: Tokens of a text at most; ``None``: all of them.
    """
    column, label, rate = _audio_column(settings), settings.label_column, processor.feature_extractor.sampling_rate
    if "string" not in getattr(dataset.features[label], "dtype", ""):
        raise PruningError(
            f"data.label: column '{label}' must hold the text that was said. Received: {dataset.features[label]}"
        )
    case, how = _case_of(processor.tokenizer), {"truncation": longest is not None, "max_length": longest}

    def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
        tokens = [processor.tokenizer(case(text), **how)["input_ids"] for text in batch[label]]
        return {"sound": [read_sound(one, rate) for one in batch[column]], "labels": tokens}

    return _short_ones(dataset, column, settings.max_seconds).with_transform(read)


def _audio_column(settings: DataSettings) -> str:
    if settings.audio is None:
        raise PruningError("data.audio must name the column with the sounds. Received: None.")
    return settings.audio


def _lengths(dataset: Any, column: str) -> list[float]:
    """Return how long each sound is, having checked that each can be read and holds something."""

    def read(value: Mapping[str, Any]) -> float:
        seconds = seconds_of(value)
        if not seconds:
            raise PruningError(f"a sound has no samples: leave it out. Received: '{value.get('path')}'")
        return seconds

    return check_each((row[column] for row in dataset.select_columns([column])), "data.audio", read)


def _short_ones(dataset: Any, column: str, most: float) -> Any:
    fit = [number for number, seconds in enumerate(_lengths(dataset, column)) if seconds <= most]
    if not fit:
        raise PruningError(f"data.max_seconds: some sounds must be that short. Received: {most:g}, all are longer")
    if len(fit) < len(dataset):
        logger.warning(f"{len(dataset) - len(fit)} of {len(dataset)} sounds are longer than {most:g} s, and left out.")
    return dataset.select(fit)


def _case_of(tokenizer: Any) -> Any:
    """Return what writes a text in the letters that a tokenizer of single letters knows: many have one case only."""
    letters = [one for one in tokenizer.get_vocab() if len(one) == 1 and one.isalpha()]
    singles = len(letters) > 0.5 * len(tokenizer.get_vocab())
    if singles and not any(one.islower() for one in letters):
        return str.upper
    return str.lower if singles and not any(one.isupper() for one in letters) else str
