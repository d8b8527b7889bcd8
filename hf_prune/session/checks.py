"""Settings that contradict each other are found before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .. import given
from ..errors import PruningError
from ..evidence import EVIDENCE
from ..live import LiveModel
from ..optimizers import swaps_weights
from ..patterns import PATTERNS
from ..pruners import LayerPruner, Pruner, UnitPruner, WeightPruner
from ..schedules import SCHEDULES, Schedule
from ..sharding import any_sharded
from ..structure import Group
from ..targets import Target
from ..wrappers import check_no_engine, check_wrappers
from .parts import Part
from .settings import PruningSettings
from .tasks import Task, Tasks


def check_kinds(model: Any, total_steps: Any, optimizer: Any) -> None:
    """Every argument is of its kind."""
    given.check_model(model)
    _check_changeable(model)
    check_no_engine(model, optimizer)
    given.check_given("total_steps", total_steps, Integral, "a whole number of optimizer steps, at least 1")
    if total_steps < 1:
        raise PruningError(
            f"total_steps must be a whole number of optimizer steps, at least 1. Received: {total_steps}"
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise PruningError(f"optimizer must be torch's, or one like it. Received: {given.told(optimizer)}")


def _check_changeable(model: nn.Module) -> None:
    """Weights are such that they can be changed in place, now and when the model is trained again."""
    if torch.is_inference_mode_enabled() or any(one.is_inference() for one in model.parameters()):
        raise PruningError(
            "Pruning changes weights in place, which torch.inference_mode forbids: make or load the model, and prune "
            "it, outside of that (torch.no_grad is no hindrance). Received: "
            f"{'a call inside of it' if torch.is_inference_mode_enabled() else 'a model that was made inside of it'}"
        )


def has_units(pruners: Sequence[Pruner]) -> bool:
    """Whether any pruner removes units."""
    return any(isinstance(pruner, UnitPruner) for pruner in pruners)


def check_settings(told: PruningSettings) -> None:
    """Each pruner has one source of how much to remove: its own sparsity, or the target; and every name is known."""
    pruners, target = told.pruners, told.target
    if not pruners:
        raise PruningError("pruners must name at least one. Received: none")
    for pruner in pruners:
        SCHEDULES[(pruner.schedule or told.schedule or Schedule()).kind]
        check_measured(pruner, told)
        check_rule(pruner)
        pruner.allocate()
        name, structured = type(pruner).__name__, isinstance(pruner, UnitPruner)
        own = pruner.sparsity if pruner.threshold is None else pruner.threshold
        if structured and target is not None and (own is not None or pruner.schedule is not None):
            key = "sparsity" if pruner.threshold is None else "threshold"
            raise PruningError(f"With a target, {name} leaves {key} and schedule to it. Received: {key}={own}")
        if own is None and (target is None or not structured):
            or_target = ", or a target" if structured else ""
            raise PruningError(f"{name} needs a sparsity in [0, 1) or a threshold{or_target}. Received: None")
        _check_threshold(pruner)
    if target is not None and not has_units(pruners):
        raise PruningError(
            "target is for structured pruners, such as HeadPruner and NeuronPruner. Received: none of them"
        )
    others = [one.allocation for one in pruners if isinstance(one, UnitPruner) and one.allocation != "global"]
    if target is not None and target.budget[0] == "time" and others:
        raise PruningError(
            "A target of time chooses widths over the whole model: allocation='global'. "
            f"Received: {given.told(others[0])}"
        )


def check_measured(pruner: Pruner, told: PruningSettings) -> None:
    """What goes through calibration data by itself has some, in training too."""
    score = pruner.resolve_score()
    if any(EVIDENCE[need].takes == "data" for need in score.needs) and told.data is None:
        raise PruningError(
            f"Score '{score.name}' runs calibration data by itself: pass data=, batches with labels. Received: None"
        )


def _check_threshold(pruner: Pruner) -> None:
    """A threshold says of each weight alone whether it leaves: no pattern, and no rule that counts."""
    if pruner.threshold is None or isinstance(pruner, UnitPruner):
        return
    pattern = getattr(pruner, "pattern", "unstructured")
    if pattern != "unstructured" or pruner.resolve_rule().also:
        raise PruningError(
            "A threshold says of each weight alone whether it leaves: pattern='unstructured', and a rule that counts "
            f"none. Received: pattern={pattern!r}, rule '{pruner.resolve_rule().name}'"
        )


def check_rule(pruner: Pruner) -> None:
    """Units are chosen by groups, so that a rule only says whether they may come back."""
    rule = pruner.resolve_rule()
    if isinstance(pruner, UnitPruner) and not rule.units:
        raise PruningError(
            f"Rule '{rule.name}' chooses single weights: use WeightPruner. Received: {type(pruner).__name__}"
        )


def check_shards(model: nn.Module, told: PruningSettings) -> None:
    """Parameters are whole, or sharded by FSDP2; and where not all is possible, nothing is asked that is not."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise PruningError(
            "FSDP's first version flattens parameters: use fully_shard (fsdp_version: 2). Received: FSDP 1"
        )
    sharded, goes_back = any_sharded(model.parameters()), any(guard.goes_back for guard in told.guards)
    if told.shrink_during_training and sharded:
        raise PruningError(
            "shrink_during_training needs whole parameters: without it masks train under FSDP, and finish() removes "
            "units. Received: a model sharded by FSDP"
        )
    if told.shrink_during_training:
        check_wrappers(model)
    if goes_back and (told.shrink_during_training or sharded):
        raise PruningError(
            "A guard that goes back needs masks of whole parameters: undo=False waits only; or leave "
            "shrink_during_training out. Received: "
            f"{'shrink_during_training' if told.shrink_during_training else 'a model sharded by FSDP'}"
        )
    patterns = [PATTERNS[pruner.pattern] for pruner in told.pruners if isinstance(pruner, WeightPruner)]
    whole = next((pattern for pattern in patterns if not pattern.sharded), None)
    if whole is not None and sharded:
        raise PruningError(f"Pattern '{whole.name}' needs whole parameters. Received: a model sharded by FSDP")


