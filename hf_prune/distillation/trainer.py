"""A Trainer that also learns from a teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..calibration import average_over_processes
from ..errors import PruningError
from .layers import Anatomy, Attention, Key, Place, listen, pair_layers, take_hidden, take_map, use_eager_attention
from .losses import attention_loss, hidden_loss
from .outputs import count_items, count_rows, output_loss, positions, shifts_labels
from .settings import Distillation
from .teacher import load_teacher, teacher_inputs

logger = logging.getLogger(__name__)
PROJECTIONS = "distillation.safetensors"


class Lesson:
    """What a student learns from a teacher on one batch, term by term.

    Args:
        student: The model that learns, not wrapped.
        teacher: The teacher, in evaluation mode.
        settings: Which terms, and how they are computed.
        seed: For the matrices between hidden states of different widths.

    Raises:
        PruningError: The two have no layers that could be compared.
    """

    def __init__(self, student: Any, teacher: Any, settings: Distillation, seed: int = 0) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.projections = nn.ModuleDict()
        self.implementations: dict[int, tuple[Any, str]] = {}
        if settings.uses("hidden") or settings.uses("attention"):
            self.anatomies = Anatomy(student), Anatomy(teacher)
            if not pair_layers(settings.layer_map, *self.anatomies):
                raise PruningError(
                    "Distillation of hidden states or attention needs layers in a list. "
                    f"Received: {type(student).__name__}"
                )
            if settings.uses("attention") and not self._pair_attentions(
                pair_layers(settings.layer_map, *self.anatomies)
            ):
                raise PruningError(
                    "Distillation.attention needs attentions whose heads hf_prune finds in both models. "
                    f"Received: {type(student).__name__}, {type(teacher).__name__}"
                )
        if settings.uses("hidden"):
            self._project(seed)

    def terms(
        self, model: Any, inputs: Mapping[str, Any], labels: list[str], weights: Mapping[str, float]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run both models; return the student's outputs, and the terms whose weight is above 0.

        Args:
            model: The student, possibly wrapped.
            inputs: The batch.
            labels: Names of labels.
            weights: Weight of each term now.
        """
        wanted = {term for term in ("logits", "hidden", "attention") if weights[term] > 0}
        layers = pair_layers(self.settings.layer_map, *self.anatomies) if wanted & {"hidden", "attention"} else {}
        maps = self._pair_attentions(layers) if "attention" in wanted else {}
        layers = layers if "hidden" in wanted else {}
        with ExitStack() as stack:
            ours = self._listen(stack, 0, layers, maps)
            outputs = model(**inputs)
        if not wanted:
            return outputs, {}
        with ExitStack() as stack, torch.no_grad():
            theirs = self._listen(stack, 1, {b: b for b in layers.values()}, {b: b for b in maps.values()})
            given = teacher_inputs(self.teacher, inputs, labels)
            taught = self.teacher(**given)
        terms: dict[str, Tensor] = {}
        if "logits" in wanted:
            terms["logits"] = output_loss(self.student, outputs, taught, inputs, self.settings.temperature)
        if layers:
            terms["hidden"] = self._hidden(layers, ours[0], theirs[0], inputs)
        if maps:
            terms["attention"] = self._attention(maps, ours[1], theirs[1], inputs)
        return outputs, {name: value for name, value in terms.items() if value is not None}

    def restore(self) -> None:
        """Give models back the attention that they came with."""
        for model, before in self.implementations.values():
            model.set_attn_implementation(before)
        self.implementations = {}

    def _listen(self, stack: ExitStack, which: int, layers: Mapping[Key, Key], maps: Mapping[Place, Place]) -> Any:
        """Start to collect layers' outputs and attentions' maps of the student (0) or the teacher (1), by key."""
        anatomy = self.anatomies[which] if layers or maps else None
        if anatomy is None:
            return {}, {}
        model: Any = anatomy.model
        if maps and (before := use_eager_attention(model)):
            self.implementations[id(model)] = model, before
        paths = {key: path for key, path in anatomy.layers().items() if key in layers}
        cores = {place: one.module for place, one in anatomy.attentions().items() if place in maps}
        hidden = stack.enter_context(listen(model, paths.values(), take_hidden))
        attention = stack.enter_context(listen(model, cores.values(), take_map))
        return _Named(paths, hidden), _Named(cores, attention)

    def _hidden(self, layers: Mapping[Key, Key], ours: _Named, theirs: _Named, inputs: Mapping[str, Any]) -> Any:
        losses = []
        for mine, its in layers.items():
            student, teacher = ours.get(mine), theirs.get(its)
            if student is None or teacher is None:
                continue
            name = mine[0]
            if name in self.projections_by_name:
                student = self.projections_by_name[name](student.float())
            _check_alike(f"{name}.{mine[1]}", student, teacher)
            losses.append(hidden_loss(student, teacher, positions(self.student, inputs, name, student.shape)))
        return torch.stack(losses).mean() if losses else None

    def _attention(self, maps: Mapping[Place, Place], ours: _Named, theirs: _Named, inputs: Mapping[str, Any]) -> Any:
        student, teacher = (anatomy.attentions() for anatomy in self.anatomies)
        losses = []
        for mine, its in maps.items():
            pair = self._select(mine, student[mine], teacher[its], ours.get(mine), theirs.get(its))
            if pair is not None:
                _check_alike(".".join(map(str, mine)), *pair)
                mask = positions(self.student, inputs, mine[0], (len(pair[0]), *pair[0].shape[2:]))
                losses.append(attention_loss(*pair, mask))
        if maps and not losses:
            raise PruningError(
                "Distillation.attention needs models that hand out attention maps: load both with "
                f"attn_implementation='eager'. Received none from {type(self.student).__name__}"
            )
        return torch.stack(losses).mean()

    def _select(
        self, place: Place, mine: Attention, its: Attention, ours: Tensor | None, theirs: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return both maps with the heads that are compared; ``None`` where one has no map."""
        if ours is None or theirs is None:
            return None
        alive = self.anatomies[0].alive(mine) if mine.heads else list(range(ours.shape[1]))
        if not alive:
            return None
        if self.settings.heads == "mean":
            return ours[:, alive].mean(1, keepdim=True), theirs.mean(1, keepdim=True)
        numbers = {number: live for live, number in enumerate(its.heads)}
        missing = [mine.heads[i] for i in alive if mine.heads and mine.heads[i] not in numbers]
        if missing or not mine.heads:
            raise PruningError(
                f"Distillation.heads='kept' needs a teacher with the student's heads of {'.'.join(map(str, place))}. "
                f"Received one without {missing or 'numbered heads'}"
            )
        return ours[:, alive], theirs[:, [numbers[mine.heads[i]] for i in alive]]

    def _pair_attentions(self, layers: Mapping[Key, Key]) -> dict[Place, Place]:
        student, teacher = (anatomy.attentions() for anatomy in self.anatomies)
        pairs = {place: (*layers[place[:2]], place[2]) for place in student if place[:2] in layers}
        return {mine: its for mine, its in pairs.items() if its in teacher}

    def _project(self, seed: int) -> None:
        """Make a matrix for each list of layers that is wider or narrower than the teacher's; seeded on its own."""
        ours, theirs = (anatomy.widths for anatomy in self.anatomies)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, width in ours.items():
                if theirs.get(name, width) != width:
                    self.projections[name.replace(".", "_")] = nn.Linear(width, theirs[name], bias=False)

    @property
    def projections_by_name(self) -> dict[str, nn.Module]:
        """The matrices by the name of their list of layers."""
        return {
            name: self.projections[key]
            for name in self.anatomies[0].dense
            if (key := name.replace(".", "_")) in self.projections
        }


class _Named:
    """What `listen` collects, by the keys that its paths belong to."""

    def __init__(self, paths: Mapping[Any, str], heard: Mapping[str, Tensor]) -> None:
        self.paths, self.heard = paths, heard

    def get(self, key: Any) -> Tensor | None:
        return self.heard.get(self.paths.get(key, ""))


def _check_alike(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise PruningError(
            f"What '{name}' of the student hands out must have the teacher's shape {tuple(teacher.shape)}: both must "
            f"read the same tokens. Received: {tuple(student.shape)}"
        )


class DistillationMixin:
    """Put before any Trainer class: its loss then mixes the labels' with the teacher's.

    The gradient is the same for one batch of 16, for four accumulated batches of 4 and for two processes with 8 each:
    each term is a mean over items (the labels that count, or rows), weighted by the share of the items that a batch
    holds.

    In evaluation the loss is the model's own, and the teacher is not called.

    Args:
        teacher: A model, a folder, a name on the Hub, or ``"self"``: the weights at construction.
        distillation: The weights of the terms; ``None`` takes `Distillation()`.

    Raises:
        PruningError: Student and teacher cannot be compared.

    Example:
        >>> class MyTrainer(DistillationMixin, Seq2SeqTrainer): ...  # doctest: +SKIP
    """

    def __init__(self, *args: Any, teacher: Any, distillation: Distillation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation or Distillation()
        trainer: Any = self
        if getattr(trainer, "compute_loss_func", None) is not None:
            raise PruningError("Distillation mixes the model's own loss. Received a compute_loss_func beside it")
        device, student = trainer.args.device, trainer.model
        dtype, maps = self.distillation.teacher_dtype, self.distillation.uses("attention")
        self.teacher = load_teacher(teacher, student, dtype, maps=maps).to(device)
        self.lesson = Lesson(student, self.teacher, self.distillation, trainer.args.seed)
        self.lesson.projections.to(device)
        self.model_accepts_loss_kwargs = True  # we normalise by num_items_in_batch ourselves: Trainer must not again
        self._rows_in_step: Tensor | None = None
        self._terms: dict[str, list[Tensor]] = {}
        trainer.add_callback(_Keeper(self.lesson))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the optimizer learn the matrices between different widths too; they are not part of the model."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        known = {id(one) for group in optimizer.param_groups for one in group["params"]}
        new = [one for one in self.lesson.projections.parameters() if id(one) not in known]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": 0.0})
        return optimizer

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; a checkpoint that is resumed brings the matrices between different widths along."""
        path = resume_from_checkpoint
        if path is True:
            path = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        if path and len(self.lesson.projections) and (file := Path(path) / PROJECTIONS).is_file():
            self.lesson.projections.load_state_dict(load_file(file))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Average over processes what DDP does not know of: gradients of the matrices between different widths."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            for one in self.lesson.projections.parameters():
                one.grad = None if one.grad is None else average_over_processes(one.grad)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count the items and rows of one optimizer step: transformers 4 counts unshifted labels."""
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if not batches:
            return batches, None
        student, arguments = self.model, self.args  # type: ignore[attr-defined]
        counts = torch.stack([torch.stack(_counts(student, batch)).cpu() for batch in batches]).sum(0)
        if arguments.average_tokens_across_devices and arguments.world_size > 1:
            counts = self.accelerator.gather(counts.to(arguments.device)).view(-1, 2).sum(0)  # type: ignore[attr-defined]
        items, self._rows_in_step = counts.to(arguments.device)
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mixed loss, and the outputs where they are asked for."""
        if not model.training:
            return self._evaluate_loss(model, inputs, return_outputs, num_items_in_batch)
        state: Any = self.state  # type: ignore[attr-defined]
        progress = state.global_step / max(1, state.max_steps)
        weights = {name: self.distillation.weight(name, progress) for name in ("hard", "logits", "hidden", "attention")}
        names = list(getattr(self, "label_names", None) or [])
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        with accelerator.autocast():  # the teacher in mixed precision too
            outputs, terms = self.lesson.terms(model, inputs, names, weights)
        hard = self._hard(outputs, inputs)
        terms = terms if hard is None else {"hard": hard, **terms}
        loss = self._mix(terms, weights, inputs, num_items_in_batch)
        for name, value in terms.items():
            self._terms.setdefault(f"distillation_{name}", []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each term since the last log, over all processes."""
        if "loss" in logs:
            means = {name: average_over_processes(torch.stack(values).mean()) for name, values in self._terms.items()}
            logs.update({name: round(value.item(), 4) for name, value in means.items()})
            self._terms = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _evaluate_loss(self, *args: Any) -> Any:
        """Return what the Trainer behind this mixin does; that of transformers 4 asks the model to take a count."""
        self.model_accepts_loss_kwargs = False
        try:
            return super().compute_loss(*args)  # type: ignore[misc]
        finally:
            self.model_accepts_loss_kwargs = True

    def _hard(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the loss on labels; ``None`` where the batch has none."""
        loss, smoother = outputs.get("loss"), getattr(self, "label_smoother", None)
        if loss is not None and smoother is not None and "labels" in inputs:
            student: Any = self.model  # type: ignore[attr-defined]
            loss = smoother(outputs, inputs["labels"], shift_labels=shifts_labels(student))
        return None if loss is None else loss.mean()

    def _mix(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float], inputs: Mapping[str, Any], items: Any
    ) -> Tensor:
        """Return the weighted sum of terms, each by the share of a step's items that this batch holds."""
        shares = dict.fromkeys(terms, torch.ones(()))
        if items is not None:
            arguments: Any = self.args  # type: ignore[attr-defined]
            across = arguments.average_tokens_across_devices
            processes = self.accelerator.num_processes if across else 1  # type: ignore[attr-defined]
            here = _counts(self.model, inputs)  # type: ignore[attr-defined]
            by_item, by_row = (
                processes * count / torch.as_tensor(total).clamp(min=1)
                for count, total in zip(here, (items, self._rows_in_step))
            )
            shares = {name: by_row if name in ("hidden", "attention") else by_item for name in terms}
        if not terms:
            raise PruningError(f"Distillation has nothing to learn from this batch. Received keys: {sorted(inputs)}")
        return torch.stack(
            [weights[name] * shares[name].to(value.device) * value for name, value in terms.items()]
        ).sum()


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with a teacher: see `DistillationMixin`."""


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """Keeps what is not of the model: matrices between different widths, and which attention the models came with."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget their gradients: Trainer forgets only the model's."""
        self.lesson.projections.zero_grad()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them into the checkpoint that was just saved."""
        if len(self.lesson.projections) and args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file(self.lesson.projections.state_dict(), folder / PROJECTIONS)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the models back what they came with."""
        self.lesson.restore()


def _counts(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return how many items and rows a batch has; without labels its rows are its items."""
    labels, rows = inputs.get("labels"), count_rows(model, inputs)
    return (count_items(model, labels).to(rows.device) if torch.is_tensor(labels) else rows), rows
