"""What a teacher has answered, row by row, kept on disk: it is asked about each row once, in all epochs and runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import PruningError
from ..files import new_file
from .hearing import flat

logger = logging.getLogger(__name__)
_KEY = 16  # bytes of a row's digest
_NO_MATTER = ("transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype", "hf_prune")


class Memory:
    """A teacher's logits by what a row holds, in one file a process.

    Padding is no part of a row, so that the same row in another batch is found. Answers differ from fresh ones by what
    the padding of the batch in which they were computed did to the last bits.

    Args:
        folder: Where the files lie; other teachers' may lie there too.
        teacher: Whose answers.
        precision: What it computes in beside its own dtype, such as ``"bf16"`` under autocast.
        rank: Number of this process: each writes a file of its own, and reads all.

    Raises:
        PruningError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, teacher: Any, precision: str = "", rank: int = 0) -> None:
        self.folder, self.rank = _writable(Path(folder).expanduser()), rank
        self.name = digest_of(teacher, precision)
        self.asked, self.found = 0, 0
        self.new = 0  # rows that were not known, since this was made
        self.known: dict[bytes, Tensor] = {}
        self._own = set[bytes]()
        self.begin_epoch()
        self.read()

    def answers(self, inputs: Mapping[str, Any], ask: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the teacher's logits for a batch: remembered where all of its rows are, else asked for.

        Args:
            inputs: What the teacher would read.
            ask: Asks it.

        Raises:
            PruningError: Its answers are not one row of logits for each row that it reads.
        """
        keys, device = row_keys(inputs), next(one.device for one in flat(inputs).values() if torch.is_tensor(one))
        unknown = sum(key not in self.known for key in keys)
        self.asked, self.found, self.new = self.asked + len(keys), self.found + len(keys) - unknown, self.new + unknown
        if not unknown:
            return {"logits": torch.stack([self.known[key] for key in keys]).to(device)}
        found = ask()
        logits = found.get("logits")
        if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != len(keys):
            shape = tuple(logits.shape) if torch.is_tensor(logits) else ", ".join(found)
            raise PruningError(
                "Distillation.cache is for teachers with one row of logits for each row that they read, as classifiers "
                f"have; leave it out. Received: {shape} for {len(keys)} rows"
            )
        self.known.update(zip(keys, logits.detach().float().cpu().clone()))
        self._own.update(keys)
        return found

    def begin_epoch(self) -> None:
        """Count from now on what is found again in an epoch."""
        self.asked, self.found, self._new_before = 0, 0, self.new

    def check_found(self) -> None:
        """Check at the end of an epoch that rows were found again, where as many had been asked for before it.

        Raises:
            PruningError: None was: rows differ each time, as augmented ones do.
        """
        if 0 < self.asked <= self._new_before and not self.found:
            raise PruningError(
                "Distillation.cache is for rows that come again as they were: leave it out where data are augmented, "
                f"masked at random or padded to other numbers. Received: {self.asked} rows of which none was known"
            )

    def read(self) -> None:
        """Read what all processes have written; a file that is damaged counts for nothing."""
        for path in sorted(self.folder.glob(f"{self.name}-*.safetensors")):
            try:
                told = load_file(path)
                keys, logits = _checked(told["keys"], told["logits"])
            except (OSError, KeyError, ValueError, SafetensorError) as error:
                logger.warning("%s cannot be read, and is written anew: %s", path, error)
                continue
            own = path == self._file
            for key, row in zip(keys.contiguous().numpy(), logits):
                self.known.setdefault(key.tobytes(), row)
                if own:
                    self._own.add(key.tobytes())

    def write(self) -> None:
        """Write what this process has asked for."""
        if not self._own:
            return
        keys = sorted(self._own)
        packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, _KEY)
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self._file) as file:
            save_file({"keys": packed, "logits": torch.stack([self.known[key] for key in keys])}, file)

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}-{self.rank}.safetensors"


def _writable(folder: Path) -> Path:
    """Return a folder that is there or can be made: an epoch must not end with what cannot be kept."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PruningError(f"Distillation.cache must be a folder that can be written. Received: '{folder}'")
    return folder


def _checked(keys: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a file holds, where it is a row of logits for each key."""
    if keys.dtype != torch.uint8 or keys.shape[1:] != (_KEY,) or logits.ndim != 2 or len(logits) != len(keys):
        raise ValueError(f"keys of {tuple(keys.shape)} and logits of {tuple(logits.shape)}")
    return keys, logits


def digest_of(teacher: Any, precision: str = "") -> str:
    """Return what tells a teacher from others, in 32 hexadecimal digits: class, config, weights, precision."""
    found = hashlib.sha256(f"{type(teacher).__name__} {precision} {_settings_of(teacher)}".encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()[: 2 * _KEY]


def _settings_of(teacher: Any) -> str:
    """Return what a config says of the computation: the same weights with other heads or activations answer else."""
    config: Any = getattr(teacher, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    told = {name: value for name, value in told.items() if not name.startswith("_") and name not in _NO_MATTER}
    return json.dumps(told, sort_keys=True, default=str)


def row_keys(inputs: Mapping[str, Any]) -> list[bytes]:
    """Return a digest of each row of a batch, without its padding.

    Args:
        inputs: What a model reads; values that are no tensors count for all rows.

    Raises:
        PruningError: There is no tensor among them.
    """
    told = flat(inputs)
    mask = told.get("attention_mask")
    mask = mask.bool().cpu() if torch.is_tensor(mask) and mask.ndim == 2 else None
    tensors = {name: one.detach().cpu() for name, one in sorted(told.items()) if torch.is_tensor(one) and one.ndim}
    if not tensors:
        raise PruningError(f"Distillation.cache needs batches of tensors. Received: {', '.join(told)}")
    others = repr([(name, one) for name, one in sorted(told.items()) if isinstance(one, (bool, int, float, str))])
    rows = len(next(iter(tensors.values())))
    return [_row_key(tensors, row, None if mask is None else mask[row], others) for row in range(rows)]


def _row_key(tensors: Mapping[str, Tensor], row: int, mask: Tensor | None, others: str) -> bytes:
    found = hashlib.blake2b(others.encode(), digest_size=_KEY)
    for name, tensor in tensors.items():
        one = tensor[row]
        one = one[mask] if mask is not None and one.ndim and len(one) == len(mask) else one
        found.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        found.update(_bytes(one))
    return found.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
