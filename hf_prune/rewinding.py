"""Rewinding: train, prune, go back to an early moment of training, and train again under the mask; in rounds."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import TrainerCallback, set_seed

from .errors import PruningError
from .given import check_given
from .live import Snapshot
from .pruners import WeightPruner
from .report import Report
from .resume import read_state, write_state
from .schedules import Moment, Schedule
from .session import Pruning, PruningSettings, epoch_steps_of, prune_under, unwrap
from .settings import settings

FOLDER, STATE = "rewinding", "rounds.safetensors"


@settings(frozen=True)
class Rewinding:
    """Rounds of training and pruning, each of which begins again at an early moment of the first training.

    Args:
        rounds: How often weights leave, at least 1: each round leaves the same share of what was left.
        to: The moment that each round goes back to: steps, a fraction of the training, or ``"1 epochs"``; 0: the start.
        what: ``"weights"``: weights, moments, learning rate and data are as at that moment, and only the mask is new
            (lottery tickets: Frankle & Carbin 2019, arXiv:1803.03635; to a later moment: arXiv:1912.05671).
            ``"rate"``: learning rate and data alone; weights go on as they were trained (Renda et al. 2020,
            arXiv:2003.02389).

    Example:
        >>> Rewinding(rounds=2).sparsities(0.75)
        [0.5, 0.75]
    """

    rounds: int = Field(default=3, ge=1)
    to: Moment = 0
    what: Literal["weights", "rate"] = "weights"

    def sparsities(self, sparsity: float) -> list[float]:
        """Return the sparsity of each round: what is left shrinks by one factor."""
        return [round(1 - (1 - sparsity) ** (n / self.rounds), 12) for n in range(1, self.rounds + 1)]


def check_rewinding(pruning: PruningSettings) -> WeightPruner:
    """Return the one pruner whose masks rewinding can keep.

    Raises:
        PruningError: There are others, or a schedule's guard.
    """
    pruner = pruning.pruners[0]
    if len(pruning.pruners) > 1 or not isinstance(pruner, WeightPruner) or pruner.sparsity is None:
        raise PruningError(
            "Rewinding keeps masks of single weights: give one WeightPruner with a sparsity. Received: "
            f"{', '.join(type(one).__name__ for one in pruning.pruners)}"
        )
    if pruner.may_revive() or pruning.guards or pruning.shrink_during_training:
        others = {"a guard": pruning.guards, "shrink_during_training": pruning.shrink_during_training}
        what = next((name for name, used in others.items() if used), "a rule that takes masks back")
        raise PruningError(
            f"Rewinding prunes once a round, for good, without guards and shrink_during_training. Received: {what}"
        )
    return pruner


def rewind(
    trainer: Any,
    pruner: WeightPruner | PruningSettings,
    rewinding: Rewinding | None = None,
    *,
    data: Iterable[Mapping[str, Any]] | None = None,
    resume: bool = False,
) -> Report:
    """Train, and then so many times: prune, rewind, train again under the mask.

    Each training is a `Trainer`'s, from beginning to end; every round ends with an evaluation, where there are data
    for it. A run that was killed goes on with the round in which it was (``resume=True``).

    Args:
        trainer: Any Trainer that makes its own optimizer; its model is pruned in place, and stays sparse zeros.
        pruner: How much leaves in all, by which score; or settings with one pruner, data and a seed.
        rewinding: How many rounds, and what goes back; ``None``: `Rewinding()`.
        data: Batches with labels, for scores that need gradients.
        resume: Whether rounds that are done already, in the Trainer's `output_dir`, are not done again.

    Returns:
        The report; ``settings["rounds"]`` has sparsity and metrics of every round.

    Raises:
        PruningError: Something here cannot be: an optimizer of one's own, FSDP, another pruner.

    Example:
        >>> rewind(trainer, WeightPruner(sparsity=0.8, score="l1"), Rewinding(rounds=4))  # doctest: +SKIP
    """
    check_given("rewinding", rewinding, (Rewinding, type(None)), "Rewinding(...), such as Rewinding(rounds=4)")
    run = _Run(trainer, pruner, rewinding or Rewinding(), data)
    callback = _Rounds(run)
    trainer.add_callback(callback)
    try:
        if resume and (run.folder / STATE).is_file():
            run.load()
        else:
            run.begin()
        for sparsity in run.left():
            run.round(sparsity)
    finally:
        trainer.remove_callback(callback)
    return run.report()


class _Run:
    """The rounds of one Trainer, and what they leave for each other."""

    def __init__(self, trainer: Any, pruner: Any, rewinding: Rewinding, data: Any) -> None:
        if trainer.optimizer is not None or getattr(trainer, "is_fsdp_enabled", False):
            what = "FSDP" if trainer.optimizer is None else f"{type(trainer.optimizer).__name__}"
            raise PruningError(
                f"Each round makes an optimizer anew, of whole parameters: leave that to the Trainer. Received: {what}"
            )
        given = pruner if isinstance(pruner, PruningSettings) else PruningSettings(pruner, data=data)
        self.pruner, self.given, self.rewinding = check_rewinding(given), given, rewinding
        self.trainer, self.model = trainer, unwrap(trainer.model)
        self.folder = Path(trainer.args.output_dir) / FOLDER
        self.session = self._session(self.pruner, None)  # finds now what would be wrong after hours
        self.dense = self.session.numbers.dense
        self.rounds: list[dict[str, Any]] = []
        self.start, self.trained = Snapshot(self.model), Snapshot(self.model)

    def _session(self, pruner: WeightPruner, masks: Any) -> Pruning:
        settings = replace(self.given, pruners=[pruner], schedule=Schedule("oneshot", begin=1, end=1))
        session = Pruning(self.model, settings, total_steps=1, masks=masks)
        session.close()
        return session

    def left(self) -> list[float]:
        """Return the sparsities of the rounds that are to come; the dense training is not one of them."""
        return self.rewinding.sparsities(float(self.pruner.sparsity or 0))[len(self.rounds) - 1 :]

    def begin(self) -> None:
        """Train the dense model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._train(None)

    def round(self, sparsity: float) -> None:
        """Prune, rewind, train."""
        pruner, masks = replace(self.pruner, sparsity=sparsity), self.session.masks
        self.session = prune_under(self.model, replace(self.given, pruners=[pruner]), masks)
        self.trained = Snapshot(self.model)
        self._train(next(self.folder.glob("checkpoint-*"), None))

    def _train(self, checkpoint: Path | None) -> None:
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        set_seed(self.trainer.args.seed)
        self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.session.hold()
        metrics = self.trainer.evaluate() if self.trainer.eval_dataset is not None else {}
        found = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        self.rounds.append({"sparsity": self.session.logs().get("sparsity_weight", 0.0), "metrics": found})
        self._save()

    def report(self) -> Report:
        """Return what came of it."""
        report = self.session.finish(shrink=False)
        report.dense = self.dense
        report.settings["rounds"] = self.rounds
        return report

    def _save(self) -> None:
        """Write what the rounds to come need; all processes hold the same."""
        if self.trainer.is_world_process_zero():
            self.folder.mkdir(parents=True, exist_ok=True)
            state = {"start": self.start.weights, "trained": Snapshot(self.model).weights, "masks": self.session.masks}
            told = {"rounds": self.rounds, "settings": self._told(), "clock": {"steps": len(self.rounds)}}
            write_state({**state, **told}, self.folder / STATE)

    def load(self) -> None:
        """Go on behind the last round that was done."""
        state = read_state(self.folder / STATE)
        if state["settings"] != self._told():
            raise PruningError(
                f"A run goes on with the settings that it began with: {state['settings']}. Received: {self._told()}"
            )
        self.rounds, self.start.weights = state["rounds"], state["start"]
        self.trained.weights = state["trained"]
        self.trained.restore(self.model)
        self.session = self._session(self.pruner, state["masks"])

    def _told(self) -> str:
        return f"{self.pruner} {self.rewinding}"


