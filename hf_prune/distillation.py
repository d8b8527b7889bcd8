"""Distillation: a Trainer that also learns from a teacher's outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from .errors import PruningError
from .settings import settings


@settings(frozen=True)
class Distillation:
    """How much to learn from labels, and how much from the teacher (Hinton et al. 2015, arXiv:1503.02531).

    The loss is ``hard * L(labels) + logits * T^2 * KL(teacher_T || student_T)``.

    Args:
        temperature: T, softens both distributions; above 0.
        hard: Weight of the model's own loss on the labels, at least 0.
        logits: Weight of the Kullback-Leibler term, at least 0. For models with one output (regression) it is the
            squared difference.

    Example:
        >>> Distillation(temperature=4.0).logits
        0.5
    """

    temperature: float = Field(default=2.0, gt=0)
    hard: float = Field(default=0.5, ge=0)
    logits: float = Field(default=0.5, ge=0)


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
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return functional.mse_loss(student, teacher)
    soft, target = (logits.div(temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(soft, target, log_target=True, reduction="batchmean")


def loss_rows(model: Any, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logits that the loss on labels reads, ``(rows, classes)``: shifted for causal LM, without -100."""
    if labels is None or logits.ndim != 3 or labels.ndim != 2:
        return logits.flatten(0, -2)
    if shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


def count_items(model: Any, labels: Tensor) -> Tensor:
    """Count what the mean loss averages over: rows, or shifted labels that are not -100."""
    if labels.ndim == 2 and shifts_labels(model):
        labels = labels[:, 1:]
    return labels.ne(-100).sum() if not labels.is_floating_point() else torch.tensor(len(labels), device=labels.device)


def shifts_labels(model: Any) -> bool:
    """Whether the model's own loss compares position i with label i + 1, as causal language models do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def load_teacher(teacher: Any, student: Any) -> Any:
    """Return a frozen teacher in evaluation mode: the student's weights as they are, a folder, a Hub name or a model.

    Raises:
        PruningError: Its outputs have another width than the student's.
    """
    if isinstance(teacher, (str, Path)) and teacher != "self":
        teacher = type(student).from_pretrained(teacher)
    elif isinstance(teacher, str):
        teacher = copy.deepcopy(student)
    theirs, ours = (_outputs(model) for model in (teacher, student))
    if theirs != ours:
        raise PruningError(f"The teacher's outputs must be as many as the student's {ours}. Received: {theirs}")
    return teacher.eval().requires_grad_(False)


def _outputs(model: Any) -> int | None:
    """Return how many outputs a model has: words of a language model, else labels."""
    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(model.config, "num_labels", None) if words is None else len(words.weight)


class DistillationMixin:
    """Put before any Trainer class: its loss then mixes the labels' with the teacher's.

    The gradient is the same for one batch of 16 and for four accumulated batches of 4: both terms are means over the
    same items, weighted by the share of items that a batch holds.

    Args:
        teacher: A model, a folder, a name on the Hub, or ``"self"``: the weights at construction.
        distillation: The weights of the terms; ``None`` takes `Distillation()`.

    Example:
        >>> class MyTrainer(DistillationMixin, Seq2SeqTrainer): ...  # doctest: +SKIP
    """

    def __init__(self, *args: Any, teacher: Any, distillation: Distillation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation or Distillation()
        self.teacher = load_teacher(teacher, self.model).to(self.args.device)  # type: ignore[attr-defined]
        self.model_accepts_loss_kwargs = True  # we normalise by num_items_in_batch ourselves: Trainer must not again
        self._terms: dict[str, list[Tensor]] = {}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count the items of one optimizer step as `count_items` does: transformers 4 counts unshifted labels."""
        batches, trainers_count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if trainers_count is None or not all(isinstance(batch.get("labels"), Tensor) for batch in batches):
            return batches, trainers_count
        counts = [count_items(self.model, batch["labels"]) for batch in batches]  # type: ignore[attr-defined]
        count = torch.stack(counts).sum().to(self.args.device)  # type: ignore[attr-defined]
        if self.args.average_tokens_across_devices and self.args.world_size > 1:  # type: ignore[attr-defined]
            count = self.accelerator.gather(count).sum()  # type: ignore[attr-defined]
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mixed loss, and the outputs where they are asked for."""
        outputs = model(**inputs)
        labels, settings = inputs.get("labels"), self.distillation
        if not model.training or outputs.get("loss") is None:
            loss = outputs.get("loss")
            return (loss, outputs) if return_outputs else loss
        with torch.no_grad():
            teacher = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        student: Any = self.model  # type: ignore[attr-defined]
        rows = [loss_rows(student, logits, labels) for logits in (outputs["logits"], teacher)]
        soft = logits_loss(rows[0], rows[1], settings.temperature)
        loss = settings.hard * outputs["loss"] + settings.logits * soft
        self._note(distillation_hard=outputs["loss"], distillation_logits=soft)
        if num_items_in_batch is not None and labels is not None:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1  # type: ignore[attr-defined]
            loss = loss * processes * count_items(student, labels) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each term since the last log."""
        if "loss" in logs:
            logs.update({name: round(torch.stack(values).mean().item(), 4) for name, values in self._terms.items()})
            self._terms = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _note(self, **terms: Tensor) -> None:
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.detach())


def __getattr__(name: str) -> Any:
    """Build `DistillationTrainer` when it is first asked for: importing Trainer takes seconds."""
    if name != "DistillationTrainer":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from transformers import Trainer

    class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
        """`transformers.Trainer` with a teacher: see `DistillationMixin`."""

    DistillationTrainer.__module__ = __name__
    globals()[name] = DistillationTrainer
    return DistillationTrainer
