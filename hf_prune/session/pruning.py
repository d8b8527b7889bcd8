"""Gradual pruning of one model, step by step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import mark_changed
from ..architectures import find_groups
from ..calibration import GateWatcher, Loss
from ..dense import dense_macs, dense_note, note_dense
from ..masks import Masks, apply_masks, check_masks, check_ranks_agree
from ..optimizers import StepWatch, swaps_weights
from ..plan import annotate, close_kept, read_record
from ..pruners import Pruner, Target, UnitPruner, WeightPruner, as_pruners
from ..removal import cut, skip_removed, zero_removed
from ..report import Measurement, Report, count
from ..schedules import Schedule
from ..scores import Score
from ..sharding import unwrap
from ..stock import write_record
from ..structure import Group, keep_vectors, live_shapes, matrix_entries, named_tensors
from . import checks
from .counting import by_kind, bytes_of, count_zeros, numbers_of, warn_of_missed
from .reviving import compute_masked, hide_masked, hook_model, keep_masks, reopen
from .scoring import Scorer
from .selection import select_alone, select_together
from .shadows import Shadows
from .state import gather, restore, state_of
from .stepping import before_step, count_batches, due_now, fade, read_next
from .weights import mask_weights

logger = logging.getLogger(__name__)


class Pruning:
    """Gradual pruning for any training loop; the Trainer callback is a thin layer over it.

    Call `after_backward` before, and `step` after each optimizer step (before gradients are zeroed), then `finish`.
    A step that the optimizer does not take, because a GradScaler has found an overflow or gradients are still being
    accumulated, counts for nothing.

    Args:
        model: The model; one wrapped by accelerate, DDP or torch.compile is unwrapped.
        pruners: What to remove. Structured pruners either state a sparsity each, or leave it to `target` together.
        schedule: When; ``None`` takes `Schedule()`. A pruner's own schedule comes first.
        target: How much is to remain over all structured pruners, of the dense model: also where this one was pruned
            before.
        total_steps: Optimizer steps of the whole run, at least 1.
        optimizer: Its moments are zeroed where weights are, and it says which steps are taken.
        accelerator: To unwrap the model, and to know when gradients are complete.
        data: Calibration batches (dicts with labels): scores are taken from them at each change, instead of from the
            training batches themselves.
        loss: From (model, batch) to the loss on `data`; ``None``: the model's own.
        masks: Weights that are masked from the start (parameter name -> boolean, True = keep), for example by
            `adopt_torch_masks`: they stay masked, and count towards a WeightPruner's sparsity.
        shrink_live: Remove units physically at every change, which saves time; in one process, without torch.compile.
        seed: For scores that draw numbers.

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
        pruners: Pruner | Sequence[Pruner],
        schedule: Schedule | None = None,
        *,
        target: Target | None = None,
        total_steps: int,
        optimizer: Any = None,
        accelerator: Any = None,
        data: Iterable[Mapping[str, Any]] | None = None,
        loss: Loss | None = None,
        masks: Mapping[str, Tensor] | None = None,
        shrink_live: bool = False,
        seed: int = 0,
    ) -> None:
        checks.check_kinds(model, schedule, target, total_steps, optimizer, data)
        self.model, self.pruners = unwrap(model, accelerator), as_pruners(pruners)
        self.schedule, self.target, self.total_steps = schedule or Schedule(), target, total_steps
        self.optimizer, self.data, self.loss, self.shrink_live = optimizer, data, loss, shrink_live
        self.accelerator, self.steps, self.skipped = accelerator, 0, 0
        checks.check_settings(self.pruners, target, self.schedule)
        checks.check_shards(self.model, shrink_live)
        checks.check_finds_unused(self.pruners, getattr(model, "find_unused_parameters", True))
        structured = any(isinstance(pruner, UnitPruner) for pruner in self.pruners)
        self.groups = find_groups(self.model) if structured else []
        self.record = self.before = read_record(self.model)
        dense = self.record.dense_groups(self.groups)
        units = {i: p.choose(dense) for i, p in enumerate(self.pruners) if isinstance(p, UnitPruner)}
        self.chosen = {i: self._live(chosen) for i, chosen in units.items()}
        self.weights = {
            i: p.choose_weights(self.model) for i, p in enumerate(self.pruners) if isinstance(p, WeightPruner)
        }
        checks.check_disjoint(self.chosen, target)
        self.swaps = swaps_weights(optimizer)
        self.reviving = {i for i, pruner in enumerate(self.pruners) if pruner.may_revive()}
        checks.check_reversible(self.model, self.pruners, self.chosen, self.weights, shrink_live, self.swaps)
        schedules = {i: pruner.schedule or self.schedule for i, pruner in enumerate(self.pruners)}
        self.changes = {i: one.change_steps(total_steps) for i, one in schedules.items()}
        for one in {str(schedule): schedule for schedule in schedules.values()}.values():
            one.warn_of_few(total_steps)
        self.alive = {group.name: torch.ones(group.units, dtype=torch.bool) for group in self.groups}
        self.masks: Masks = check_masks(named_tensors(self.model), masks or {})
        self.given = dict(self.masks) if self.reviving else {}  # these stay
        self.dense_units = {group.name: group.units for group in dense}
        self.counted = {str(i): by_kind(chosen) for i, chosen in units.items()}
        self.dense_macs = dense_macs(self.model, self.groups, self.record) if self.groups else 0
        self.dense: Measurement = replace(count(self.model), **dense_note(self.model))
        apply_masks(named_tensors(self.model), self.masks, optimizer)
        self.watcher = self._watch()
        self._hooks = hook_model(self) if self.reviving & {*self.chosen} and data is None else []
        read_next(self)
        self.shadows, self.most_bytes = Shadows(), 0
        self.scorer = Scorer(self.model, self.watcher, self.shadows, seed)
        self._watch_steps, self._checked = StepWatch(optimizer, functools.partial(before_step, self)), False
        self._leaky, self._unchecked = False, False
        self._thresholds: dict[str, int] = {}
        self.zeros = count_zeros(self)
        mark_changed(self.model)

    # what a training loop calls
    def after_backward(self) -> None:
        """Read gradients: call it when they are complete (and clipped), before the optimizer's step.

        An optimizer that was handed over calls for it by itself, and only in steps that it takes; but a closure that
        computes gradients inside of a step has to say when they are complete.
        """
        if self._watch_steps.in_closure or not (self._watch_steps.watching or self._accumulates()):
            before_step(self, 1.0)

    def step(self) -> bool:
        """Advance by one optimizer step; change masks where the schedule says so, and hold them elsewhere.

        Returns:
            Whether masks changed.
        """
        if self._accumulates():
            return False
        hide_masked(self)
        taken = self._watch_steps.took()
        self.steps, self.skipped = self.steps + taken, self.skipped + (not taken)
        count_batches(self, taken)
        due = due_now(self, taken)
        if due:
            self._change(due)
        elif self.masks or self._leaky:
            self.hold()
        fade(self, taken)
        read_next(self)
        return bool(due)

    def finish(self, shrink: bool = True) -> Report:
        """Hold the masks once more, remove the units, write the plan into the config, and report.

        Under FSDP all processes call it, and `model` then is a plain copy of the sharded model, shrunk, on the CPU of
        every process.

        Args:
            shrink: Remove units physically; ``False`` leaves them as zeros, and a sharded model sharded.
        """
        self.close()
        if not self.finished:
            logger.warning(
                f"Training ended at step {self.steps}, before the schedule did at {self.last_change}: the model is "
                "denser than was asked for."
            )
        else:
            warn_of_missed(self)
        self.hold()
        if shrink and gather(self) and self.groups:
            self._cut()
            self.zeros = count_zeros(self)
        live, shown = self._live_kept(), [group for group in self.groups if group.kind in self._kinds()]
        kept = {group.name: [self.record.dense_numbers(group)[i] for i in live[group.name]] for group in shown}
        if self.masks:
            annotate(self.model, weights={"sparsity": self.zeros.sparsity_weight, "parameters": len(self.masks)})
        units = {group.name: self.record.dense_units(group) for group in shown}
        return Report(
            kept=kept, units=units, dense=self.dense, pruned=count(self.model), metrics={}, settings=self.logs()
        )

    def close(self) -> None:
        """Remove all hooks from the model."""
        hide_masked(self)
        self._watch_steps.stop()
        for hook in self._hooks:
            hook.remove()
        if self.watcher is not None:
            self.watcher.stop()

    # what anyone may ask
    @property
    def finished(self) -> bool:
        """Whether the last change has been made: the model is as sparse as was asked for."""
        return self.steps >= self.last_change

    @property
    def last_change(self) -> int:
        """The step after which nothing changes any more."""
        return max(map(max, self.changes.values()))

    def macs_left(self) -> float:
        """Return the share of the dense model's prunable multiply-accumulates that remain, in (0, 1]."""
        if not self.groups:
            return 1.0
        return self._macs_now() / self.dense_macs

    def logs(self) -> dict[str, float]:
        """Return what a log should show.

        `sparsity` is the share of zeros in all matrices that units can be cut from or that single weights may leave.
        `reversible_mb` is the most memory, in 10^6 bytes of this process, that masks which may be taken back and scores
        that follow single weights have needed; it is missing where there are none.
        """
        return numbers_of(self)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs: step, plan, masks, running means; under FSDP all processes call it."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's weights are loaded by whoever saved them.

        Raises:
            PruningError: The state is of another model or of other pruners.
        """
        restore(self, state)

    def hold(self) -> None:
        """Zero again what is masked; also what an optimizer will put in its place when it evaluates."""
        tensors, optimizer = named_tensors(self.model), self.optimizer if self.swaps else None
        apply_masks(tensors, self.masks, optimizer)
        if self.groups:
            zero_removed(tensors, self._vectors(), optimizer)

    # one step
    def _accumulates(self) -> bool:
        """Whether accelerate is still summing up gradients for one step."""
        return self.accelerator is not None and not self.accelerator.sync_gradients

    # one change, from scores to zeros
    def _change(self, due: Sequence[int]) -> None:
        scores = self._unit_scores(due)
        reopen(self, due)
        if self.target is not None and any(i in self.chosen for i in due):
            select_together(self, scores)
        else:
            for i in due:
                if i in self.chosen:
                    select_alone(self, i, scores)
        for i in due:
            if i in self.weights:
                self._select_weights(i)
        tensors = named_tensors(self.model)
        check_ranks_agree({**self.alive, **self.masks}, tensors, self._thresholds)
        self.shadows.move(tensors, keep_masks(self, tensors), self.optimizer)
        apply_masks(tensors, self.masks, self.optimizer)
        zero_removed(tensors, self._vectors(), self.optimizer)
        skip_removed(self.model, self.groups, self._live_kept())
        self._unchecked = True
        self.most_bytes = max(self.most_bytes, bytes_of(self))
        self._settle()
        if self.shrink_live:
            self._cut()
        self.zeros = count_zeros(self)

    def _set_alive(self, live: Mapping[str, Sequence[int]]) -> None:
        """Keep these units of these groups."""
        for name, units in live.items():
            self.alive[name] = torch.zeros_like(self.alive[name])
            self.alive[name][list(units)] = True

    def _select_weights(self, i: int) -> None:
        pruner, names = self.pruners[i], self.weights[i]
        assert isinstance(pruner, WeightPruner)
        scores = self.scorer.take_weights(self._score(i), names)
        fraction = (pruner.schedule or self.schedule).fraction(self.steps, self.total_steps)
        held, tensors = self.given if i in self.reviving else self.masks, named_tensors(self.model)
        masks, self._thresholds[names[0]] = mask_weights(pruner, scores, held, tensors, fraction)
        self.masks.update(masks)

    # what may come back
    @property
    def follows_weights(self) -> bool:
        """Whether a run needs more of the past than zeros tell: values of what is masked, or how weights moved."""
        return bool(self.reviving) or any("movement" in self._score(i).needs for i in self.weights)

    def _settle(self) -> None:
        """See to the gates; once nothing changes any more, stop watching and give back what was kept for it."""
        if self.finished:
            self.shadows.clear()
            self.scorer.movement.clear()
            self.reviving = set()
            if self.watcher is not None:
                self.watcher.stop()
        if self.watcher is not None:
            names = {group.name for i in self.reviving & {*self.chosen} for group in self.chosen[i]}
            masked = {name: ~self.alive[name] for name in names & self.watcher.means["gate"].keys()}
            self.watcher.shut = {name: gone for name, gone in masked.items() if gone.any()}

    # scores
    def _watch(self) -> GateWatcher | None:
        needing = [
            i for i, chosen in self.chosen.items() if any(need.startswith("gate") for need in self._score(i).needs)
        ]
        if not needing:
            return None
        groups = [group for i in needing for group in self.chosen[i]]
        watcher = GateWatcher(self.model, groups)
        if self.data is None:
            watcher.start()
        return watcher

    def _unit_scores(self, due: Sequence[int]) -> dict[str, Tensor]:
        """Return ``(units,)`` scores of every group of the pruners that are due, checked to be finite."""
        needs = {need for i in due for need in self._score(i).needs}
        scoring = due if self.target is None else self.chosen
        units = [(self._score(i), group) for i in scoring for group in self._live(self.chosen.get(i, []))]
        ready: dict[str, Tensor] = {}
        if self.data is not None and needs - {"noise"}:
            compute_masked(self)
            wanted = [(self._score(i), names) for i, names in self.weights.items()]
            ready = self.scorer.calibrate(self.data, self.loss, wanted, units)
            hide_masked(self)
        if self.watcher is not None:
            self.watcher.synchronize()
        ready |= {one.name: self.scorer.units(score, one) for score, one in units if one.name not in ready}
        return checks.checked_scores({one.name: ready[one.name] for _, one in units})

    def _score(self, i: int) -> Score:
        return self.pruners[i].resolve_score()

    # structure
    def _live(self, groups: Sequence[Group]) -> list[Group]:
        """Return these groups as they are in the live model, without those that left with their layer."""
        by_name = {group.name: group for group in self.groups}
        return [by_name[group.name] for group in groups if group.name in by_name]

    def _kinds(self) -> set[str]:
        """Return the kinds that a report shows: those that were chosen from, and what every transformer has."""
        chosen = {group.kind for groups in self.chosen.values() for group in groups}
        return {"head", "kv_group", "neuron", *chosen}

    def _live_kept(self) -> dict[str, list[int]]:
        return {name: mask.nonzero().view(-1).tolist() for name, mask in self.alive.items()}

    def _vectors(self) -> Any:
        return keep_vectors(self.groups, self._live_kept(), live_shapes(self.model))

    def _macs_now(self) -> int:
        return matrix_entries(self.groups, live_shapes(self.model), self._vectors())

    def _cut(self) -> None:
        """Remove masked units physically; scores, masks and moments follow."""
        if not self.groups:
            return
        kept = close_kept(self.groups, self._live_kept())
        vectors, tensors = self._vectors(), named_tensors(self.model)
        before, self.record = self.record, self.record.after(self.groups, kept)
        if self.record:
            note_dense(self.model, self.groups, before)
        cut(self.model, self.groups, kept, optimizer=self.optimizer)
        write_record(self.model, self.record)
        for (name, dim), vector in vectors.items():
            if name in self.masks:
                index = vector.nonzero().view(-1).to(self.masks[name].device)
                self.masks[name] = self.masks[name].index_select(dim, index)
        # layers behind a removed one have another name now
        live = {id(one): name for name, one in named_tensors(self.model).items()}
        now = {name: live[id(one)] for name, one in tensors.items() if id(one) in live}
        self.masks = {now[name]: mask for name, mask in self.masks.items() if name in now}
        self.weights = {i: [now[name] for name in names if name in now] for i, names in self.weights.items()}
        self.groups = find_groups(self.model)
        self.alive = {group.name: torch.ones(group.units, dtype=torch.bool) for group in self.groups}
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher.regroup(self.groups, kept)
            if not self.finished and self.data is None:
                self.watcher.start()
        self._leaky = False
