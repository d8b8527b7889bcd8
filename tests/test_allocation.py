"""From scores to masks, in numbers that a reader can follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from hf_prune import Group, PruningError, Slice, register_allocation
from hf_prune.allocation import ALLOCATIONS, global_by_cost, select_units, select_weights, uniform

SLICES = (Slice("w", 0, 1),)


def select(
    scores: dict[str, list[float]],
    excess: float,
    costs: dict[str, float] | None = None,
    alive: dict[str, list[bool]] | None = None,
    parts: int = 1,
    min_kept: int = 1,
    multiple_of: int = 1,
    allocation: str = "global",
    last: bool = True,
) -> dict[str, list[int]]:
    """Return which units stay."""
    costs = costs or dict.fromkeys(scores, 1.0)
    groups = {name: Group(name, "neuron", len(score), SLICES, parts=parts) for name, score in scores.items()}
    values = ALLOCATIONS[allocation]({name: tensor(score) for name, score in scores.items()}, costs)
    here = {name: tensor((alive or {}).get(name, [True] * len(score))) for name, score in scores.items()}
    limits = dict.fromkeys(scores, min_kept), dict.fromkeys(scores, multiple_of)
    masks = select_units(groups, values, here, costs, excess, min_kept=limits[0], multiple_of=limits[1], last=last)
    return {name: mask.nonzero().view(-1).tolist() for name, mask in masks.items()}


def test_global_divides_scores_by_cost():
    values = global_by_cost({"a": tensor([2.0, 4.0]), "b": tensor([9.0])}, {"a": 2.0, "b": 3.0})
    assert {name: value.tolist() for name, value in values.items()} == {"a": [1.0, 2.0], "b": [3.0]}


def test_uniform_ranks_inside_each_group():
    values = uniform({"a": tensor([30.0, 10.0, 20.0, 40.0]), "b": tensor([[0.2, 0.1]])}, {})
    assert values["a"].tolist() == [0.625, 0.125, 0.375, 0.875]
    assert values["b"].tolist() == [[0.75, 0.25]]


def test_global_takes_the_least_score_per_cost_until_the_budget_is_met():
    """Score per cost: a 1 2 3 4, b 0.5 1.5 (cost 4). Order: b0 (4), a0 (1), then b1 is too dear, a1 (1)."""
    scores, costs = {"a": [1, 2, 3, 4.0], "b": [2.0, 6, 80]}, {"a": 1.0, "b": 4.0}
    assert select(scores, 4, costs) == {"a": [0, 1, 2, 3], "b": [1, 2]}
    assert select(scores, 5, costs) == {"a": [1, 2, 3], "b": [1, 2]}
    assert select(scores, 6, costs) == {"a": [2, 3], "b": [1, 2]}
    assert select(scores, 10, costs) == {"a": [2, 3], "b": [2]}


def test_a_dear_unit_waits_for_a_later_change_and_cheap_ones_do_not_leave_in_its_place():
    """Score per cost: b0 0.5 (cost 4), then a 1 2 3 4. Three to go are too few for b0, and it is b0's turn."""
    scores, costs = {"a": [1, 2, 3, 4.0], "b": [2.0, 6, 80]}, {"a": 1.0, "b": 4.0}
    assert select(scores, 3, costs, last=False) == {"a": [0, 1, 2, 3], "b": [0, 1, 2]}
    assert select(scores, 3, costs, last=True) == {"a": [3], "b": [0, 1, 2]}
    assert select(scores, 5, costs, last=False) == {"a": [1, 2, 3], "b": [1, 2]}


def test_uniform_takes_the_same_share_of_every_group():
    scores = {"a": [1.0, 2, 3, 4], "b": [100.0, 400, 300, 200]}
    assert select(scores, 4, allocation="uniform") == {"a": [2, 3], "b": [1, 2]}
    assert select(scores, 4, allocation="global") == {"a": [3], "b": [1, 2, 3]}


def test_no_excess_removes_nothing():
    assert select({"a": [1.0, 2]}, 0) == {"a": [0, 1]}
    assert select({"a": [1.0, 2]}, -3) == {"a": [0, 1]}


def test_the_budget_is_overshot_by_less_than_the_smallest_unit():
    assert select({"a": [1.0, 2, 3]}, 5, {"a": 4.0}) == {"a": [2]}


def test_a_dear_unit_leaves_where_no_cheap_one_can():
    """One unit of a may leave; what is then still to go is less than a unit of b."""
    assert select({"a": [1.0, 2], "b": [30.0, 20, 10]}, 3, {"a": 1.0, "b": 4.0}) == {"a": [1], "b": [0, 1]}