def check_finds_unused(pruners: Sequence[Pruner], finds: bool) -> None:
    """DDP waits for gradients of everything, also of what a masked layer has not run.

    Args:
        pruners: Those of the run.
        finds: Whether DDP looks for parameters that get no gradient; otherwise it raises, in the midst of training.
    """
    emptying = [
        one for one in pruners if isinstance(one, UnitPruner) and (isinstance(one, LayerPruner) or not one.min_kept)
    ]
    if emptying and not finds:
        raise PruningError(
            "Where whole layers or branches go, DDP needs find_unused_parameters=True (of a Trainer "
            f"ddp_find_unused_parameters=True). Received: {type(emptying[0]).__name__} without it"
        )


def check_tasks(tasks: Tasks, live: LiveModel, told: PruningSettings) -> None:
    """No two tasks choose from one place, and what may come back is still there then."""
    chosen = [group for task in tasks for group in live.dense_groups() if group.name in set(task.groups)]
    _check_disjoint(chosen, told.target)
    swaps = swaps_weights(live.optimizer)
    for task in tasks:
        _check_reversible(task, live, swaps, told.shrink_during_training)
        _check_at_once(task, told)
        _check_late(task, told)
    _check_zeros(tasks, live)
    for task in (one for one in tasks.weights if one.rule.returns):
        others = {name for other in tasks.weights if other is not task for name in other.weights}
        shared = next((name for name in task.weights if name in others), None)
        if shared:
            raise PruningError(f"A reversible WeightPruner must choose from '{shared}' alone. Received: two pruners")


def _check_at_once(task: Task, told: PruningSettings) -> None:
    """What says in which order units leave does so for one change of one pruner."""
    if not any(EVIDENCE[need].at_once for need in task.needs):
        return
    allocation = task.pruner.allocation
    for key, bad, received in (
        ("once, by prune() or Schedule('oneshot')", len(task.changes) > 1, f"{len(task.changes)} changes"),
        (
            "by one pruner's own sparsity",
            told.target is not None or len(told.pruners) > 1,
            "a target, or several pruners",
        ),
        ("over all groups, allocation='global'", allocation != "global", f"allocation={given.told(allocation)}"),
    ):
        if bad:
            raise PruningError(
                f"Score '{task.score.name}' removes one unit after the other, {key}. Received: {received}"
            )


def _check_late(task: Task, told: PruningSettings) -> None:
    """A score that is learned beside the model has learned nothing before the first step."""
    if not any(EVIDENCE[need].late for need in task.needs):
        return
    first = task.changes[0]
    if told.data is not None or first < 2:
        got = f"a first change at step {first}" if told.data is None else "data="
        raise PruningError(
            f"Score '{task.score.name}' needs steps that have learned: train with it, from the training batches "
            "themselves (without data=), and let the first change come later than the first step, as by "
            f"Schedule(begin=2). Received: {got}"
        )


