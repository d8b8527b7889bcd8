"""Relations between tokens: how alike their queries, their keys and their values are in one layer (MiniLM)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import PruningError
from .layers import Anatomy, Place, Vectors
from .losses import row_mean
from .settings import Distillation

_UNSEEN = -1e9  # the score of padding


def pair_relations(settings: Distillation, student: Anatomy, teacher: Anatomy) -> dict[Place, Place]:
    """Pair the student's last attention that has heads with the teacher's that it learns from, list by list.

    Raises:
        PruningError: The teacher has no such layer.
    """
    theirs, pairs = teacher.vectors(), dict[Place, Place]()
    alive = [place for place, (queries, *_) in student.vectors().items() if student.alive(queries.of)]
    for name in student.dense:
        mine = max((place for place in alive if place[0] == name), default=None)
        numbers = {place[1]: place for place in theirs if place[0] == name}
        if mine is None or not numbers:
            continue
        wanted = max(numbers) if settings.relation_layer is None else settings.relation_layer
        if wanted not in numbers:
            raise PruningError(
                f"Distillation.relation_layer must be a layer of the teacher's '{name}' that has an attention: "
                f"{', '.join(map(str, sorted(numbers)))}. Received: {wanted}"
            )
        pairs[mine] = numbers[wanted]
    return pairs


def relations_between(
    settings: Distillation,
    anatomies: Sequence[Anatomy],
    pair: tuple[Place, Place],
    heard: Sequence[Mapping[str, Tensor]],
    mask: Tensor | None,
) -> Tensor:
    """Return how far relations of the student's tokens are from the teacher's: the mean over queries, keys and values.

    Args:
        settings: How many relation heads there are, or which heads are compared.
        anatomies: The student's and the teacher's.
        pair: Their attentions.
        heard: What the projections of each handed out, by their paths.
        mask: ``(rows, positions)``, True where a token is not padding; ``None``: none is.

    Raises:
        PruningError: They cannot be split into as many relation heads, or the teacher lacks heads of the student.
    """
    losses = []
    for mine, its in zip(*(anatomy.vectors()[place] for anatomy, place in zip(anatomies, pair))):
        alive, heads = anatomies[0].alive(mine.of), anatomies[1].alive(its.of)
        if settings.relation_heads is None and settings.heads == "kept":
            heads = _same_heads(pair[0], [mine.of.heads[head] for head in alive], its)
        student, teacher = (
            log_relations(_split(vectors, numbers, one[vectors.module], settings.relation_heads), mask)
            for vectors, numbers, one in zip((mine, its), (alive, heads), heard)
        )
        if settings.relation_heads is None and settings.heads == "mean":
            student, teacher = _mean(student), _mean(teacher)
        losses.append(relation_loss(student, teacher, mask))
    return torch.stack(losses).mean()


def log_relations(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logarithm of softmax(X X^T / sqrt(width)) over tokens that are not padding.

    Args:
        vectors: X, ``(rows, heads, positions, width)``.
        mask: ``(rows, positions)``, True where a token is not padding; ``None``: none is.

    Returns:
        ``(rows, heads, positions, positions)``

    Example:
        >>> log_relations(torch.zeros(1, 1, 2, 3), None).exp()
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """
    with torch.autocast(vectors.device.type, enabled=False):  # exponents of sums: float32
        vectors = vectors.float()
        scores = vectors @ vectors.transpose(-1, -2) / vectors.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], _UNSEEN)
    logs: Tensor = scores.log_softmax(-1)
    return logs


def relation_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return KL(teacher || student) of `log_relations`: the mean over heads and a row's tokens, then over rows."""
    terms = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return row_mean(terms.mean(1), mask)


def check_relation_heads(heads: int | None, anatomy: Anatomy, place: Place, whose: str) -> None:
    """Check that what an attention has left can be split into relation heads.

    Raises:
        PruningError: It cannot.
    """
    if heads is None:
        return
    for vectors in anatomy.vectors()[place]:
        one = vectors.part.per_unit
        width = len(anatomy.alive(vectors.of)) * one
        if width % heads:
            raise PruningError(
                f"Distillation.relation_heads must divide the width of what {'.'.join(map(str, place))} of the {whose} "
                f"has left of queries, keys and values, {width}; while heads leave only what divides the width of one, "
                f"{one}, does so always: or compare heads themselves, with relation_heads=None. Received: {heads}"
            )


def _split(vectors: Vectors, heads: list[int], found: Tensor, relation_heads: int | None) -> Tensor:
    """Return what heads own of a projection's output as ``(rows, relation heads, positions, width)``."""
    index = vectors.part.index(torch.tensor(heads, dtype=torch.long), vectors.of.per_part)
    own, count = found[..., index.to(found.device)], relation_heads or len(heads)
    return own.view(*own.shape[:2], count, own.shape[2] // count).transpose(1, 2)


def _mean(logs: Tensor) -> Tensor:
    """Return the logarithm of the mean over heads."""
    return logs.logsumexp(1, keepdim=True) - math.log(logs.shape[1])


def _same_heads(place: Place, numbers: list[int], its: Vectors) -> list[int]:
    """Return the teacher's live numbers of heads with these dense numbers."""
    live = {number: head for head, number in enumerate(its.of.heads)}
    if missing := [number for number in numbers if number not in live]:
        raise PruningError(
            f"Distillation.heads='kept' needs a teacher with the student's heads of {'.'.join(map(str, place))}. "
            f"Received one without {missing}"
        )
    return [live[number] for number in numbers]