def test_min_kept_stays_in_every_group():
    assert select({"a": [1.0, 2, 3], "b": [10.0, 20]}, 100) == {"a": [2], "b": [1]}
    assert select({"a": [1.0, 2, 3], "b": [10.0, 20]}, 100, min_kept=2) == {"a": [1, 2], "b": [0, 1]}


def test_kept_units_are_a_multiple():
    scores = {"a": [1.0, 2, 3, 4, 5, 6], "b": [7.0, 8, 9, 10]}
    assert select(scores, 1, multiple_of=4) == {"a": [2, 3, 4, 5], "b": [0, 1, 2, 3]}
    assert select(scores, 100, multiple_of=2) == {"a": [4, 5], "b": [2, 3]}
    assert select(scores, 3, multiple_of=2)["a"] == [4, 5]


def test_parts_keep_equally_many():
    """Two parts of three units: each time the least of either part leaves, together."""
    scores = {"a": [3.0, 1, 2, 10, 30, 20]}
    assert select(scores, 2, parts=2) == {"a": [0, 2, 4, 5]}
    assert select(scores, 4, parts=2) == {"a": [0, 4]}
    assert select(scores, 99, parts=2) == {"a": [0, 4]}


def test_what_was_removed_stays_removed():
    assert select({"a": [9.0, 1, 2, 3]}, 1, alive={"a": [False, True, True, True]}) == {"a": [2, 3]}


def test_a_part_that_is_gone_stays_gone():
    alive = {"a": [False, False, True, True]}
    assert select({"a": [9.0, 9, 2, 1]}, 1, alive=alive, parts=2) == {"a": [2]}


def test_earlier_units_leave_first_among_equals():
    assert select({"a": [1.0, 1, 1, 1]}, 2) == {"a": [2, 3]}


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(0, 12),
    st.integers(1, 3),
)
def test_exactly_the_excess_leaves_where_units_cost_one(scores, excess, min_kept):
    by_name = {f"g{i}": score for i, score in enumerate(scores)}
    kept = select(by_name, excess, min_kept=min_kept)
    possible = sum(max(0, len(score) - min_kept) for score in scores)
    assert sum(map(len, scores)) - sum(map(len, kept.values())) == min(excess, possible)


def weights(values: dict[str, Tensor], keep: int) -> dict[str, list[int]]:
    return {name: mask.int().tolist() for name, mask in select_weights(values, keep).items()}


def test_weights_by_hand():
    values = {"a": tensor([[1.0, 5], [2, 8]]), "b": tensor([6.0, 3])}
    assert weights(values, 3) == {"a": [[0, 1], [0, 1]], "b": [1, 0]}
    assert weights(values, 6) == {"a": [[1, 1], [1, 1]], "b": [1, 1]}
    assert weights(values, 1) == {"a": [[0, 0], [0, 1]], "b": [0, 0]}
    assert weights(values, 0) == {"a": [[0, 0], [0, 0]], "b": [0, 0]}


def test_among_equal_weights_the_earlier_ones_stay():
    assert weights({"a": tensor([1.0, 1, 1, 1]), "b": tensor([1.0, 2])}, 3) == {"a": [1, 1, 0, 0], "b": [0, 1]}


def test_minus_infinity_leaves_first():
    assert weights({"a": tensor([-torch.inf, -5.0, -torch.inf, 0])}, 2) == {"a": [0, 1, 0, 1]}


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=30), st.data())
def test_exactly_as_many_weights_stay(values, data):
    keep = data.draw(st.integers(0, len(values)))
    mask = select_weights({"a": tensor(values)}, keep)["a"]
    assert int(mask.sum()) == keep
    if 0 < keep < len(values):
        assert tensor(values)[mask].min() >= tensor(values)[~mask].max()


def test_own_allocation_is_one_function():
    @register_allocation("last_first")
    def last_first(scores: dict[str, Tensor], costs: dict[str, float]) -> dict[str, Tensor]:
        return {name: -torch.arange(len(score)) for name, score in scores.items()}

    try:
        assert select({"a": [1.0, 2, 3, 4]}, 2, allocation="last_first") == {"a": [0, 1]}
    finally:
        del ALLOCATIONS._entries["last_first"]


def test_unknown_allocation_lists_what_there_is():
    with pytest.raises(PruningError, match="No allocation is named 'globall'. Did you mean 'global'.*uniform"):
        ALLOCATIONS["globall"]
