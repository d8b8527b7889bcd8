"""A Trainer that also learns from a teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import PruningError
from ..given import check_given
from ..resume import check_resumable, join_checkpoints, leave_checkpoints, resume_from_whole_ones, resumed_folder
from ..sharding import average_over_processes
from .behind import check_trainer, having
from .hearing import loss_of
from .kept import form_of
from .lesson import PROJECTIONS, TERMS, Lesson
from .memory import Memory
from .outputs import count
from .settings import Distillation
from .teacher import load_teacher


class _Step(NamedTuple):
    """What one optimizer step has of items and rows, over all processes, and the count that the Trainer made."""

    items: Any
    rows: Any
    trainers: Any


class _Share(NamedTuple):
    """Which part of an optimizer step a batch is, and the count that makes the Trainer's loss a mean over it."""

    items: Tensor
    rows: Tensor
    hard: Tensor  # of the Trainer's own loss: all of it, where that has scaled itself
    number: Any = None


class DistillationMixin:
    """Put before any Trainer class: what a teacher says is added to that Trainer's own loss.

    The Trainer computes its loss as ever (its own `compute_loss`, `compute_loss_func`, label smoothing, TRL's
    objectives), multiplied by `Distillation.hard`; the teacher reads what the student read meanwhile.

    The gradient is the same for one batch of 16, for four accumulated batches of 4 and for two processes with 8 each:
    each term is a mean over items (the labels that count, or rows), weighted by the share of the items that a batch
    holds.

    In evaluation the loss is the Trainer's own, and the teacher is not called.

    Args:
        teacher: A model, a folder, a name on the Hub, or ``"self"``: the weights at construction; with `model_init`,
            those that each training begins with.
        distillation: The weights of the terms; ``None`` takes `Distillation()`.

    Raises:
        PruningError: Student and teacher cannot be compared, or the Trainer's loss is none that a teacher can be added
            to.

    Example:
        >>> class MyTrainer(DistillationMixin, Seq2SeqTrainer): ...  # doctest: +SKIP
    """

    lesson: Lesson | None = None
    teacher: Any = None

    def __init__(self, *args: Any, teacher: Any, distillation: Distillation | None = None, **kwargs: Any) -> None:
        check_trainer(type(self))
        kinds = (Distillation, type(None))
        check_given("distillation", distillation, kinds, "a Distillation, such as Distillation(logits=0.5)")
        check_given("teacher", teacher, (str, Path, nn.Module), "a model, a folder, a name on the Hub, or 'self'")
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.distillation = distillation or Distillation()
        self._source = teacher
        self._step: _Step | None = None  # while an optimizer step is trained
        self._own: dict[str, Any] = {}  # how the Trainer scales its loss, while a batch is trained
        self._asked = False
        self._teach(trainer.accelerator.unwrap_model(trainer.model))
        trainer.add_callback(_Keeper(self))

    # which student, which teacher
    def _teach(self, student: Any) -> None:
        """Begin a lesson for a student."""
        arguments, settings = self.args, self.distillation  # type: ignore[attr-defined]
        if self.lesson is not None:
            self.lesson.restore()
        again = self.teacher is not None and not (isinstance(self._source, str) and self._source == "self")
        source = self.teacher if again else self._source
        self.teacher = load_teacher(source, student, settings.teacher_dtype, maps=settings.uses("attention"))
        self.teacher.to(arguments.device)
        self.lesson = Lesson(student, self.teacher, settings, arguments.seed, self._memory(student))
        self.lesson.projections.to(arguments.device)
        self._terms: dict[str, list[Tensor]] = {}

    def _memory(self, student: Any) -> Memory | None:
        """Return what this teacher has answered before, where it is kept."""
        arguments, folder = self.args, self.distillation.cache  # type: ignore[attr-defined]
        if folder is None:
            return None
        precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else ""
        form = form_of(self.distillation, student, self.teacher)
        return Memory(folder, self.teacher, precision, arguments.process_index, form)

    def _know_teacher(self) -> None:
        """Let go of what was remembered of a teacher that has changed since: it may have been trained meanwhile."""
        if self.lesson is not None and self.lesson.memory is not None:
            fresh = self._memory(self.lesson.student)
            if fresh is not None and fresh.name != self.lesson.memory.name:
                self.lesson.memory = fresh

    def _follow(self) -> Lesson:
        """Return the lesson of the model that trains now: users, searches and `model_init` put others in its place."""
        student = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if self.lesson is None or self.lesson.student is not student:
            self._teach(student)
        assert self.lesson is not None
        return self.lesson

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """Make the model of a trial, and begin its lesson: ``"self"`` is what it begins with."""
        model = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        if self.lesson is not None:
            self._teach(model)
        return model

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a checkpoint that is resumed brings the matrices between different widths along."""
        self._terms = {}
        if getattr(self, "model_init", None) is None:
            self._follow()
        self._know_teacher()
        learned = self.lesson is not None and len(self.lesson.projections) > 0
        resume_from_whole_ones(self.args, *([PROJECTIONS] if learned else []))  # type: ignore[attr-defined]
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    # matrices between different widths
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the optimizer learn the matrices between different widths too; they are not part of the model."""
        optimizer, arguments, lesson = super().create_optimizer(*args, **kwargs), self.args, self._follow()  # type: ignore
        known = {id(one) for group in optimizer.param_groups for one in group["params"]}
        new = [one for one in lesson.projections.parameters() if id(one) not in known]
        if new and lesson.seed != arguments.seed:  # a trial's seed is set after its model
            lesson.draw(arguments.seed)
            new = list(lesson.projections.to(arguments.device).parameters())
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": 0.0})
        return optimizer

    # the loss
    @property
    def _teaches(self) -> bool:
        """Whether there is anything to add; else all is as without a teacher, upstream's faults too."""
        return any(self.distillation.uses(term) for term in TERMS)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count the items and rows of one optimizer step: transformers 4 counts unshifted labels."""
        batches, number = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if not batches or not self._teaches:
            return batches, number
        arguments, student = self.args, self._follow().student  # type: ignore[attr-defined]
        counts = torch.stack([torch.stack(count(student, batch)).cpu() for batch in batches]).sum(0)
        if arguments.average_tokens_across_devices and arguments.world_size > 1:
            counts = self.accelerator.gather(counts.to(arguments.device)).view(-1, 2).sum(0)  # type: ignore[attr-defined]
        items, rows = counts.to(arguments.device)
        self._step = _Step(items, rows, number)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a batch, whose terms we normalise by the step's items ourselves: Trainer must not again."""
        if not self._teaches:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        names = ("model_accepts_loss_kwargs", "loss_is_scaled_for_ga")
        self._own, self._asked = {name: getattr(self, name, None) for name in names}, False
        try:
            with having(self, **dict.fromkeys(names, True)):
                loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._own = {}
        if not self._asked:
            raise PruningError(
                f"{type(self).__name__} must train by the compute_loss of DistillationMixin: put the mixin before the "
                "class that has a compute_loss or training_step of its own. Received one that does not call it"
            )
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            for one in self._follow().projections.parameters():  # DDP does not know of them
                one.grad = None if one.grad is None else average_over_processes(one.grad)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the Trainer's own loss mixed with the teacher's terms, and the outputs where they are asked for."""
        self._asked = True
        told = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}  # by name, as Trainer does
        if not model.training:
            return super().compute_loss(model, inputs, **told)  # type: ignore[misc]
        lesson, weights, batch = self._follow(), self._weights(), copy.copy(inputs)
        if not self._teaches:
            result = super().compute_loss(model, inputs, **told)  # type: ignore[misc]
            loss = result[0] if return_outputs else result
            self._note({"hard": loss})
            return (weights["hard"] * loss, result[1]) if return_outputs else weights["hard"] * loss
        share = self._share_of(batch, num_items_in_batch)
        with lesson.hear(model, weights) as heard:
            hard, outputs = self._own_loss(model, inputs, return_outputs, share.number)
        if heard.wanted and not heard.forwards:
            raise PruningError(
                "Distillation needs a loss that calls the model that it is given, with gradients, before it returns. "
                f"Received a compute_loss of {type(self).__name__} that does not: take another loss"
            )
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        terms = lesson.learn(heard, batch, self._label_names(), accelerator.autocast)
        terms = terms if hard is None else {"hard": hard, **terms}
        loss = self._mix(terms, weights, share, batch)
        self._note(terms)
        return (loss, outputs) if return_outputs else loss

    def _weights(self) -> dict[str, float]:
        state: Any = self.state  # type: ignore[attr-defined]
        progress = state.global_step / max(1, state.max_steps)
        return {name: self.distillation.weight(name, progress) for name in ("hard", *TERMS)}

    def _label_names(self) -> list[str]:
        return list(getattr(self, "label_names", None) or [])

    @property
    def _scales_itself(self) -> bool:
        """Whether the Trainer says that its loss is normalised over the optimizer step already."""
        return self._own.get("loss_is_scaled_for_ga") is True

    def _share_of(self, batch: Mapping[str, Any], number: Any) -> _Share:
        """Return which share of the optimizer step a batch is; all of it, where nothing is said of a step."""
        whole = torch.ones(())
        if number is None:
            return _Share(whole, whole, whole)
        arguments: Any = self.args  # type: ignore[attr-defined]
        step = self._step if self._own and self._step is not None else _Step(number, None, number)
        here, totals = (
            count(self._follow().student, batch),
            (step.items, step.items if step.rows is None else step.rows),
        )
        items, rows = (
            one.to(arguments.device) / torch.as_tensor(total).to(arguments.device).clamp(min=1)
            for one, total in zip(here, totals)
        )
        rows = items if step.rows is None else rows
        processes = self.accelerator.num_processes if arguments.average_tokens_across_devices else 1  # type: ignore[attr-defined]
        if self._scales_itself:
            return _Share(processes * items, processes * rows, whole, step.trainers)
        known = step.trainers is not None and arguments.n_gpu <= 1
        own = torch.as_tensor(step.trainers).to(arguments.device) * items if known else None
        return _Share(processes * items, processes * rows, processes * items, own)

    def _own_loss(self, model: Any, inputs: Any, return_outputs: bool, number: Any) -> tuple[Tensor | None, Any]:
        """Return the Trainer's loss as a mean over the batch, and the outputs; no loss where it has no labels for one.

        The batch's own count in place of the step's makes a mean of what is divided by it, and of what is not.
        """
        plain = super().compute_loss  # type: ignore[misc]
        names = {*self._label_names(), "labels", "return_loss"}
        if plain.__func__ is Trainer.compute_loss and not any(inputs.get(name) is not None for name in names):
            outputs = model(**inputs)
            loss = loss_of(outputs)
        else:
            arguments: Any = self.args  # type: ignore[attr-defined]
            across = arguments.average_tokens_across_devices and self._scales_itself
            with having(self, **self._own), having(arguments, average_tokens_across_devices=across):
                result = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=number)
            loss, outputs = result if return_outputs else (result, None)
        return None if loss is None else loss.mean(), outputs

    def _mix(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float], share: _Share, batch: Mapping[str, Any]
    ) -> Tensor:
        """Return the weighted sum of terms, each by the share of a step's items that this batch holds."""
        if not terms:
            raise PruningError(f"Distillation has nothing to learn from this batch. Received keys: {sorted(batch)}")
        shares, parts = {"hard": share.hard, "logits": share.items}, []
        for name, value in terms.items():
            part = weights[name] * shares.get(name, share.rows).to(value.device)
            parts.append(torch.where(part > 0, part * value.float(), 0.0))  # the mean of nothing is NaN
        return torch.stack(parts).sum()

    # what is written down
    def _note(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self._terms.setdefault(f"distillation_{name}", []).append(value.detach().float())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each term since the last log, over all processes."""
        if "loss" in logs:
            means = {
                name: average_over_processes(torch.stack(values).nanmean()) for name, values in self._terms.items()
            }
            logs.update({name: round(value.item(), 4) for name, value in means.items()})
            self._terms = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with a teacher: see `DistillationMixin`."""


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """Keeps what is not of the model: matrices between different widths, and which attention the models came with."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the matrices of the checkpoint that is resumed, and add them to those that are written."""
        if state.global_step > 0:
            folder = resumed_folder(args, state.global_step)
            check_resumable(folder)
            self.trainer.lesson.load(folder)
        join_checkpoints(state, PROJECTIONS, lambda folder: self.trainer.lesson.save(folder))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what is found again in this epoch."""
        if (memory := self.trainer.lesson.memory) is not None:
            memory.begin_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share what the teacher was asked with all processes."""
        if (memory := self.trainer.lesson.memory) is None:
            return
        memory.write()
        memory.check_found()
        self.trainer.accelerator.wait_for_everyone()
        memory.read()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was asked before a checkpoint is written: a resumed run finds it as this one would."""
        if control.should_save and (memory := self.trainer.lesson.memory) is not None:
            memory.write()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget their gradients: Trainer forgets only the model's."""
        self.trainer.lesson.projections.zero_grad()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the models back what they came with, and keep what the teacher was asked."""
        if self.trainer.lesson.memory is not None:
            self.trainer.lesson.memory.write()
        leave_checkpoints(state, PROJECTIONS)
        self.trainer.lesson.restore()
