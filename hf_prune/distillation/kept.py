"""What of a teacher's answers is kept, row by row: a classifier's logits, or the most probable words of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from .losses import Top, top_of
from .matching import count_words
from .outputs import TOP
from .settings import Distillation

Record = Mapping[str, Tensor]  # of one row, by name: (items, width)


@dataclass(frozen=True)
class Whole:
    """All of the logits: one row of them for each row that is read."""

    names = ("logits",)

    def keep(self, found: Mapping[str, Any], inputs: Mapping[str, Any], rows: int) -> list[Record]:
        """Return what is kept of outputs, row by row.

        Raises:
            PruningError: They are not one row of logits for each row.
        """
        logits = found.get("logits")
        if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != rows:
            raise PruningError(
                "Distillation.cache is for teachers with one row of logits for each row that they read, as classifiers "
                "have, and with top_k, such as top_k=50, for language models; else leave it out. "
                f"Received: {_shown(found)} for {rows} rows"
            )
        return [{"logits": row} for row in torch.split(logits.detach().float().cpu().clone(), 1)]

    def hand_out(self, records: Sequence[Record], inputs: Mapping[str, Any], device: Any) -> Mapping[str, Any]:
        """Return what was kept as outputs."""
        return {"logits": torch.cat([one["logits"] for one in records]).to(device)}


@dataclass(frozen=True)
class Tops:
    """The most probable words of each token that is not padding, as logarithms of probabilities, and the rest's share.

    Args:
        count: How many words, at least 1.
        words: How many first words are compared; the probabilities are among these.
        temperature: T.
        dtype: Of the logarithms.
    """

    count: int
    words: int
    temperature: float
    dtype: str = "float16"

    names = ("logs", "ids")

    def keep(self, found: Mapping[str, Any], inputs: Mapping[str, Any], rows: int) -> list[Record]:
        """Return what is kept of outputs, row by row: ``(tokens, count + 1)`` logarithms, ``(tokens, count)`` words.

        Raises:
            PruningError: They are not logits for each token.
        """
        logits, mask = found.get("logits"), answered(inputs)
        if not torch.is_tensor(logits) or logits.ndim != 3 or logits.shape[:2] != mask.shape:
            raise PruningError(
                "Distillation.top_k is for language models, with logits for each token that they read or write. "
                f"Received: {_shown(found)} for {tuple(mask.shape)} tokens"
            )
        top = top_of(logits.detach()[mask][:, : self.words], self.count, self.temperature)
        counts = mask.sum(1).tolist()
        logs = torch.split(top.logs.to(getattr(torch, self.dtype)).cpu(), counts)
        return [{"logs": one, "ids": ids} for one, ids in zip(logs, torch.split(top.ids.int().cpu(), counts))]

    def hand_out(self, records: Sequence[Record], inputs: Mapping[str, Any], device: Any) -> Mapping[str, Any]:
        """Return what was kept as outputs: a `Top`, in which padding is unknown."""
        mask, found = answered(inputs), list[Tensor]()
        for name, unknown in (("logs", -torch.inf), ("ids", 0)):
            kept = torch.cat([one[name] for one in records]).to(device)
            found.append(kept.new_full((*mask.shape, kept.shape[-1]), unknown))
            found[-1][mask.to(device)] = kept
        return {TOP: Top(found[0].float(), found[1].long())}


Form = Whole | Tops


def form_of(settings: Distillation, student: Any, teacher: Any) -> Form:
    """Return what is to be kept of a teacher's answers.

    Raises:
        PruningError: `top_k` is for other models, or more than they have words.
    """
    if settings.top_k is None:
        return Whole()
    counts = [count_words(model) for model in (student, teacher)]
    words = min(0 if one is None else one for one in counts)
    if not words:
        raise PruningError(
            "Distillation.top_k is for language models: leave it out for others. "
            f"Received: {settings.top_k} for {type(student).__name__}, {type(teacher).__name__}"
        )
    if settings.top_k > words:
        raise PruningError(
            f"Distillation.top_k must be at most {words}, as many words as both have. Received: {settings.top_k}"
        )
    return Tops(settings.top_k, words, settings.temperature, settings.cache_dtype)


def answered(inputs: Mapping[str, Any]) -> Tensor:
    """Return for which positions of a batch a language model's answers count, ``(rows, positions)``: no padding.

    Raises:
        PruningError: Rows are packed, or there are no words to be read.
    """
    mask = decoded(inputs)
    if mask is None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not torch.is_tensor(ids):
            raise PruningError(f"Distillation.top_k needs input_ids. Received: {', '.join(inputs)}")
        mask = mask.bool() if torch.is_tensor(mask) and mask.shape == ids.shape else torch.ones_like(ids).bool()
    _check_unpacked(inputs, mask)
    return mask


def decoded(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which positions a decoder behind an encoder writes, ``(rows, positions)``; ``None``: there is none."""
    mask, labels, ids = (inputs.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if torch.is_tensor(mask) and mask.ndim == 2:
        return mask.bool()
    if torch.is_tensor(labels) and labels.ndim == 2:  # up to the last that counts
        return labels.ne(-100).flip(1).cumsum(1).flip(1) > 0
    return torch.ones_like(ids).bool() if torch.is_tensor(ids) else None


def _check_unpacked(inputs: Mapping[str, Any], mask: Tensor) -> None:
    places = inputs.get("position_ids")
    steps = places.diff(dim=1) if torch.is_tensor(places) and places.shape == mask.shape else None
    packed = any(name.startswith("cu_seq_lens") for name in inputs)
    if packed or (steps is not None and (steps[mask[:, 1:] & mask[:, :-1]] != 1).any()):
        raise PruningError(
            "Distillation.cache keeps texts by what they hold: it is not for packed ones, whose neighbours change "
            "(packing, padding_free). Received: position_ids that begin anew inside a row"
        )


def _shown(found: Mapping[str, Any]) -> str:
    logits = found.get("logits")
    return str(tuple(logits.shape)) if torch.is_tensor(logits) else ", ".join(found)
