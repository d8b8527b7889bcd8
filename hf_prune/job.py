"""One run's models, rows and settings together, and how they are trained and evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import nested_concat

from .exporting import Exported, feed
from .metrics import Problem, compute_metrics_for, losses_of
from .recipe import Recipe, TrainSettings
from .recipe_tasks import RECIPE_TASKS, RecipeTask
from .report import Report

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
_EVALUATIONS = 30  # while a guard watches


@dataclass
class Job:
    """What the stages share, and leave for those behind them."""

    recipe: Recipe
    model: Any  # the dense one
    processor: Any  # a tokenizer; None for images that come as arrays
    train: Any
    evaluation: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    pruned: Any = field(init=False, repr=False)
    report: Report = field(init=False, repr=False)
    onnx: tuple[Path, Path] | None = None  # folders, dense and pruned
    start: Path | None = None  # a model between dense and target to begin from; None: the dense one
    exported: list[Exported] = field(default_factory=list)  # files of the pruned model

    @property
    def task(self) -> RecipeTask:
        """What the recipe's task means."""
        return RECIPE_TASKS[self.recipe.task]

    @property
    def problem(self) -> Problem:
        """What its metrics are computed for."""
        return self.task.problem(self.model)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return self.recipe.output


def evaluate(job: Job, model: Any) -> dict[str, float]:
    """Return the recipe's metrics, and the loss, of a model on the rows to evaluate on."""
    found = {
        key.removeprefix("eval_"): value for key, value in trainer_of(job, model, job.recipe.train).evaluate().items()
    }
    return {key: float(value) for key, value in found.items() if key not in TIMINGS}


def batches_of(job: Job, data: Any, rows: Sequence[int], size: int) -> list[dict[str, Any]]:
    """Return rows of the data in batches, as the models read them."""
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [job.collator([data[row] for row in chunk]) for chunk in chunks]


def evaluate_graph(job: Job, graph: Any) -> dict[str, float]:
    """Return the recipe's metrics of an exported file."""
    task, reduce = job.task, losses_of(job.problem)
    gathered: Any = None
    for batch in batches_of(job, job.evaluation, range(len(job.evaluation)), 64):
        found = graph.run(feed(batch, graph.inputs))
        outputs, labels = [found[name] for name in task.outputs], [batch[name] for name in task.answers]
        outputs = outputs if task.predict is None else [task.predict(found, batch)]
        both = outputs if reduce is None else [reduce(outputs[0], labels[0])], labels
        gathered = both if gathered is None else nested_concat(gathered, both)
    sides = [tuple(one.numpy() for one in side) for side in gathered]
    predictions, references = (side if len(side) > 1 else side[0] for side in sides)
    return metrics_of(job, job.model)(EvalPrediction(predictions, references))


def metrics_of(job: Job, model: Any) -> Callable[[Any], dict[str, float]]:
    """Return what computes the recipe's metrics for a model."""
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    texts = job.task.texts(job.processor) if job.task.texts is not None else None
    return compute_metrics_for(job.recipe.metrics, job.problem, names, texts)


def trainer_of(job: Job, model: Any, settings: TrainSettings, teacher: Any = None, watch: bool = False) -> Any:
    """Return a Trainer for these settings; with a teacher, and distillation in the recipe, one that distils.

    A guard that watches sees an evaluation before the first step, and then behind every thirtieth of all.
    """
    recipe = job.recipe
    further: dict[str, Any] = {"eval_on_start": True} if watch else {}
    if settings.group_by_length:  # renamed in transformers 5
        modern = hasattr(TrainingArguments, "train_sampling_strategy")
        further |= {"train_sampling_strategy": "group_by_length"} if modern else {"group_by_length": True}
    steps, evaluations = steps_of(job, settings), max(settings.evaluations, _EVALUATIONS if watch else 0)
    if evaluations:
        further |= {"eval_strategy": "steps", "eval_steps": max(1, steps // evaluations)}
    writes = issubclass(job.task.trainer, Seq2SeqTrainer)
    further |= {"predict_with_generate": True, "generation_max_length": recipe.data.max_length} if writes else {}
    arguments = (Seq2SeqTrainingArguments if writes else TrainingArguments)(
        output_dir=str(job.output / "checkpoints"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size if job.task.hears else 64,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=recipe.report_to,
        seed=recipe.seed,
        remove_unused_columns=job.train.format["type"] != "custom",  # images are read from a column of another name
        label_names=[*job.task.answers],
        **further,
    )
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": job.train,
        "eval_dataset": job.evaluation,
        "data_collator": job.collator,
        "compute_metrics": metrics_of(job, model),
        "preprocess_logits_for_metrics": losses_of(job.problem),
        "callbacks": [NoDropout()] if settings.disable_dropout else None,
    }
    if teacher is None or recipe.distillation is None:
        return job.task.trainer(**common)
    from .distillation import DistillationMixin, DistillationTrainer

    own: Any = job.task.trainer
    made = DistillationTrainer if own is Trainer else type(f"Distillation{own.__name__}", (DistillationMixin, own), {})
    return made(teacher=teacher, distillation=recipe.distillation, **common)


class NoDropout(TrainerCallback):  # type: ignore[misc]
    """Let a model train without its dropout; behind training it has its own again.

    Modules have it as ``p`` of a `torch.nn.Dropout`, or as a number of their own (``attention_dropout``).
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Turn it off."""
        self._held: list[tuple[nn.Module, str, float]] = []
        for module in model.modules():
            is_dropout = "dropout" in type(module).__name__.lower()
            for name, value in vars(module).items():
                if type(value) is float and ("drop" in name or (is_dropout and name == "p")):
                    self._held.append((module, name, value))
        for module, name, _ in self._held:
            setattr(module, name, 0.0)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Turn it on again."""
        for module, name, value in self._held:
            setattr(module, name, value)


def steps_of(job: Job, settings: TrainSettings) -> int:
    """Return the optimizer steps of one training."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return max(1, math.ceil(math.ceil(len(job.train) / (settings.batch_size * processes)) * settings.epochs))
