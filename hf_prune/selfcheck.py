"""A self-check for models that nobody has tried: a random plan on a copy, masked against shrunk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import find_groups, inspect_model
from .depth import check_depth
from .errors import PruningError
from .plan import parent_name, read_record
from .removal import mask_units, shrink
from .structure import Group

TOLERANCE = 2e-4  # of the largest output, in float32


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Args:
        differences: Kind of unit (and ``"all"`` together) to the largest difference between masked and shrunk, as a
            share of the largest output.
        effects: The same keys to the difference between dense and masked: 0 says that these inputs never pass what
            was removed, as text never passes a vision tower.
        failures: Kind of unit to what went wrong where a model could not be shrunk or run at all.
        refusals: Place to the reason why its units are not offered.
        tolerance: The largest difference that passes.
    """

    differences: dict[str, float]
    effects: dict[str, float]
    failures: dict[str, str]
    refusals: dict[str, str]
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether every kind that is offered can be trusted."""
        return not self.failures and all(value <= self.tolerance for value in self.differences.values())


def verify(model: nn.Module, inputs: Mapping[str, Any], *, seed: int = 0) -> VerifyReport:
    """Check on copies of a model that removing random units equals masking them, kind by kind and all together.

    Args:
        model: A model of a type that you do not know to be safe; it is not changed.
        inputs: What its forward takes; outputs on these are compared, in evaluation mode.
        seed: Of the random plan.

    Returns:
        The differences; ``passed`` says whether all are within the tolerance.

    Raises:
        UnsupportedModelError: The model offers nothing.

    Example:
        >>> verify(model, tokenizer("a sentence", return_tensors="pt")).passed  # doctest: +SKIP
        True
    """
    groups, record = find_groups(model), read_record(model)
    numbers = {group.name: record.dense_numbers(group) for group in groups}
    kinds = list(dict.fromkeys(group.kind for group in groups))
    differences, effects, failures = dict[str, float](), dict[str, float](), dict[str, str]()
    dense = output_of(copy.deepcopy(model), inputs)
    for name, wanted in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
        live = random_plan(model, [group for group in groups if group.kind in wanted], seed)
        plan = {group: [numbers[group][unit] for unit in units] for group, units in live.items()}
        if not plan:
            continue
        try:
            masked = output_of(mask_units(copy.deepcopy(model), plan), inputs)
            shrunk = output_of(shrink(copy.deepcopy(model), plan), inputs)
            differences[name], effects[name] = relative_difference(masked, shrunk), relative_difference(dense, masked)
        except Exception as error:  # the point is to find out: whatever a model's own code raises
            failures[name] = f"{type(error).__name__}: {error}"
    refusals = {one.place: one.reason for one in inspect_model(model).refusals}
    return VerifyReport(differences, effects, failures, refusals)


def random_plan(model: nn.Module, groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """Draw live units to keep, between one and all but one where a group has several; KV groups and heads agree.

    Of each list of layers one goes that the config can do without, and about a third of all branches.
    """
    draw = torch.Generator().manual_seed(seed)
    plan: dict[str, list[int]] = {}
    for group in groups:
        if group.units and group.traits.is_place:
            if torch.rand((), generator=draw) < 1 / 3:
                plan[group.name] = []
        elif group.traits.holds_places:
            stays = next(_sayable(model, group, draw), None)
            plan.update({group.name: stays} if stays else {})
        elif group.units:
            parts = plan.get(parent_name(group), range(group.parts))
            least = max(1, -(-group.least // group.parts))
            keep = int(torch.randint(least, max(least + 1, group.per_part), (), generator=draw))
            keep = min(group.per_part, -(-keep // group.multiple) * group.multiple)
            plan[group.name] = [
                part * group.per_part + int(unit)
                for part in (parts if group.parts > 1 else range(1))
                for unit in torch.randperm(group.per_part, generator=draw)[:keep].sort().values
            ]
    return plan


def _sayable(model: nn.Module, group: Group, draw: torch.Generator) -> Iterator[list[int]]:
    """Yield what stays when one layer goes, for each layer that a config can do without."""
    for unit in torch.randperm(group.units, generator=draw).tolist() if group.units > 1 else ():
        stays = [other for other in range(group.units) if other != unit]
        try:
            check_depth(model, [group], {group.name: stays})
        except PruningError:
            continue
        yield stays


@torch.no_grad()
def output_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the first floating-point output of a forward in evaluation mode."""
    result = model.eval()(**inputs)
    values = (
        result.values() if isinstance(result, Mapping) else result if isinstance(result, (tuple, list)) else [result]
    )
    return next(one for one in values if torch.is_tensor(one) and one.is_floating_point() and one.ndim).float()


def relative_difference(expected: Tensor, received: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value; infinite where it is no number."""
    difference = float((expected - received).abs().max() / expected.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")
