"""Sentence embeddings in recipes: pairs of sentences whose cosine is to be a score, by a plain encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from .errors import RecipeError

MODULES = "modules.json"  # what sentence-transformers find a model's parts by
_BESIDE = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
_PARTS = ("Transformer", "Pooling", "Normalize")  # of those, only the first has weights
_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_OLD = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
Pooling = Literal["mean", "cls", "last"]


def modules_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder with what sentence-transformers keep beside a model; ``None``: it is not one of theirs.

    Args:
        name: Folder, or name on the Hub.
        revision: On the Hub.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_BESIDE, "*/config.json"]))
        except (OSError, ValueError):  # offline, or no such name: whoever loads the model says so
            return None
    return folder if (folder / MODULES).is_file() else None


class Sentences:
    """A model's tokenizer, and how one vector is made of those of its tokens.

    Args:
        tokenizer: The tokenizer.
        folder: Of a model of sentence-transformers, whose pooling counts, and whose files are saved beside the
            model; ``None``: a plain encoder, the mean of whose tokens counts.

    Raises:
        RecipeError: The model has parts of its own behind the pooling, or pools otherwise.
    """

    def __init__(self, tokenizer: Any, folder: Path | None = None) -> None:
        self.tokenizer, self.folder = tokenizer, folder
        self.parts = [] if folder is None else json.loads((folder / MODULES).read_text("utf-8"))
        self.places = [str(part.get("path", "")) for part in self.parts]
        self.pooling: Pooling = self._read_pooling()

    def _read_pooling(self) -> Pooling:
        kinds = [str(part.get("type")).rpartition(".")[2] for part in self.parts]
        strange = [kind for kind, place in zip(kinds, self.places) if kind not in _PARTS or Path(place).name != place]
        if strange:
            raise RecipeError(
                f"Of models of sentence-transformers, a recipe trains those of {', '.join(_PARTS)}; others their own "
                f"Trainer does, with a PruningCallback. Received: {strange[0]}"
            )
        if self.folder is None or "Pooling" not in kinds:
            return "mean"
        told = json.loads((self.folder / self.places[kinds.index("Pooling")] / "config.json").read_text("utf-8"))
        modes = told.get("pooling_mode") or [mode for key, mode in _OLD.items() if told.get(key)]
        mode = modes[0] if isinstance(modes, (list, tuple)) and len(modes) == 1 else modes
        if not isinstance(mode, str) or mode not in _POOLINGS:
            raise RecipeError(f"A recipe pools by {', '.join(_POOLINGS)}. Received: {mode or told}")
        return _POOLINGS[mode]  # type: ignore[return-value]

    def weights(self, mask: Tensor) -> Tensor:
        """Return how much each token counts, ``(rows, positions)``; each row's sum is 1."""
        real = mask.float()
        if self.pooling == "mean":
            return real / real.sum(1, keepdim=True)
        positions = torch.arange(mask.shape[1])
        chosen = real.argmax(1) if self.pooling == "cls" else (real * positions).argmax(1)
        return functional.one_hot(chosen, mask.shape[1]).float()

    def collate(self, rows: list[Any]) -> dict[str, Tensor]:
        """Return one batch of all first sentences and then all second ones, and ``pooling``: `weights` of them."""
        names = [name for name in rows[0] if name != "labels"]
        texts = [{name: row[name][side] for name in names} for side in (0, 1) for row in rows]
        batch = dict(self.tokenizer.pad(texts, return_tensors="pt"))
        labels = torch.tensor([float(row["labels"]) for row in rows])  # first: a batch has as many rows as it
        return {"labels": labels, **batch, "pooling": self.weights(batch["attention_mask"])}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer, and what makes the folder one of sentence-transformers where the model's was."""
        self.tokenizer.save_pretrained(folder)
        if self.folder is None:
            return
        for file in [one for pattern in _BESIDE for one in self.folder.glob(pattern)]:
            shutil.copyfile(file, Path(folder) / file.name)
        for place in filter(None, self.places):
            (Path(folder) / place).mkdir(exist_ok=True)
            if (self.folder / place / "config.json").is_file():  # Normalize may have none
                shutil.copyfile(self.folder / place / "config.json", Path(folder) / place / "config.json")


def cosines(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
    """Return how alike the two sentences of each pair are, ``(pairs,)``.

    Args:
        outputs: Of the encoder: ``last_hidden_state``, ``(2 * pairs, positions, width)``.
        batch: From `Sentences.collate`.
    """
    pooled = (outputs["last_hidden_state"].float() * batch["pooling"][..., None]).sum(1)
    first, second = pooled.chunk(2)
    return functional.cosine_similarity(first, second)


def similarity_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean squared difference of cosines and labels."""
    return _compared(model, batch)[0]


def _compared(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    found = cosines(model(**{key: value for key, value in batch.items() if key not in ("labels", "pooling")}), batch)
    return functional.mse_loss(found, batch["labels"]), found


class SimilarityTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of a plain encoder, whose loss and predictions are of cosines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, and the cosines where outputs are asked for."""
        loss, found = _compared(model, inputs)
        return (loss, {"logits": found}) if return_outputs else loss
