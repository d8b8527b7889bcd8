"""What the table says of a kind is what happens to every group of it that tiny models offer."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace
from functools import cache
from typing import Any, get_args

import pytest
import zoo
from models import build_bert, build_llama
from torch import Tensor

import hf_prune
from hf_prune import (
    ChannelPruner,
    ExpertPruner,
    Group,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningError,
    find_groups,
    mask_units,
    shrink,
)
from hf_prune.kinds import KINDS, Kind, register_kind
from hf_prune.plan import close_kept, parent_in
from hf_prune.removal import unmasked_units
from hf_prune.skipping import is_only_masked

PRUNERS = {
    "head": HeadPruner(sparsity=0.5, unit="head", reversible=True),
    "kv_group": HeadPruner(sparsity=0.5, unit="kv_group", reversible=True),
    "neuron": NeuronPruner(sparsity=0.5, reversible=True),
    "expert": ExpertPruner(sparsity=0.5, reversible=True),
    "channel": ChannelPruner(sparsity=0.5, reversible=True),
    "branch": LayerPruner(sparsity=0.5, unit="branch", reversible=True),
    "layer": LayerPruner(sparsity=0.5, unit="layer", reversible=True),
}
BUILD = {
    "bert": build_bert,
    "llama": build_llama,
    "mixtral": lambda: zoo.build("mixtral", "causal_lm"),
    "resnet": lambda: zoo.build("resnet", "image_classification"),
}


@cache
def built(name: str) -> Any:
    return BUILD[name]()


def offered() -> list[tuple[str, Kind]]:
    return [(name, kind) for name in BUILD for kind in dict.fromkeys(one.kind for one in find_groups(built(name)))]


def of_kind(name: str, kind: Kind) -> list[Group]:
    return find_groups(built(name), kinds=[kind])


def half(group: Group) -> list[int]:
    """Return the first units of each part: at least as many as must stay, and not all."""
    left = max(1, group.per_part // 2, -(-group.least // group.parts))
    return [unit for unit in range(group.units) if unit % group.per_part < left]


def plans(name: str, kind: Kind) -> list[dict[str, list[int]]]:
    """Return plans that take units of a kind: some everywhere; one group whole; whatever lies in its place."""
    groups, there = of_kind(name, kind), find_groups(built(name))
    empty = [one for one in groups if not one.least][:1]
    inside = [one for one in there if KINDS[kind].is_place and one.place == groups[0].place and not one.least]
    found = [{one.name: half(one) for one in groups}, {one.name: [] for one in empty}]
    found.append({one.name: [] for one in inside if one.kind != kind})
    return [plan for plan in found if plan]


def outputs(model: Any) -> Tensor:
    return zoo.outputs(copy.deepcopy(model).eval(), zoo.inputs(model))


def test_every_kind_has_a_row_that_nobody_changes():
    assert tuple(KINDS)[: len(get_args(Kind))] == get_args(Kind)  # other tests may have added theirs
    assert hf_prune.Kind == Kind
    with pytest.raises(FrozenInstanceError):
        KINDS["head"].may_return = False  # type: ignore[misc]
    with pytest.raises(PruningError, match="A kind named 'head' is registered already"):
        register_kind("head", KINDS["layer"])


def test_tiny_models_offer_every_kind():
    assert {kind for _, kind in offered()} == set(get_args(Kind)) == set(PRUNERS)


def lost(groups: list[Group], kept: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return what is left of groups that have lost units."""
    return {one.name: kept[one.name] for one in groups if len(kept.get(one.name, range(one.units))) < one.units}