def _check_zeros(tasks: Tasks, live: LiveModel) -> None:
    """Units that come back have their last values, so that of their tensors no single weight may begin at zero."""
    returning = {name for task in tasks.units if task.rule.returns for name in task.groups}
    theirs = {part.parameter for group in live.groups if group.name in returning for part in group.slices}
    shared = next(
        (name for task in tasks.weights if task.rule.from_zero for name in task.weights if name in theirs), None
    )
    if shared:
        raise PruningError(
            "Weights that begin at zero and units that come back with their values need tensors of their own. "
            f"Received: both of '{shared}'"
        )


def _check_disjoint(chosen: Sequence[Group], target: Target | None) -> None:
    """No group is chosen from twice."""
    names = [group.name for group in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise PruningError(f"Pruners must choose from different groups: include, exclude. Received: two of '{twice}'")
    places = {(group.kind, group.place) for group in chosen}
    if target is not None and any((group.traits.inside, group.place) in places for group in chosen):
        raise PruningError("A target takes KV groups or the heads inside them, not both. Received: two HeadPruners")


def check_parts(state: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """A pruning state has all parts of a session that have any."""
    missing = next((name for name, part in parts.items() if name not in state and part.state_dict()), None)
    if missing is not None:
        raise PruningError(
            f"The pruning state must be of this model and these pruners: it has no {missing}. Received: {sorted(state)}"
        )


def checked_scores(scores: dict[str, Tensor], alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores of which some tell units apart: all zeros say that no gradient has come, where units are left."""
    left = [values for name, values in scores.items() if alive[name].any()]
    if left and not any(bool(values.any()) for values in left):
        raise PruningError(
            "Scores of units must not all be zero, or chance would choose: the loss has given no gradient (labels that "
            "are all -100, a frozen loss, an optimizer that has taken no step), or a regularisation is too strong. "
            f"Nothing was cut. Received: zeros for {len(scores)} groups"
        )
    return scores


def _check_reversible(task: Task, live: LiveModel, swaps: bool, shrinks: bool) -> None:
    """What may come back is still there, and tells by its score when it should."""
    name, score, revives = type(task.pruner).__name__, task.score, task.rule.returns
    follows = any(EVIDENCE[need].heavy for need in task.needs)
    if swaps and revives:
        raise PruningError(
            "A schedule-free optimizer keeps two sets of weights, and what is masked leaves both: masks must be "
            f"final (reversible=False). Received: {name} with score='{score.name}'"
        )
    if shrinks and revives:
        raise PruningError(
            "shrink_during_training removes for good, so masks must not be reversible. "
            f"Received: {name} with score='{score.name}'"
        )
    if task.structured and follows and score.of == "weight":
        raise PruningError(f"Score '{score.name}' follows single weights: use WeightPruner. Received: {name}")
    if task.structured and revives:
        groups = [group for group in live.groups if group.name in set(task.groups)]
        _check_units_come_back(live.model, task, groups)


def _check_units_come_back(model: nn.Module, task: Task, groups: Sequence[Group]) -> None:
    name = type(task.pruner).__name__
    for group in groups:
        readers = [model.get_submodule(part.parameter.rpartition(".")[0]) for part in group.read]
        if not group.traits.may_return or not readers or not all(map(_is_linear, readers)):
            raise PruningError(
                "Only heads, KV groups and neurons that a Linear reads, and single weights, can come back. "
                f"Received: a reversible {name} for '{group.name}'"
            )
    blind = [need for need in task.needs if EVIDENCE[need].from_data and not EVIDENCE[need].sees_masked]
    if blind and not task.of_step:
        raise PruningError(
            f"Score '{task.score.name}' cannot see what masked units would bring: reversible units take a score of "
            f"gates or activations, or of weights alone ('l1', 'l2'). Received: a reversible {name}"
        )
    if task.of_step:
        raise PruningError(
            f"Score '{task.score.name}' needs gradients of weights, and those of a masked unit are zero: reversible "
            f"units take a score of gates ('taylor', 'movement') or of weights alone ('l1', 'l2'). Received: {name}"
        )
    if hasattr(model, "peft_config"):
        raise PruningError(f"Units of a model with adapters cannot come back. Received: a reversible {name}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
