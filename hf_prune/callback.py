"""Pruning in any Trainer: hooks decide when, `Pruning` decides what."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .errors import CheckpointError, PruningError
from .live import Snapshot
from .page import training_picture
from .pruners import Pruner
from .report import Report
from .report.display import check_picture, for_notebooks, write_picture
from .resume import (
    STATE,
    check_resumable,
    fit_shapes,
    join_checkpoints,
    leave_checkpoints,
    read_state,
    resume_from_whole_ones,
    resumed_folder,
    seal,
)
from .schedules import Schedule
from .session import (
    Guard,
    Pruning,
    PruningSettings,
    as_settings,
    check_finds_unused,
    epoch_steps_of,
    or_close,
    recover,
    steps_of,
    unwrap,
)
from .settings import briefly
from .sharding import any_sharded
from .targets import Target
from .training_log import FILE, TrainingLog
from .wrappers import no_engine

logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Prune gradually while any Trainer trains.

    What is logged in training is also written to ``pruning_log.csv`` in `output_dir`, one row a log, over resumes too;
    a run that begins anew replaces it. Under FSDP the Trainer's model keeps zeros, and ``callback.pruning.model`` is
    the whole, shrunk one when training has ended.

    Its checkpoints hold the state of pruning: a run that is killed, even while it saves, goes on with
    ``trainer.train(resume_from_checkpoint=True)`` as if nothing had been.

    Args:
        pruners: What to remove: one pruner or several. `PruningSettings` say all but `shrink_at_end`.
        schedule: When; ``None`` takes `Schedule()`.
        target: How much is to remain over all structured pruners.
        data: Calibration batches; ``None`` takes scores from the training batches themselves.
        shrink_at_end: Remove units physically when training ends; ``False`` leaves zeros.
        shrink_during_training: Remove them at every change, which saves time; under DDP and torch.compile too.
        seed: For scores that draw numbers.
        guard: Who may hold a change back, or undo the last one, such as `AccuracyGuard`: one or several.

    Raises:
        PruningError: An argument is of another kind; or, when training begins, settings do not fit the model.

    Example:
        >>> callback = PruningCallback([HeadPruner(), NeuronPruner()], target=Target(macs=0.5))
        >>> callback.attach(trainer).train()  # doctest: +SKIP
        >>> print(callback.report.table())  # doctest: +SKIP
    """

    def __init__(
        self,
        pruners: Pruner | Sequence[Pruner] | PruningSettings,
        schedule: Schedule | None = None,
        *,
        target: Target | None = None,
        data: Iterable[Mapping[str, Any]] | None = None,
        shrink_at_end: bool = True,
        shrink_during_training: bool = False,
        seed: int = 0,
        guard: Guard | Sequence[Guard] | None = None,
    ) -> None:
        self.settings = as_settings(pruners, schedule, target, data, None, guard, shrink_during_training, seed)
        self.shrink_at_end = shrink_at_end
        self.pruning: Pruning | None = None
        self.report: Report | None = None
        self._saving: Path | None = None
        self._start: Snapshot | None = None
        self._batch = 0
        self._log: TrainingLog | None = None

    def attach(self, trainer: Any) -> Any:
        """Put this callback first in a Trainer, so that its numbers reach every tracker; return the Trainer."""
        inner = getattr(trainer, "st_trainer", trainer)  # SetFit's Trainer has one inside that trains the body
        handler = getattr(inner, "callback_handler", None)
        if handler is None:
            raise PruningError(f"attach needs a Trainer: attach(trainer).train(). Received: {type(trainer).__name__}")
        handler.callbacks = [cb for cb in handler.callbacks if cb is not self]
        handler.callbacks.insert(0, self)
        _prepare_to_resume(inner.args, inner.model)
        return trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let incomplete checkpoints be passed over, and one that is smaller than the model be resumed."""
        args, model = _trained(args, kwargs)
        _prepare_to_resume(args, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make fresh state, or go on from the checkpoint that training resumes from."""
        args, model = _trained(args, kwargs)
        self._check_wrappers(args, model)
        if self.pruning is not None:
            self.pruning.close()  # training may have failed before its end
        if args.auto_find_batch_size:
            self._begin_attempt(unwrap(model), kwargs["optimizer"], state.train_batch_size)
        self.report = None
        epoch = epoch_steps_of(args, state, kwargs.get("train_dataloader"))
        told: dict[str, Any] = {"total_steps": state.max_steps, "epoch_steps": epoch}
        self.pruning = Pruning(model, self.settings, optimizer=kwargs["optimizer"], **told)
        with or_close(self.pruning.close):
            if state.global_step:
                self._resume(resumed_folder(args, state.global_step), state.global_step)
            join_checkpoints(state, STATE, lambda folder: self._complete(folder, args))
        self._log = TrainingLog(Path(args.output_dir) / FILE) if state.is_world_process_zero else None
        if self._log is not None:
            self._log.begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read gradients, complete and clipped."""
        self._session.after_backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change or hold masks."""
        was_denser = not self._session.finished
        self._session.step()
        if was_denser:  # a checkpoint denser than the target must never be the best one
            state.best_metric = state.best_model_checkpoint = None
            if hasattr(state, "best_global_step"):
                state.best_global_step = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Let guards see what an evaluation has found."""
        if self.pruning is not None and metrics:
            self.pruning.observe(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the pruning state into the checkpoint that was just saved, where it is not there yet."""
        args, _ = _trained(args, kwargs)
        folder, self._saving = self._saving, None
        if folder is not None and args.world_size == 1:
            return
        if args.world_size > 1:  # every process resumes from what one has written
            self._session.synchronize()
            torch.distributed.barrier()  # until every process has saved its part
        held = self._session.state_dict()  # in every process: shards are gathered
        if args.should_save:  # once, or once on each node
            seal(folder or Path(args.output_dir) / f"checkpoint-{state.global_step}", held)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add sparsity and the share of MACs left to what is logged, and all of it to a table in `output_dir`."""
        if self.pruning is not None and logs is not None and "loss" in logs:
            numbers = self.pruning.logs()
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)
        if self.pruning is not None and self._log is not None and logs and {"loss", "eval_loss"} & set(logs):
            self._log.add({"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shrink, and report."""
        leave_checkpoints(state, STATE)
        self._start = None  # what trains next is another run
        self.report = self._session.finish(self.shrink_at_end)
        logger.info(self.report)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw sparsity, loss and metrics over the steps, as far as they were logged.

        Args:
            path: Where to write it; the suffix chooses the format (png, svg, pdf). By default nothing is written.

        Returns:
            A ``matplotlib.figure.Figure``, which a notebook shows.

        Raises:
            PruningError: Fewer than two rows were logged, or matplotlib writes no such format.

        Example:
            >>> callback.plot("curves.png")  # doctest: +SKIP
        """
        check_picture(path)
        rows = [] if self._log is None else self._log.rows()
        picture = training_picture(rows)
        if picture is None:
            raise PruningError(
                "plot needs two rows that a Trainer has logged, in the first process: logging_steps says how often. "
                f"Received: {len(rows)}"
            )
        if path is not None:
            write_picture(picture.figure, path)
        return for_notebooks(picture.figure)

    def __repr__(self) -> str:
        """Say what is to be pruned, and how far that is."""
        told = self.settings
        what = [briefly(one) for one in (*told.pruners, told.schedule, told.target, *told.guards) if one is not None]
        if self.pruning is None:
            now = "not begun"
        else:
            done = "ended" if self.report else f"step {self.pruning.steps} of {self.pruning.clock.total_steps}"
            now = f"{done}, {self.pruning.macs_left():.1%} of the prunable MACs left"
        return f"PruningCallback({', '.join(what)}): {now}"

    @property
    def _session(self) -> Pruning:
        if self.pruning is None:
            raise PruningError("PruningCallback has a session while a Trainer trains. Received: none, or before that")
        return self.pruning

    def _begin_attempt(self, model: Any, optimizer: Any, batch: int) -> None:
        """Begin a run; or again, with a smaller batch, from the weights that the first attempt had."""
        if self._start is not None and batch < self._batch:
            self._start.restore(model, optimizer)
        else:
            self._start = Snapshot(model)
        self._batch = batch

    def _check_wrappers(self, args: Any, model: Any) -> None:
        """Refuse what a wrapper around the model, or another attempt of the Trainer, would break."""
        blind = [guard for guard in self.settings.guards if guard.needs_evaluation]
        if blind and getattr(args, "eval_strategy", "steps") == "no":
            raise PruningError(
                f"{type(blind[0]).__name__} needs evaluations while training runs: eval_strategy='steps', more of them "
                "than changes. Received: eval_strategy='no'"
            )
        if getattr(args, "deepspeed", None):
            raise no_engine("deepspeed in the Trainer's arguments")
        if self.settings.shrink_during_training and args.auto_find_batch_size:
            raise PruningError(
                "shrink_during_training needs a run that does not begin again with all units. "
                "Received: auto_find_batch_size=True"
            )
        if args.world_size > 1 and not any_sharded(model.parameters()):
            found = args.ddp_find_unused_parameters  # else a Trainer says yes, except under gradient checkpointing
            check_finds_unused(self.settings.pruners, not args.gradient_checkpointing if found is None else found)

    def _complete(self, folder: Path, args: Any) -> None:
        """Write the pruning state while a Trainer saves; several processes have to agree first, in on_save."""
        self._saving = folder
        if args.world_size == 1:
            seal(folder, self._session.state_dict())

    def _resume(self, folder: Path, step: int) -> None:
        """Go on with the state of a checkpoint, or with what the zeros in its weights tell of it."""
        check_resumable(folder)
        try:
            state = read_state(folder / STATE)
        except CheckpointError as lost:
            self._recover(folder, step, lost)
            return
        told = steps_of(state)
        if told != step:
            raise CheckpointError(f"{folder} is of step {step}: so must be its pruning state. Received: step {told}")
        self._session.load_state_dict(state)

    def _recover(self, folder: Path, step: int, lost: CheckpointError) -> None:
        try:
            recover(self._session, step)
        except CheckpointError as error:
            raise CheckpointError(
                f"Resuming needs {STATE} in {folder}: {lost}. The zeros in its weights do not tell all: {error}. "
                "Resume from an older checkpoint, or start again."
            ) from error
        logger.warning(f"{folder}: {lost}. Masks were recovered from the zeros in its weights, which is exact here.")


def _trained(args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the arguments and the model of the Trainer that trains; SetFit hands on its own under these names."""
    return kwargs.get("st_args", args), kwargs.get("st_model", kwargs["model"])


def _prepare_to_resume(args: Any, model: Any) -> None:
    resume_from_whole_ones(args, STATE)
    root: Any = unwrap(model)
    if not getattr(root, "_hf_prune_resumes", False):
        root._hf_prune_resumes = True
        root.register_load_state_dict_pre_hook(fit_shapes)
