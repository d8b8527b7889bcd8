"""What a teacher has answered, row by row, kept on disk: it is asked about each row once, in all epochs and runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import PruningError
from ..files import new_file, try_writing
from .hearing import flat
from .kept import Form, Record, Whole, decoded

logger = logging.getLogger(__name__)
_WHOLE = Whole()
_KEY = 16  # bytes of a row's digest
_NO_MATTER = ("transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype", "hf_prune")


class Memory:
    """What a teacher answered by what a row holds, in files of which each process writes its own.

    Padding is no part of a row, so that the same row in another batch is found. Answers differ from fresh ones by what
    the padding of the batch in which they were computed did to the last bits.

    Args:
        folder: Where the files lie; other teachers' may lie there too.
        teacher: Whose answers.
        precision: What it computes in beside its own dtype, such as ``"bf16"`` under autocast.
        rank: Number of this process: each writes files of its own, and reads all.
        form: What is kept of an answer.

    Raises:
        PruningError: The folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, teacher: Any, precision: str = "", rank: int = 0, form: Form = _WHOLE
    ) -> None:
        self.folder, self.rank, self.form = writable_cache(folder), rank, form
        self.name = digest_of(teacher, f"{precision} {form}")
        self.asked, self.found = 0, 0
        self.new = 0  # rows that were not known, since this was made
        self.known: dict[bytes, Record] = {}
        self._unwritten = set[bytes]()
        self._read = set[Path]()
        self._places_count = not any("rotary" in type(one).__name__.lower() for one in teacher.modules())
        self.begin_epoch()
        self.read()

    def answers(self, inputs: Mapping[str, Any], ask: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the teacher's answers for a batch: remembered where all of its rows are, else asked for.

        Args:
            inputs: What the teacher would read.
            ask: Asks it.

        Raises:
            PruningError: Its answers cannot be kept row by row.
        """
        keys = row_keys(inputs, places=self._places_count)
        device = next(one.device for one in flat(inputs).values() if torch.is_tensor(one))
        known = sum(key in self.known for key in keys)
        self.asked, self.found, self.new = self.asked + len(keys), self.found + known, self.new + len(keys) - known
        if known < len(keys):
            answered = zip(keys, self.form.keep(ask(), inputs, len(keys)))
            new = {key: row for key, row in answered if key not in self.known}  # the first answer counts
            self.known.update(new)
            self._unwritten.update(new)
        return self.form.hand_out([self.known[key] for key in keys], inputs, device)

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
        """Read what all processes have written since this was asked last; a file that is damaged counts for nothing."""
        for path in sorted({*self.folder.glob(f"{self.name}-*.safetensors")} - self._read):
            try:
                rows = _rows_of(load_file(path), self.form.names)
            except (OSError, KeyError, ValueError, SafetensorError) as error:
                logger.warning("%s cannot be read, and is written anew: %s", path, error)
                continue
            self._read.add(path)
            for key, row in rows:
                self.known.setdefault(key, row)

    def write(self) -> None:
        """Write what this process has asked for since it wrote last, as a file of its own.

        Where the disk is full, what is remembered still serves this run, and is tried again with what comes next.
        """
        if not self._unwritten:
            return
        keys = sorted(self._unwritten)
        rows = [self.known[key] for key in keys]
        packed = {name: torch.cat([row[name] for row in rows]) for name in self.form.names}
        packed["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, _KEY)
        packed["lengths"] = torch.tensor([len(row[self.form.names[0]]) for row in rows])
        try:
            self._write(packed)
        except (OSError, SafetensorError) as error:
            logger.warning("distillation.cache %s cannot be written, training goes on: %s", self.folder, error)
        else:
            self._unwritten.clear()

    def _write(self, packed: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.read()  # another run may have written meanwhile
        files = (self.folder / f"{self.name}-{self.rank}-{number}.safetensors" for number in itertools.count())
        own = next(path for path in files if path not in self._read)
        with new_file(own) as file:
            save_file(packed, file)
        self._read.add(own)


def writable_cache(told: str | Path) -> Path:
    """Return a folder that is there or can be made: an epoch must not end with what cannot be kept.

    Raises:
        PruningError: It cannot be written.
    """
    folder = Path(told).expanduser()
    try:
        try_writing(folder)
    except OSError as error:
        raise PruningError(
            f"distillation.cache must be a folder that can be written. Received: '{told}' ({error.strerror})"
        ) from None
    return folder


def _rows_of(told: Mapping[str, Tensor], names: Sequence[str]) -> list[tuple[bytes, Record]]:
    """Return the rows of a file, where it has as many items of each name as rows say that they hold."""
    keys, lengths, values = told["keys"], told["lengths"], [told[name] for name in names]
    fits = keys.dtype == torch.uint8 and keys.shape[1:] == (_KEY,) and lengths.shape == keys.shape[:1]
    if not fits or any(one.ndim != 2 or len(one) != lengths.sum() for one in values):
        raise ValueError(f"keys of {tuple(keys.shape)} and {[tuple(one.shape) for one in values]}")
    pieces = zip(*(torch.split(one, lengths.tolist()) for one in values))
    return [(key.tobytes(), dict(zip(names, row))) for key, row in zip(keys.contiguous().numpy(), pieces)]


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


def row_keys(inputs: Mapping[str, Any], *, places: bool = False) -> list[bytes]:
    """Return a digest of each row of a batch, without its padding.

    Args:
        inputs: What a model reads; values that are no tensors count for all rows.
        places: Whether padding before a text moves it to other positions for the model.

    Raises:
        PruningError: There is no tensor among them.
    """
    told = flat(inputs)
    mask = told.get("attention_mask")
    mask = mask.bool().cpu() if torch.is_tensor(mask) and mask.ndim == 2 else None
    written = decoded(told)
    tensors = {name: one.detach().cpu() for name, one in sorted(told.items()) if torch.is_tensor(one) and one.ndim}
    if not tensors:
        raise PruningError(f"Distillation.cache needs batches of tensors. Received: {', '.join(told)}")
    others = repr([(name, one) for name, one in sorted(told.items()) if isinstance(one, (bool, int, float, str))])
    masks = {name: _mask_for(name, mask, written) for name in tensors}
    moved = mask.int().argmax(1).tolist() if places and mask is not None else itertools.repeat(0)
    rows = range(len(next(iter(tensors.values()))))
    return [_row_key(tensors, row, masks, f"{others} {begin}" if begin else others) for row, begin in zip(rows, moved)]


def _mask_for(name: str, read: Tensor | None, written: Tensor | None) -> Tensor | None:
    """Return which positions of a tensor count: a decoder's behind an encoder are its own."""
    return written.cpu() if written is not None and name.startswith(("labels", "decoder")) else read


def _row_key(tensors: Mapping[str, Tensor], row: int, masks: Mapping[str, Tensor | None], others: str) -> bytes:
    found = hashlib.blake2b(others.encode(), digest_size=_KEY)
    for name, tensor in tensors.items():
        one, mask = tensor[row], masks[name]
        one = one[mask[row]] if mask is not None and one.ndim and len(one) == mask.shape[1] else one
        found.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        found.update(_bytes(one))
    return found.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
