"""The terms of distillation as pure functions, each the mean over its items: labels, or rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
