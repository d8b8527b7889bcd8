"""Pruning in any Trainer: hooks decide when, `Pruning` decides what."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from .architectures import find_groups
from .errors import CheckpointError, PruningError
from .plan import Record, close_kept, read_record
from .pruners import Pruner, Target
from .removal import cut
from .report import Report
from .schedules import Schedule
from .session import Pruning, unwrap
from .stock import write_record

logger = logging.getLogger(__name__)
STATE = "pruning_state.safetensors"


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Prune gradually while any Trainer trains.

    Args:
        pruners: What to remove: one pruner or several.
        schedule: When; ``None`` takes `Schedule()`.
        target: How much is to remain over all structured pruners.
        data: Calibration batches; ``None`` takes scores from the training batches themselves.
        shrink_at_end: Remove units physically when training ends; ``False`` leaves zeros.
        shrink_during_training: Remove them at every change: faster, in one process and without torch.compile.
        seed: For scores that draw numbers.

    Raises:
        PruningError: When training begins and the settings do not fit the model.

    Example:
        >>> callback = PruningCallback([HeadPruner(), NeuronPruner()], target=Target(macs=0.5))
        >>> callback.attach(trainer).train()  # doctest: +SKIP
        >>> print(callback.report.table())  # doctest: +SKIP
    """

    def __init__(
        self,
        pruners: Pruner | Sequence[Pruner],
        schedule: Schedule | None = None,
        *,
        target: Target | None = None,
        data: Iterable[Mapping[str, Any]] | None = None,
        shrink_at_end: bool = True,
        shrink_during_training: bool = False,
        seed: int = 0,
    ) -> None:
        self.pruners, self.schedule, self.target, self.data = pruners, schedule, target, data
        self.shrink_at_end, self.shrink_during_training, self.seed = shrink_at_end, shrink_during_training, seed
        self.pruning: Pruning | None = None
        self.report: Report | None = None

    def attach(self, trainer: Any) -> Any:
        """Put this callback first in a Trainer, so that its numbers reach every tracker; return the Trainer."""
        trainer.callback_handler.callbacks = [cb for cb in trainer.callback_handler.callbacks if cb is not self]
        trainer.callback_handler.callbacks.insert(0, self)
        self._load_shapes_of_checkpoints(trainer.model)
        return trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a checkpoint that is smaller than the model be resumed."""
        self._load_shapes_of_checkpoints(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make fresh state, or go on from the checkpoint that training resumes from."""
        if self.shrink_during_training and (args.world_size > 1 or args.torch_compile):
            raise PruningError(
                "shrink_during_training needs one process without torch.compile: a wrapper keeps the old shapes. "
                f"Received: world_size={args.world_size}, torch_compile={args.torch_compile}"
            )
        self.report = None
        self.pruning = Pruning(
            kwargs["model"],
            self.pruners,
            self.schedule,
            target=self.target,
            total_steps=state.max_steps,
            optimizer=kwargs["optimizer"],
            data=self.data,
            shrink_live=self.shrink_during_training,
            seed=self.seed,
        )
        if state.global_step:
            self.pruning.load_state_dict(read_state(find_checkpoint(args, state.global_step) / STATE))

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

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the pruning state into the checkpoint that was just saved."""
        if self._session.watcher is not None:
            self._session.watcher.synchronize()  # one file is written, and every process resumes from it
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_state(self._session.state_dict(), folder / STATE)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add sparsity and the share of MACs left to what is logged."""
        if self.pruning is not None and logs is not None and "loss" in logs:
            numbers = self.pruning.logs()
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shrink, and report."""
        self.report = self._session.finish(self.shrink_at_end)
        logger.info(self.report.table())

    @property
    def _session(self) -> Pruning:
        if self.pruning is None:
            raise PruningError("PruningCallback has no session: training has not begun.")
        return self.pruning

    def _load_shapes_of_checkpoints(self, model: Any) -> None:
        """Cut the live model to a smaller checkpoint's plan just before its weights arrive."""
        root: Any = unwrap(model)
        if self.shrink_during_training and not getattr(root, "_hf_prune_resumes", False):
            root._hf_prune_resumes = True
            root.register_load_state_dict_pre_hook(_fit_shapes)


def _fit_shapes(model: Any, *_: Any) -> None:
    """Cut a model to the plan of the checkpoint whose weights a Trainer is about to load into it."""
    folder = _loading_folder(sys._getframe(1))
    if folder is None or not (folder / STATE).is_file():
        return  # another load: the best model's shapes are there already
    entries = read_state(folder / STATE)["record"]
    record = Record({name: (list(kept), dense) for name, (kept, dense) in entries.items()})
    groups = find_groups(model)
    live = read_record(model).to_live(groups, {name: kept for name, (kept, _) in record.items()})
    cut(model, groups, close_kept(groups, live))
    write_record(model, record)


def _loading_folder(frame: FrameType | None) -> Path | None:
    """Return the folder that a Trainer loads: only its own frame tells it before the weights arrive."""
    while frame is not None and frame.f_code.co_name != "_load_from_checkpoint":
        frame = frame.f_back
    given = frame.f_locals.get("resume_from_checkpoint") if frame is not None else None
    return Path(given) if isinstance(given, str) else None


def find_checkpoint(args: Any, step: int) -> Path:
    """Return the folder that training resumes from.

    Raises:
        CheckpointError: It holds no pruning state.
    """
    given = args.resume_from_checkpoint
    candidates = [*([Path(given)] if isinstance(given, str) else []), Path(args.output_dir) / f"checkpoint-{step}"]
    for folder in candidates:
        if (folder / STATE).is_file():
            return folder
    raise CheckpointError(
        f"Resuming needs {STATE} in the checkpoint. Looked in: {', '.join(map(str, candidates))}. "
        "A checkpoint of another output_dir must be named in TrainingArguments(resume_from_checkpoint=...) too."
    )


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a pruning state as one safetensors file, atomically: the old one or the new one is there at any moment."""
    from safetensors.torch import save_file

    tensors = {f"{key}/{name}": t.contiguous() for key, v in state.items() if key in _TENSORS for name, t in v.items()}
    plain = {key: value for key, value in state.items() if key not in _TENSORS}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"state": json.dumps({**plain, "tensors": sorted(set(state) & _TENSORS)})})
    os.replace(partial, path)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        CheckpointError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            plain = json.loads((file.metadata() or {})["state"])
            state: dict[str, Any] = {key: {} for key in plain.pop("tensors")}
            for full in file.keys():  # noqa: SIM118  not a dict
                key, name = full.split("/", 1)
                state[key][name] = file.get_tensor(full)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The pruning state {path} cannot be read: {error}") from error
    return {**state, **plain}


_TENSORS = {"alive", "masks", "square", "absolute"}
