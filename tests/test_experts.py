"""Experts of mixture-of-experts blocks: masked = never chosen = shrunk = reloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from models import assert_same_weights, training_arguments, units_of
from test_checkpoint import F32
from test_depth import assert_same
from transformers import Trainer

from hf_prune import (
    ExpertPruner,
    HeadPruner,
    Pruning,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    find_groups,
    load_pruned,
    mask_units,
    prune,
    save_pruned,
    shrink,
)

PLAN = {"layers.0.experts": [1, 3], "layers.1.experts": [0, 1, 2]}


def build(seed: int = 0) -> Any:
    return zoo.build("mixtral", "causal_lm", seed=seed)


def experts_of(model: Any) -> list[int]:
    return list(units_of(model, ["expert"]).values())


def test_as_many_experts_stay_as_a_token_is_sent_to():
    groups = find_groups(build(), kinds=["expert"])
    assert [(group.name, group.units, group.least) for group in groups] == [
        ("layers.0.experts", 4, 2),
        ("layers.1.experts", 4, 2),
    ]
    with pytest.raises(PruningError, match=r"At least 2 units of 'layers.0.experts' must stay. Received: \[3\]"):
        shrink(build(), {"layers.0.experts": [3]})


@pytest.mark.parametrize("plan", [PLAN, {name: [0, 2] for name in PLAN}], ids=["uneven", "even"])
def test_masked_is_shrunk_is_reloaded(plan, tmp_path):
    masked, shrunk = mask_units(build(), plan), shrink(build(), plan)
    batch = zoo.inputs(masked)
    assert (zoo.outputs(masked, batch) - zoo.outputs(build(), batch)).abs().max() > 1e-3
    assert experts_of(shrunk) == [len(units) for units in plan.values()]
    assert_same(masked, shrunk)
    reloaded = load_pruned(save_pruned(shrunk, tmp_path), **F32)
    assert_same_weights(shrunk, reloaded)
    assert_same(masked, reloaded)
    assert_same_weights(shrunk, shrink(masked))


def test_two_cuts_compose():
    twice = shrink(shrink(build(), {"layers.0.experts": [1, 2, 3]}), PLAN)
    once = shrink(build(), PLAN)
    assert_same_weights(once, twice)
    assert once.config.pruning_config == twice.config.pruning_config


def test_experts_leave_with_their_layer(tmp_path):
    model = shrink(shrink(build(), PLAN), {"layers": [1]})
    assert model.config.pruning_config["kept"] == {"layers": "1 of 2", "layers.1.experts": "0-2 of 4"}
    assert_same_weights(model, load_pruned(save_pruned(model, tmp_path), **F32))


def test_generation_is_the_same_token_for_token(tmp_path):
    masked, shrunk = mask_units(build(), PLAN), shrink(build(), PLAN)
    ids = torch.randint(50, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    models = [masked, shrunk, load_pruned(save_pruned(shrunk, tmp_path), **F32)]
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    texts = [model.generate(ids, **asked).tolist() for model in models]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("score", ["l1", "random"])
def test_prune_at_once(score):
    model, masked = build(), build()
    report = prune(model, ExpertPruner(sparsity=0.25, score=score))
    assert sum(experts_of(model)) == 6
    assert prune(masked, ExpertPruner(sparsity=0.25, score=score), shrink=False).kept == report.kept
    assert_same(masked, model)


@pytest.mark.parametrize("score", ["l1", "taylor"])
def test_a_quiet_expert_leaves_by_all_that_it_owns(score):
    model = build()
    for layer, quiet in zip(model.model.layers, (1, 2)):
        experts = next(module for name, module in layer.named_modules() if name.endswith("experts"))
        tensors = (
            experts[quiet].parameters() if hasattr(experts, "__getitem__") else (t[quiet] for t in experts.parameters())
        )
        for tensor in tensors:
            tensor.data.mul_(0.05)
    data = [{"input_ids": one, "labels": one} for one in zoo.inputs(model, rows=8)["input_ids"].split(2)]
    kept = prune(model, ExpertPruner(sparsity=0.25, score=score), data=data).kept
    assert [kept[name] for name in PLAN] == [[0, 2, 3], [0, 1, 3]]


def test_experts_have_no_gates_so_that_all_units_are_scored_by_weights():
    pruning = Pruning(build(), [HeadPruner(), ExpertPruner()], target=Target(macs=0.5), total_steps=9)
    assert {task.score.of for task in pruning.tasks} == {"weight"}
    assert [*pruning.evidence] == ["gradient"]
    heads = Pruning(build(), HeadPruner(sparsity=0.5), total_steps=9)
    assert [task.score.of for task in heads.tasks] == ["unit"]
    with pytest.raises(
        PruningError, match=r"'gate_absolute' of units reads gates, and units of 'layers.0.experts' have"
    ):
        Pruning(build(), ExpertPruner(sparsity=0.5, score="gate_absolute"), total_steps=9)


def test_callback_and_resume(tmp_path):
    """The Trainer of transformers 5 loads no stacked experts from a checkpoint: a resume starts from its model."""
    rows = [{"input_ids": row, "labels": row} for row in zoo.inputs(build(), rows=24)["input_ids"]]
    models, reports = [], []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        callback = PruningCallback(ExpertPruner(sparsity=0.5, score="l1"), Schedule(begin=1, end=6, frequency=2))
        arguments = training_arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
        model = load_pruned(resume, **F32) if resume else build()
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        callback.attach(trainer).train(resume_from_checkpoint=resume)
        models.append(trainer.model)
        reports.append(callback.report.kept)
    assert experts_of(models[0]) == [2, 2]
    assert reports[0] == reports[1]
    assert_same_weights(*models)
    assert_same_weights(models[0], load_pruned(save_pruned(models[0], tmp_path / "final"), **F32))
