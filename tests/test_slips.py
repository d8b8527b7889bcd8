"""Plain slips at the front door end in one line that says what was expected, what was received, and what would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build_bert, draw_batch

import hf_prune as hp
from hf_prune import HeadPruner, NeuronPruner, PruningCallback, PruningError, Schedule, Target, WeightPruner
from hf_prune.pruners import PRUNERS
from hf_prune.scores import SCORES

L1 = {"sparsity": 0.5, "score": "l1"}
HALF = Target(macs=0.5)


def pruning(model: Any, pruners: Any = None, schedule: Any = None, **changes: Any) -> Any:
    given = {"total_steps": 4, **changes}
    return hp.Pruning(model, pruners or NeuronPruner(**L1), schedule, **given)


SLIPS = {
    "a name for a model": (lambda m, p: hp.prune("gpt2", NeuronPruner(**L1)), "model must be.*from_pretrained.*'gpt2'"),
    "a class for a model": (lambda m, p: hp.prune(type(m), NeuronPruner(**L1)), "class BertForSequence"),
    "names for pruners": (lambda m, p: hp.prune(m, ["heads"]), r"HeadPruner\(\).*Received: 'heads'"),
    "a name for a pruner": (lambda m, p: hp.prune(m, "heads"), r"HeadPruner\(\).*Received: 'heads'"),
    "a class for a pruner": (lambda m, p: hp.prune(m, HeadPruner), r"HeadPruner\(\).*Received: class HeadPruner"),
    "swapped": (lambda m, p: hp.prune(NeuronPruner(**L1), m), "model must be.*Received: NeuronPruner"),
    "a number for a target": (lambda m, p: hp.prune(m, HeadPruner(), target=0.5), r"Target\(macs=0.5\).*Received: 0.5"),
    "a text for a sparsity": (lambda m, p: NeuronPruner(sparsity="half"), "sparsity.*Received: 'half'"),
    "a tensor for data": (
        lambda m, p: hp.prune(m, NeuronPruner(sparsity=0.5), data=torch.ones(2)),
        "data must.*Tensor",
    ),
    "one batch for data": (lambda m, p: hp.prune(m, NeuronPruner(sparsity=0.5), data=draw_batch(m)), r"data=\[batch\]"),
    "lists for batches": (
        lambda m, p: hp.prune(m, NeuronPruner(sparsity=0.5), data=[[1, 2]]),
        r"batch must be a dict.*Received: \[1, 2\]",
    ),
    "wrong keys": (lambda m, p: hp.prune(m, NeuronPruner(sparsity=0.5), data=[{"x": torch.ones(1)}]), "'x'"),
    "no labels": (
        lambda m, p: hp.prune(m, NeuronPruner(sparsity=0.5), data=[{"input_ids": torch.ones(1, 2).long()}]),
        "labels",
    ),
    "a text for a schedule": (lambda m, p: pruning(m, None, "cubic"), r"Schedule\('cubic'\).*Received: 'cubic'"),
    "no steps": (lambda m, p: pruning(m, total_steps=0), "total_steps must be.*Received: 0"),
    "half a step": (lambda m, p: pruning(m, total_steps=2.5), "total_steps must be.*Received: 2.5"),
    "an unknown allocation": (lambda m, p: pruning(m, NeuronPruner(allocation="globl", **L1)), "Did you mean 'global'"),
    "an unknown score": (lambda m, p: pruning(m, NeuronPruner(sparsity=0.5, score="tailor")), "Did you mean 'taylor'"),
    "an unknown schedule": (lambda m, p: pruning(m, None, Schedule("cubik")), "Did you mean 'cubic'"),
    "its own schedule": (
        lambda m, p: pruning(m, NeuronPruner(schedule=Schedule("cubik"), **L1)),
        "Did you mean 'cubic'",
    ),
    "no optimizer": (lambda m, p: pruning(m, optimizer=m), "optimizer must be.*Received: BertFor"),
    "a callback of names": (lambda m, p: PruningCallback(["heads"]), r"HeadPruner\(\).*Received: 'heads'"),
    "a callback of a class": (lambda m, p: PruningCallback(WeightPruner), "Received: class WeightPruner"),
    "a callback's target": (lambda m, p: PruningCallback(HeadPruner(), target=0.5), r"Target\(macs=0.5\)"),
    "a callback's schedule": (lambda m, p: PruningCallback(HeadPruner(), "cubic"), r"Schedule\('cubic'\)"),
    "attached to a model": (lambda m, p: PruningCallback(HeadPruner(), target=HALF).attach(m), "needs a Trainer"),
    "no folder to load": (lambda m, p: hp.load_pruned(p / "nowhere"), "nowhere"),
    "a model to load": (lambda m, p: hp.load_pruned(m), "path_or_repo must be.*Received: BertFor"),
    "a name to save": (lambda m, p: hp.save_pruned("gpt2", p / "out"), "model must be.*Received: 'gpt2'"),
    "swapped to save": (lambda m, p: hp.save_pruned(p / "out", m), "model must be.*Received: .*Path"),
    "no path to save to": (lambda m, p: hp.save_pruned(m, None), "path must be.*Received: None"),
    "a name to shrink": (lambda m, p: hp.shrink("x"), "model must be.*Received: 'x'"),
    "a list to shrink to": (lambda m, p: hp.shrink(m, [0, 1]), "kept must be.*Received: "),
    "a name to mask": (lambda m, p: hp.mask_units("x", {}), "model must be.*Received: 'x'"),
    "a name to find in": (lambda m, p: hp.find_groups("gpt2"), "model must be.*Received: 'gpt2'"),
    "a kind for kinds": (lambda m, p: hp.find_groups(m, "head"), r"kinds.*Received: 'h"),
    "a name to measure": (lambda m, p: hp.measure("x"), "Received: 'x'"),
    "a name to verify": (lambda m, p: hp.verify("gpt2", {}), "model must be.*Received: 'gpt2'"),
    "nothing to export": (lambda m, p: hp.export_onnx(p / "nowhere", p / "onnx"), "nowhere"),
    "a class to merge": (lambda m, p: hp.merge_adapters("x"), "Received: "),
    "a name to adopt": (lambda m, p: hp.adopt_torch_masks("x"), "model must be.*Received: 'x'"),
    "shapes of a name": (lambda m, p: hp.adopt_shapes("x"), "model must be.*Received: 'x'"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line_and_nothing_is_half_done(slip, tmp_path):
    act, words = SLIPS[slip]
    model = build_bert()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(PruningError, match=words):
        act(model, tmp_path)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sort", sorted({PRUNERS[name].made for name in PRUNERS}, key=str), ids=lambda sort: sort.__name__
)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"score": "tailor"}, "score: No score is named 'tailor'. Did you mean 'taylor'"),
        ({"allocation": "globl"}, "allocation: No allocation is named 'globl'. Did you mean 'global'"),
        ({"rule": "rigle"}, "rule: No rule is named 'rigle'. Did you mean 'rigl'"),
        ({"schedule": {"kind": "cubik"}}, "schedule: No schedule is named 'cubik'. Did you mean 'cubic'"),
    ],
)
def test_a_typo_in_a_name_is_found_where_it_stands(sort, given, words):
    with pytest.raises(PruningError, match=f"{sort.__name__}: {words}"):
        sort(**given)


def test_a_typo_in_a_pattern_or_a_schedule_is_found_where_it_stands():
    with pytest.raises(
        PruningError, match="WeightPruner: pattern: No pattern is named 'unstructurd'. Did you mean 'un"
    ):
        WeightPruner(pattern="unstructurd")
    with pytest.raises(PruningError, match="Schedule: No schedule is named 'cubik'. Did you mean 'cubic'"):
        Schedule("cubik")


def test_a_score_of_units_is_none_of_weights_and_one_of_ones_own_is_known_once_it_is_registered(monkeypatch):
    with pytest.raises(PruningError, match="WeightPruner: score: score 'block_influence' is for units"):
        WeightPruner(score="block_influence")
    monkeypatch.setattr(SCORES, "_entries", dict(SCORES._entries))
    for sort in (WeightPruner, NeuronPruner):
        with pytest.raises(PruningError, match="No score is named 'my_own'"):
            sort(score="my_own")
    hp.register_score("my_own")(lambda weight: weight.abs())
    for sort in (WeightPruner, NeuronPruner):
        assert hp.prune(build_bert(), sort(sparsity=0.5, score="my_own"))


def test_the_folder_of_a_run_is_no_model_but_names_those_in_it(tmp_path):
    hp.save_pruned(build_bert(), tmp_path / "run" / "model")
    told = rf"it has no config.json; models are in '{tmp_path}/run/model'"
    with pytest.raises(PruningError, match=told):
        hp.load_pruned(tmp_path / "run")
    with pytest.raises(PruningError, match=told):
        hp.push_pruned(tmp_path / "run", "me/it", dry_run=True)
    with pytest.raises(PruningError, match="there is no such folder"):
        hp.push_pruned(tmp_path / "ran", "me/it", dry_run=True)