def zeros_tell(name: str, kind: Kind, plan: dict[str, list[int]]) -> bool:
    """Whether a plan, and what it does, is read back from the weights of a masked model."""
    there = find_groups(built(name))
    masked, fresh = mask_units(copy.deepcopy(built(name)), plan), BUILD[name]()
    fresh.load_state_dict(masked.state_dict())
    bare = [replace(one, least=0, multiple=1) for one in there]
    told = unmasked_units(fresh, [one for one in bare if KINDS[one.kind].zeros_tell or one.kind == kind])
    expected, received = lost(there, close_kept(there, plan)), lost(bare, close_kept(bare, told))
    return received == expected and bool((outputs(fresh) - outputs(masked)).abs().max() < 1e-5)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_zeros_tell_a_mask_where_the_table_says_so(kind):
    models = [name for name, other in offered() if other == kind]
    assert all(zeros_tell(name, kind, plan) for name in models for plan in plans(name, kind)) == KINDS[kind].zeros_tell


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_reversible_pruner_is_taken_where_the_table_says_so(kind):
    taken = []
    for name in [name for name, other in offered() if other == kind]:
        try:
            taken.append(bool(Pruning(copy.deepcopy(built(name)), PRUNERS[kind], total_steps=10).tasks.units))
        except PruningError as error:  # also of neurons of stacked experts, which no Linear reads
            taken.append("can come back" not in str(error))
    assert any(taken) == KINDS[kind].may_return


def test_what_may_return_is_told_by_zeros_and_masked_by_nothing_else():
    for traits in KINDS.values():
        assert traits.zeros_tell or not traits.may_return
        assert traits.masked_by == "zeros" or not traits.zeros_tell


@pytest.mark.parametrize(("name", "kind"), offered())
def test_a_mask_beside_zeros_is_where_the_table_says(name, kind):
    groups = of_kind(name, kind)
    model = mask_units(copy.deepcopy(built(name)), {one.name: half(one) for one in groups})
    gone = [path for one in groups for unit, path in enumerate(one.modules) if unit not in half(one)]
    inside = tuple(f"{path}." for path in gone)
    found = {path for path, module in model.named_modules() if is_only_masked(module) and not path.startswith(inside)}
    expected = {"zeros": [], "skip": gone, "router": [one.core for one in groups]}
    assert found == set(expected[KINDS[kind].masked_by])


@pytest.mark.parametrize(("name", "kind"), offered())
def test_groups_are_called_and_lie_as_the_table_says(name, kind):
    there, traits = find_groups(built(name)), KINDS[kind]
    for group in of_kind(name, kind):
        beside = [one for one in there if one.place == group.place and one.name != group.name]
        assert group.name.rpartition(".")[2] == traits.called
        assert group.gate == ("input" if group.read else traits.gate)
        assert not group.modules or traits.is_module
        if traits.is_place:
            assert close_kept(there, {group.name: []}).items() >= {one.name: [] for one in beside if one.read}.items()
        if traits.holds_places:
            assert any(one.name.startswith(f"{group.name}.0.") for one in there)
        if parent_in({one.name for one in there}, group):
            assert [one.kind for one in there if one.name == parent_in({one.name}, group)] == [traits.inside]


def test_gates_of_blocks_without_output_projections_are_on_their_output():
    gates = {one.name: one.gate for one in find_groups(built("mixtral"), kinds=["branch", "layer"])}
    assert gates == {
        **{f"layers.{i}.attention.branch": "input" for i in range(2)},
        **{f"layers.{i}.experts.branch": "output" for i in range(2)},
        "layers": "change",
    }


@pytest.mark.parametrize(("name", "kind"), offered())
def test_a_stock_config_says_even_counts_under_the_tables_names_alone(name, kind):
    groups = of_kind(name, kind)
    small = shrink(copy.deepcopy(built(name)), {one.name: half(one) for one in groups})
    before, after = (one.config.to_dict() for one in (built(name), small))
    changed = {key for key in after if before.get(key) != after[key]} - {"pruning_config"}
    if not KINDS[kind].holds_places:  # of these LAYER_COUNTS has the names, by tower
        assert changed <= {one for traits in KINDS.values() for one in traits.config_counts}  # KV groups take heads
        assert {after[one] for one in changed} <= {one.units for one in find_groups(small)}
        if KINDS[kind].config_counts and small.config.pruning_config["stock"]:
            assert changed & {*KINDS[kind].config_counts}
