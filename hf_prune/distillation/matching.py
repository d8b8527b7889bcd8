"""Which outputs of student and teacher mean the same: words of a padded vocabulary, labels in another order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..adapters import bare
from ..errors import PruningError

COMMON = 0.95  # of the larger vocabulary: what padding adds is less, what shares less is another tokenizer's
_UNNAMED = re.compile(r"label_\d+")


@dataclass(frozen=True)
class Columns:
    """What of the last axis is compared.

    Args:
        sizes: How many words the student and the teacher have, where these are not as many.
        order: Which of the teacher's labels each of the student's is; ``None``: the same place.
    """

    sizes: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None

    @property
    def words(self) -> int | None:
        """How many first words both vocabularies have; ``None``: they are as large."""
        return None if self.sizes is None else min(self.sizes)

    def common(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what can be compared of logits, ``(..., classes)`` each."""
        if self.order is not None:
            theirs = theirs[..., list(self.order)]
        if self.words is not None:
            ours, theirs = ours[..., : self.words], theirs[..., : self.words]
        return ours, theirs


def match_outputs(student: Any, teacher: Any) -> Columns:
    """Say which outputs of two models mean the same.

    Raises:
        PruningError: They have different numbers of labels, other labels, or vocabularies of different tokenizers.
    """
    ours, theirs = count_words(student), count_words(teacher)
    if ours is not None and theirs is not None:
        if min(ours, theirs) < COMMON * max(ours, theirs):
            raise PruningError(
                "The teacher must read the student's tokens: a vocabulary may be padded, so that the two have at least "
                f"{COMMON:.0%} of the larger one in common. Received: {theirs} words for the student's {ours}"
            )
        return Columns(sizes=None if ours == theirs else (ours, theirs))
    counts = ours or _labels(student), theirs or _labels(teacher)
    if counts[0] != counts[1]:
        raise PruningError(f"The teacher's outputs must be as many as the student's {counts[0]}. Received: {counts[1]}")
    return Columns(order=_order(label_names(student), label_names(teacher)))


def label_names(model: Any) -> list[str] | None:
    """Return the names of a model's labels in lower case; ``None``: nobody named them, or it has no labels."""
    inside = transformers_model(model)
    config: Any = getattr(inside, "config", None)
    count = _labels(model)
    if not count or count < 2 or inside.base_model is inside or "QuestionAnswering" in type(inside).__name__:
        return None
    for table in ({number: name for name, number in config.label2id.items()}, config.id2label):
        names = [str(table.get(number, "")).casefold() for number in range(count)]
        if len(set(names)) == count and "" not in names and not all(_UNNAMED.fullmatch(name) for name in names):
            return names
    return None


def transformers_model(model: Any) -> Any:
    """Return the model of transformers inside one of PEFT or sentence-transformers."""
    inside = getattr(model, "transformers_model", None)
    return bare(model if inside is None else inside)


def _order(ours: list[str] | None, theirs: list[str] | None) -> tuple[int, ...] | None:
    if ours is None or theirs is None or ours == theirs:
        return None
    if set(ours) != set(theirs):
        raise PruningError(
            f"The teacher's labels must be called as the student's {ours}; where they mean the same, set label2id and "
            f"id2label in its config. Received: {theirs}"
        )
    return tuple(theirs.index(name) for name in ours)


def count_words(model: Any) -> int | None:
    """Return how many words a language model writes; ``None``: it is none."""
    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if words is None else len(words.weight)


def _labels(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "num_labels", None)
