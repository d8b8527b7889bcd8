"""Settings that contradict each other are found before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from .. import given
from ..errors import PruningError
from ..pruners import LayerPruner, Pruner, Target, UnitPruner, WeightPruner
from ..schedules import SCHEDULES, Schedule
from ..sharding import any_sharded
from ..structure import Group


def check_kinds(model: Any, schedule: Any, target: Any, total_steps: Any, optimizer: Any, data: Any) -> None:
    """Every argument is of its kind."""
    given.check_model(model)
    check_when_and_how_much(schedule, target)
    given.check_given("total_steps", total_steps, Integral, "a whole number of optimizer steps, at least 1")
    if total_steps < 1:
        raise PruningError(
            f"total_steps must be a whole number of optimizer steps, at least 1. Received: {total_steps}"
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise PruningError(f"optimizer must be torch's, or one like it. Received: {given.told(optimizer)}")
    if data is not None:
        given.check_data(data)


def check_when_and_how_much(schedule: Any, target: Any) -> None:
    """Settings are objects, not their names or numbers."""
    name = f"{schedule!r:.40}" if isinstance(schedule, str) else "'cubic'"
    number = f"{target:g}" if isinstance(target, float) and 0 < target <= 1 else "0.5"
    given.check_given("schedule", schedule, (Schedule, type(None)), f"a Schedule, such as Schedule({name})")
    given.check_given("target", target, (Target, type(None)), f"a Target, such as Target(macs={number})")


def check_settings(pruners: Sequence[Pruner], target: Target | None, schedule: Schedule) -> None:
    """Each pruner has one source of how much to remove: its own sparsity, or the target; and every name is known."""
    if not pruners:
        raise PruningError("pruners must name at least one. Received: none")
    for pruner in pruners:
        SCHEDULES[(pruner.schedule or schedule).kind]
        pruner.resolve_score()
        pruner.allocate()
        name, structured = type(pruner).__name__, isinstance(pruner, UnitPruner)
        if structured and target is not None and (pruner.sparsity is not None or pruner.schedule is not None):
            raise PruningError(
                f"With a target, {name} leaves sparsity and schedule to it. Received: sparsity={pruner.sparsity}"
            )
        if pruner.sparsity is None and (target is None or not structured):
            raise PruningError(
                f"{name} needs a sparsity in [0, 1){' or a target' if structured else ''}. Received: None"
            )
    if target is not None and not any(isinstance(pruner, UnitPruner) for pruner in pruners):
        raise PruningError(
            "target is for structured pruners, such as HeadPruner and NeuronPruner. Received: none of them"
        )


def check_shards(model: nn.Module, shrink_live: bool) -> None:
    """Parameters are whole, or sharded by FSDP2."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise PruningError(
            "FSDP's first version flattens parameters: use fully_shard (fsdp_version: 2). Received: FSDP 1"
        )
    if shrink_live and any_sharded(model.parameters()):
        raise PruningError("shrink_live needs whole parameters. Received: a model sharded by FSDP")


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


def check_disjoint(chosen: Mapping[int, Sequence[Group]], target: Target | None) -> None:
    """No group is chosen from twice."""
    names = [group.name for groups in chosen.values() for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise PruningError(f"Two pruners choose from '{twice}': part them by include and exclude.")
    parents = {group.place for groups in chosen.values() for group in groups if group.kind == "kv_group"}
    inside = {group.place for groups in chosen.values() for group in groups if group.kind == "head"}
    if target is not None and parents & inside:
        raise PruningError("A target takes KV groups or the heads inside them, not both. Received: two HeadPruners")


def checked_scores(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scores of which some tell units apart: all zeros say that no gradient has come."""
    if scores and not any(bool(values.any()) for values in scores.values()):
        raise PruningError(
            "Scores of units must not all be zero, or chance would choose: the loss has given no gradient (labels that "
            "are all -100, a frozen loss, an optimizer that has taken no step). Nothing was cut. Received: zeros for "
            f"{len(scores)} groups"
        )
    return scores


_REVIVABLE = ("head", "kv_group", "neuron")  # others are masked by hooks too, or have running statistics


def check_reversible(
    model: nn.Module,
    pruners: Sequence[Pruner],
    chosen: Mapping[int, Sequence[Group]],
    weights: Mapping[int, Sequence[str]],
    shrink_live: bool,
    swaps: bool,
) -> None:
    """What may come back is still there, and tells by its score when it should."""
    for i, pruner in enumerate(pruners):
        name, score, revives = type(pruner).__name__, pruner.resolve_score(), pruner.may_revive()
        if swaps and revives:
            raise PruningError(
                "A schedule-free optimizer keeps two sets of weights, and what is masked leaves both: masks must be "
                f"final (reversible=False). Received: {name} with score='{score.name}'"
            )
        if shrink_live and (revives or "movement" in score.needs):
            raise PruningError(
                "shrink_live (of a callback shrink_during_training) removes for good, so masks must not be reversible "
                f"and no score follows single weights. Received: {name} with score='{score.name}'"
            )
        if isinstance(pruner, UnitPruner) and "movement" in score.needs:
            raise PruningError(f"Score '{score.name}' follows single weights: use WeightPruner. Received: {name}")
        if revives and isinstance(pruner, UnitPruner):
            _check_units_come_back(model, name, score.name, score.needs, chosen[i])
        elif revives and isinstance(pruner, WeightPruner):
            others = {one for k, names in weights.items() if k != i for one in names}
            shared = next((one for one in weights[i] if one in others), None)
            if shared:
                raise PruningError(
                    f"A reversible WeightPruner must choose from '{shared}' alone. Received: two pruners"
                )


def _check_units_come_back(
    model: nn.Module, name: str, score: str, needs: Sequence[str], groups: Sequence[Group]
) -> None:
    if "gradient" in needs:
        raise PruningError(
            f"Score '{score}' needs gradients of weights, and those of a masked unit are zero: reversible units take a "
            f"score of gates ('taylor', 'movement') or of weights alone ('l1', 'l2'). Received: {name}"
        )
    if hasattr(model, "peft_config"):
        raise PruningError(f"Units of a model with adapters cannot come back. Received: a reversible {name}")
    for group in groups:
        readers = [model.get_submodule(part.parameter.rpartition(".")[0]) for part in group.read]
        if group.kind not in _REVIVABLE or not readers or not all(map(_is_linear, readers)):
            raise PruningError(
                "Only heads, KV groups and neurons that a Linear reads, and single weights, can come back. "
                f"Received: a reversible {name} for '{group.name}'"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
