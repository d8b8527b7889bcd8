"""The report of a run that has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..live import LiveModel, Masking
from ..masks import count_masked
from ..plan import annotate
from ..report import Report, count
from .budgets import Budget
from .numbers import Numbers
from .tasks import Tasks


def report_of(
    live: LiveModel,
    masking: Masking,
    numbers: Numbers,
    tasks: Tasks,
    budget: Budget | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Report:
    """Return what was kept, in the dense model's numbers, and what the model costs now; note masks of weights."""
    kinds = {"head", "kv_group", "neuron", *(kind for task in tasks for kind in task.kinds)}
    shown = [group for group in live.groups if group.kind in kinds]
    dense_numbers = {group.name: live.record.dense_numbers(group) for group in shown}
    kept = {name: [dense[unit] for unit in masking.units.kept[name]] for name, dense in dense_numbers.items()}
    tensors, masked = live.tensors, dict[str, float]()
    for name, mask in masking.weights.items():
        gone, of = count_masked(tensors, masking.units.vectors, {name: mask})
        masked[name] = round(gone / of, 6) if of else 0.0
    if masking.weights:
        sparsity = numbers.zeros.sparsity_weight
        annotate(live.model, weights={"sparsity": sparsity, "parameters": len(masking.weights)})
    units = {group.name: live.record.dense_units(group) for group in shown}
    settings = {**numbers.logs(), **(budget.facts() if budget is not None else {}), **(facts or {})}
    pruned = count(live.model, live.groups)
    return Report(kept, units, numbers.dense, pruned, settings=settings, masked=masked)