class _Rounds(TrainerCallback):  # type: ignore[misc]
    """Keeps the moment to go back to, in the first training; goes back, and holds masks, in all others."""

    def __init__(self, run: _Run) -> None:
        self.run, self.moment = run, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let weights be those that the round begins with, under its mask."""
        run = self.run
        when = Schedule("oneshot", begin=run.rewinding.to, end=1.0)
        when = when.in_steps(epoch_steps_of(args, state, kwargs.get("train_dataloader")))
        self.moment = when.bounds(state.max_steps)[0] if when.begin else 0
        if not run.rounds:
            return
        if run.rewinding.what == "rate":
            run.trained.restore(run.model, kwargs["optimizer"])
        elif not self.moment:
            run.start.restore(run.model, kwargs["optimizer"])
        run.session.hold()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero again what an optimizer has changed."""
        self.run.session.hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the moment."""
        if not self.run.rounds and state.global_step == self.moment:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put a copy of the moment aside, where no limit of checkpoints deletes it."""
        if self.run.rounds or state.global_step != self.moment:
            return
        if args.world_size > 1:
            torch.distributed.barrier()  # all processes have saved their part
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            shutil.copytree(Path(args.output_dir) / name, self.run.folder / name, dirs_exist_ok=True)
        if args.world_size > 1:
            torch.distributed.barrier()
