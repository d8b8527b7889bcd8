"""The terms of distillation as pure functions, each the mean over its items: labels, or rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = -1e4  # of a logarithm of a probability: 0 times minus infinity would be NaN


class Top(NamedTuple):
    """The most probable words of distributions.

    Args:
        logs: ``(..., k + 1)``: logarithms of their probabilities, and of what all other words have together.
        ids: ``(..., k)``: which words they are.
    """

    logs: Tensor
    ids: Tensor


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean over rows of the temperature-scaled Kullback-Leibler divergence, times T squared.

    Args:
        student: ``(rows, classes)``; with one class the mean squared difference is returned.
        teacher: Likewise.
        temperature: T.

    Example:
        >>> logits_loss(torch.zeros(3, 2), torch.zeros(3, 2), 2.0)
        tensor(0.)
    """
    if student.shape[-1] == 1:
        return functional.mse_loss(student.float(), teacher.float())
    return divergence(student, teacher, temperature).mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher_T || student_T) over the last axis, ``(..., classes)`` to ``(...)``."""
    soft, target = (logits.float().div(temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(soft, target, log_target=True, reduction="none").sum(-1)


def top_of(logits: Tensor, count: int, temperature: float) -> Top:
    """Return the `count` most probable words of ``softmax(logits / T)``, ``(..., words)``, with the rest's share.

    Example:
        >>> top_of(torch.tensor([3.0, 1.0, 4.0]).log(), 2, 1.0).logs.exp()
        tensor([0.5000, 0.3750, 0.1250])
    """
    every = logits.float().div(temperature).log_softmax(-1)
    logs, ids = every.topk(count)
    return Top(torch.cat([logs, _rest(every, ids)], -1), ids)


def top_divergence(student: Tensor, top: Top, temperature: float) -> Tensor:
    """Return T^2 KL(teacher_T || student_T) where all words that are not among the teacher's first count as one.

    At most the divergence over all words, and equal to it where the teacher's rest is empty.

    Args:
        student: ``(..., words)``.
        top: The teacher's, at the same temperature.
        temperature: T.

    Returns:
        ``(...)``
    """
    every, theirs = student.float().div(temperature).log_softmax(-1), top.logs
    ours = every.gather(-1, top.ids)
    if top.ids.shape[-1] < every.shape[-1]:
        ours = torch.cat([ours, _rest(every, top.ids)], -1)
    else:
        theirs = theirs[..., :-1]
    target = theirs.clamp(min=_LEAST).log_softmax(-1)  # what was rounded is a distribution again
    return temperature**2 * functional.kl_div(ours, target, log_target=True, reduction="none").sum(-1)


def _rest(logs: Tensor, ids: Tensor) -> Tensor:
    """Return the logarithm of what words but these have together, ``(..., 1)``."""
    return logs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)


def labels_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the same for labels that do not exclude one another: each is a distribution of its own.

    Args:
        student: ``(rows, labels)``.
        teacher: Likewise.
        temperature: T.
    """
    ours, theirs = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
    return divergence(ours, theirs, temperature).mean()


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the squared distance of unit vectors, in [0, 4]: the mean over a row's positions, then over rows.

    Args:
        student: ``(rows, positions, width)``.
        teacher: Likewise.
        mask: ``(rows, positions)``, True where a position is not padding; ``None``: all are.

    Example:
        >>> hidden_loss(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 0.1]]]), None)
        tensor(2.)
    """
    units = (functional.normalize(value.float(), dim=-1) for value in (student, teacher))
    return row_mean(torch.sub(*units).square().sum(-1), mask)


def layer_distances(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return `hidden_loss` between all layers of both, ``(layers of the teacher, layers of the student)``.

    Args:
        student: Of each layer ``(rows, positions, width)``.
        teacher: Likewise, of the same shape.
        mask: ``(rows, positions)``, True where a position is not padding; ``None``: all are.
    """
    weights = torch.ones(student[0].shape[:2], device=student[0].device) if mask is None else mask.float()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1) / len(weights)
    scale = weights.sqrt()[..., None]
    ours, theirs = (
        torch.stack([functional.normalize(one.float(), dim=-1) * scale for one in layers]).flatten(1)
        for layers in (student, teacher)
    )
    return 2 - 2 * theirs @ ours.T


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return KL(teacher || student) over keys: the mean over heads and a row's queries, then over rows.

    Where the student has 0 (its dropout drew it, or the mask forbids the key) the teacher's share does not count.

    Args:
        student: ``(rows, heads, queries, keys)``, at least 0.
        teacher: Likewise.
        mask: ``(rows, queries)``, True where a query is not padding; ``None``: none is.

    Example:
        >>> half, one = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(attention_loss(one.view(1, 1, 1, 2), half.view(1, 1, 1, 2), None).item(), 4)
        0.1438
    """
    student, teacher = student.float(), teacher.float()
    seen = student > 0
    target = _normalized(teacher * seen)
    ratio = target.log() - _normalized(student).log()
    terms = torch.where(seen & (target > 0), target * ratio, 0.0)
    return row_mean(terms.sum(-1).mean(1), mask)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over rows of 1 - cosine, ``(rows, width)`` each."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def row_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over rows of each row's mean over its positions that count, ``(rows, positions)``.

    Rows weigh the same however long they are: so batches that are cut up otherwise give the same gradient.
    """
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return ((values * weights).sum(1) / weights.sum(1).clamp(min=1)).mean()


def pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return each row's mean over its positions that count, ``(rows, positions, width)`` to ``(rows, width)``."""
    hidden = hidden.float()  # a sum of long texts is too large for float16
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _normalized(value: Tensor) -> Tensor:
    # both branches of `where` get gradients: what is 0 becomes the smallest number first, or its logarithm gives NaN
    tiny = torch.finfo(value.dtype).tiny
    return (value / value.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=tiny)
