"""Gradual pruning of one model, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..adapters import mark_changed
from ..evidence import Loss
from ..live import LiveModel, Masking
from ..masks import Masks
from ..optimizers import StepWatch, check_state
from ..pruners import Pruner
from ..report import Report
from ..schedules import Schedule
from ..settings import renamed
from ..sharding import unwrap
from ..structure import Group
from ..targets import Target
from ..wrappers import forget_graphs
from . import checks
from .budgets import make_budget
from .changing import Chooser
from .clock import Clock
from .driving import Driving
from .guards import Guard, Guarding
from .numbers import Numbers, measure_dense
from .older import of_today
from .parts import Part, all_or_nothing, or_close
from .reporting import report_of
from .scoring import Scorer, make_evidence
from .seeing import Seeing
from .settings import PruningSettings, as_settings
from .shortfalls import Shortfalls
from .tasks import Task, make_tasks


@renamed("shrink_live", "shrink_during_training")
class Pruning:
    """Gradual pruning for any training loop; the Trainer callback is a thin layer over it.

    Call `after_backward` before, and `step` after each optimizer step (before gradients are zeroed), then `finish`.
    A step that the optimizer does not take, because a GradScaler has found an overflow or gradients are still being
    accumulated, counts for nothing.

    Args:
        model: The model; one wrapped by accelerate, DDP or torch.compile is unwrapped.
        pruners: What to remove. Structured pruners either state a sparsity each, or leave it to `target` together.
            `PruningSettings` say this and all that follows but the optimizer and its steps.
        schedule: When; ``None`` takes `Schedule()`. A pruner's own schedule comes first.
        target: How much of the dense model is to remain over all structured pruners, also where this one was pruned.
        total_steps: Optimizer steps of the whole run, at least 1.
        optimizer: Its moments are zeroed where weights are, and it says which steps are taken.
        accelerator: To unwrap the model, and to know when gradients are complete.
        data: Calibration batches (dicts with labels), for scores at each change; ``None``: the training batches.
        loss: From (model, batch) to the loss on `data`; ``None``: the model's own.
        masks: Weights that are masked from the start (parameter name -> boolean, True = keep), for example by
            `adopt_torch_masks`: they stay masked, and count towards a WeightPruner's sparsity.
        shrink_during_training: Remove units physically at every change, which saves time; DDP and compiling go along.
        seed: For scores that draw numbers.
        guard: Who may hold a change back, or undo the last one: one or several.
        epoch_steps: Optimizer steps of one pass over the data, for schedules in epochs.

    Raises:
        PruningError: Settings contradict each other, or nothing could be pruned.

    Example:
        >>> pruning = Pruning(model, [HeadPruner(), NeuronPruner()], target=Target(macs=0.5), total_steps=1000,
        ...                   optimizer=optimizer)  # doctest: +SKIP
        >>> loss.backward(); pruning.after_backward(); optimizer.step(); pruning.step()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        pruners: Pruner | Sequence[Pruner] | PruningSettings,
        schedule: Schedule | None = None,
        *,
        target: Target | None = None,
        total_steps: int,
        optimizer: Any = None,
        accelerator: Any = None,
        data: Iterable[Mapping[str, Any]] | None = None,
        loss: Loss | None = None,
        masks: Mapping[str, Tensor] | None = None,
        shrink_during_training: bool = False,
        seed: int = 0,
        guard: Guard | Sequence[Guard] | None = None,
        epoch_steps: float | None = None,
    ) -> None:
        checks.check_kinds(model, total_steps, optimizer)
        told = as_settings(pruners, schedule, target, data, loss, guard, shrink_during_training, seed)
        bare = unwrap(model, accelerator)
        checks.check_settings(told)
        checks.check_shards(bare, told)
        checks.check_finds_unused(told.pruners, getattr(model, "find_unused_parameters", True))
        self.settings, self._accelerator = told, accelerator
        self.live = LiveModel(bare, optimizer, structured=checks.has_units(told.pruners))
        self.tasks = make_tasks(told.pruners, self.live, told.schedule or Schedule(), total_steps, epoch_steps)
        checks.check_tasks(self.tasks, self.live, told)
        for schedule in {str(task.schedule): task.schedule for task in self.tasks}.values():
            schedule.warn_of_few(total_steps)
        self.clock = Clock(total_steps)
        chosen = [name for task in self.tasks.units for name in task.groups]
        dense = measure_dense(self.live)
        self.masking = Masking(self.live, masks, chosen, self.tasks.returning, self.tasks.from_zero)
        self.evidence = make_evidence(self.tasks, self.live, told.seed)
        self.numbers = Numbers(self.live, self.masking, self.tasks, self.evidence.values(), dense)
        self.guarding = Guarding(self.live, told.guards, self.clock)
        self._scorer = Scorer(self.live, self.masking, self.evidence)
        self._seeing = Seeing(self.live, self.masking, self.evidence.values(), hooked=told.data is None)
        self.budget = make_budget(self.live, told.target, chosen)
        self._chooser = Chooser(told, self.live, self.tasks, self.budget, self.masking, self._scorer, self._seeing)
        self._driving = Driving(told, self.live, self.tasks, self.masking, self.budget, self.evidence.values())
        self._watch, self._checked = StepWatch(optimizer, self._before_step), False
        with or_close(self.close):
            self._start()
            self.numbers.count()
        mark_changed(bare)

    # what a training loop calls
    def after_backward(self) -> None:
        """Read gradients: call it when they are complete (and clipped), before the optimizer's step.

        An optimizer that was handed over calls for it by itself, and only in steps that it takes; but a closure that
        computes gradients inside of a step has to say when they are complete.
        """
        if self._watch.in_closure or not (self._watch.watching or self._accumulates()):
            self._before_step(1.0)

    def step(self) -> bool:
        """Advance by one optimizer step; change masks where the schedule says so, and hold them elsewhere.

        Returns:
            Whether masks changed.
        """
        if self._accumulates():
            return False
        self._seeing.hide()
        taken = self._watch.took()
        self.clock.tick(taken)
        self._count_batches(taken)
        self._driving.shrink(self.clock.position, taken)
        due = self.tasks.due(self.clock, taken, waits=self.guarding.waits)
        with or_close(self.close):
            changes = bool(due) and self._allowed()
        if changes:
            self._change(due)
        elif self.masking.anything:
            self.masking.hold_after_step()
        if taken:
            self._driving.aim(self.clock.position)
            for one in self.evidence.values() if self.settings.data is None else ():
                one.step()
        self._prepare()
        return changes

    def synchronize(self) -> None:
        """Let all processes hold the same evidence, before one of them writes it down for all; all of them call it."""
        self._scorer.synchronize()

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell guards what an evaluation has found."""
        with or_close(self.close):
            self.guarding.observe(metrics)

    def finish(self, shrink: bool = True) -> Report:
        """Hold the masks once more, remove the units, write the plan into the config, and report.

        Under FSDP all processes call it, and `model` then is a plain copy of the sharded model, shrunk, on the CPU of
        every process.

        Args:
            shrink: Remove units physically; ``False`` leaves them as zeros, and a sharded model sharded.
        """
        self.close()
        if self.guarding.ends_badly():
            self._go_back(at_end=True)
        short = Shortfalls(self.live, self.masking, self.tasks, self.settings.target, self.budget)
        facts = self.guarding.facts() | short.warn(self.clock, self.guarding.told(), self.macs_left())
        self._driving.settle()
        self.masking.hold()
        if shrink and self._gather() and self.live.groups:
            self._cut()
            self.numbers.count()
        return report_of(self.live, self.masking, self.numbers, self.tasks, self.budget, facts)

    def hold(self) -> None:
        """Zero again what is masked; also what an optimizer will put in its place when it evaluates."""
        self.masking.hold()

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._seeing.stop()
        self._watch.stop()
        for one in self.evidence.values():
            one.stop()

    # what anyone may ask
    @property
    def model(self) -> nn.Module:
        """The model, not wrapped; after `finish` under FSDP the plain copy."""
        return self.live.model

    @property
    def groups(self) -> Sequence[Group]:
        """Where units of the model are now."""
        return self.live.groups

    @property
    def alive(self) -> Mapping[str, Tensor]:
        """Group name -> ``(units,)`` boolean, True = not masked."""
        return self.masking.units.alive

    @property
    def masks(self) -> Masks:
        """Masks of single weights: parameter name -> boolean, True = keep."""
        return self.masking.weights

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken."""
        return self.clock.steps

    @property
    def finished(self) -> bool:
        """Whether the last change has been made: the model is as sparse as was asked for."""
        return self.clock.position >= self.last_change

    @property
    def last_change(self) -> int:
        """The step after which nothing changes any more."""
        return self.tasks.last_change

    def macs_left(self) -> float:
        """Return the share of the dense model's prunable multiply-accumulates that remains, in (0, 1]."""
        return self.numbers.macs_left()

    def logs(self) -> dict[str, float]:
        """Return what a log should show.

        `sparsity` is the share of zeros in all matrices that units can be cut from or that single weights may leave.
        `reversible_mb` is the most memory, in 10^6 bytes of this process, that masks which may be taken back and scores
        that follow single weights have needed; it is missing where there are none.
        """
        return self.numbers.logs()

    @property
    def parts(self) -> dict[str, Part]:
        """What a session is made of, by name: saving, resuming and going back walk through it."""
        return {
            "live": self.live,
            "tasks": self.tasks,
            "clock": self.clock,
            "masking": self.masking,
            "numbers": self.numbers,
            **({} if self.budget is None else {"budget": self.budget}),
            **{f"evidence.{name}": one for name, one in self.evidence.items()},
            "guards": self.guarding,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs: step, plan, masks, running means; under FSDP all processes call it."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's weights are loaded by whoever saved them.

        Raises:
            PruningError: The state is of another model or of other pruners.
        """
        with all_or_nothing(self.parts):
            checks.check_parts(state := of_today(state), self.parts)
            self._take_up(state)
        self._go_on()

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Set those parts of which the state knows; the model's weights stay as they are."""
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])
        self.numbers.count()

    def _go_on(self) -> None:
        self.masking.write()
        self._settle()
        self._prepare()

    def _parts_that_go_back(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items() if name not in ("clock", "guards")}

    # one step
    def _start(self) -> None:
        self._seeing.start()
        for one in self.evidence.values() if self.settings.data is None else ():
            one.start()
        self._prepare()

    def _accumulates(self) -> bool:
        """Whether accelerate is still summing up gradients for one step."""
        return self._accelerator is not None and not self._accelerator.sync_gradients

    def _before_step(self, scale: float) -> None:
        """Read gradients that are complete, and as many times too large as `scale` says."""
        shown = self.masking.shown
        self._seeing.hide()
        if self.settings.data is None:
            next_ = self.clock.position + 1
            with self._scorer.scaled(scale):
                self._scorer.read(self.tasks.ahead(self.clock.position))
                self._scorer.hold(task for task in self.tasks.weights if task.due(next_) and not task.waits)
        if not shown:  # shut gates let no gradient through
            self.masking.check_leaks()

    def _prepare(self) -> None:
        """Say what the next step is."""
        next_ = self.clock.position + 1
        for one in self.evidence.values() if self.settings.data is None else ():
            tasks = self.tasks.weights if one.weights and not one.groups else self.tasks.units
            ahead = [change - next_ for task in tasks for change in task.changes if change >= next_]
            one.prepare(self.clock.steps + 1, min(ahead, default=None))

    def _count_batches(self, taken: bool) -> None:
        """Let what was seen of a step's batches count, if the optimizer has taken the step."""
        if taken and not self._checked:
            check_state(self.live.optimizer)
            self._checked = True
        for one in self.evidence.values() if self.settings.data is None else ():
            if taken:
                one.commit(self._watch.scale, may_overflow=self._watch.scaled)
            else:
                one.discard()

    def _allowed(self) -> bool:
        """Ask the guards whether the change that is due may be made; undo the last one where they say so."""
        position, verdict = self.clock.position, self.guarding.verdict(self.clock.position)
        made = self.guarding.is_made(position)
        if verdict == "back":
            self._go_back()
        elif not made and self.guarding.is_worth_keeping(verdict):
            self.guarding.keep(self._parts_that_go_back, position)
        if verdict == "wait":
            self.clock.wait()
        elif verdict == "go" and made:
            self._settle()
        return verdict == "go" and not made

    def _go_back(self, *, at_end: bool = False) -> None:
        parts, position = self.guarding.back(at_end=at_end)
        self.clock.position = position - 1  # its change is to come, so that nothing settles where it was the last one
        self._take_up(parts)
        self._go_on()

    # one change, from scores to zeros
    def _change(self, due: Sequence[Task]) -> None:
        position, asked = self.clock.position, max(task.fraction(self.clock.position) for task in due)
        self.masking.apply(*self._chooser.choose(due, position, self.guarding.limit()))
        self.numbers.remember_bytes()
        if self.guarding.changed(asked, position, last=position >= self.last_change):
            self.clock.wait()
        self._settle()
        if self.settings.shrink_during_training:
            self._cut()
            forget_graphs()
        self.numbers.count()

    def _settle(self) -> None:
        """Once nothing changes any more, stop watching and give back what was kept for it."""
        if self.finished:
            self.masking.settle()
            self.numbers.settle()
            self.guarding.settle()
            for one in self.evidence.values():
                one.settle()
        self._seeing.look()

    # structure
    def _cut(self) -> None:
        """Remove masked units physically; everyone follows."""
        if not self.live.groups:
            return
        units = self.masking.units
        cut = self.live.cut(units.kept, units.vectors)
        self.tasks.follow(cut)
        self.masking.follow(cut)
        for one in self.evidence.values():
            one.follow(cut)

    def _gather(self) -> bool:
        """Let a session go on with a plain copy of its sharded model; return whether units can be removed now."""
        if not self.live.sharded:
            return True
        held = self.state_dict()
        if not self.live.gather():
            return False
        self._take_up(held)
        self._go_on()
        return True
