"""The folder of an export: an earlier one or the new one is there at any moment, and nothing else is touched."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import PruningError
from ..folders import whole_folder
from .lanes import MANIFEST

_GRAPHS = ("model", "encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
_STEPS = ("prefill", "decode")  # as transformers 5 exports generation with past
_FILES = tuple(file for name in _GRAPHS + _STEPS for file in (f"{name}.onnx", f"openvino_{name}.xml", f"{name}.pte"))
_STALE = (MANIFEST, "openvino_*.bin", *(f"{name}*" for name in _FILES))  # of an earlier export
# What belongs to a tokenizer or processor, so that an export of a folder can be used without the folder.
_PROCESSOR_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*", "*processor_config.json")


@contextlib.contextmanager
def export_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `output` when the block ends; if it raises, nothing has changed.

    Raises:
        PruningError: The folder is not an export's, or cannot be written.
    """
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        _refuse_foreign(output)
        with whole_folder(output, stale=_STALE) as folder:
            yield folder
    except OSError as error:
        _remove_empty(missing)
        raise PruningError(f"output must be a folder that can be written. Received: {output} ({error}).") from error
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _refuse_foreign(output: Path) -> None:
    """Keep an export from overwriting a checkpoint's config, or anything else of the user's."""
    names = {file.name for file in output.iterdir()} if output.is_dir() else set()
    found = {name for name in names if not name.startswith(".") and name != "lost+found"}  # as of a fresh volume
    ours = any(name in found for name in _FILES)
    if found and (not ours or any(_is_weights(name) for name in found)):
        received = f"{output}, which holds {', '.join(sorted(found)[:3])}. Did you mean {output / 'onnx'}?"
        raise PruningError(f"output must be a new folder, an empty one or an earlier export. Received: {received}")


def _is_weights(name: str) -> bool:
    """Whether a file is a checkpoint's; OpenVINO keeps its own weights in a .bin, too."""
    return name.endswith((".safetensors", ".bin")) and not name.startswith("openvino_")


def save_processors(model_or_path: Any, tokenizer: Any, folder: Path) -> None:
    """Put a tokenizer or processor beside the graphs: the one given, or the one in the checkpoint's folder."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif isinstance(model_or_path, (str, Path)):
        for pattern in _PROCESSOR_FILES:
            for file in Path(model_or_path).glob(pattern):
                shutil.copy(file, folder)
