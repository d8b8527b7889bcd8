"""Learned gates and scores: what a reader can work out by hand, and goals that are met."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import build_bert, build_llama, build_vit, draw_batch, draw_rows, logits_of, take_step, training_arguments
from transformers import Trainer

from hf_prune import (
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    PruningSettings,
    Schedule,
    Target,
    WeightPruner,
    prune,
)
from hf_prune.allocation import ALLOCATIONS
from hf_prune.evidence import Aim
from hf_prune.evidence.learning import Lagrangian, Learned, rate_of
from hf_prune.recipe import load_recipe

GATED = [HeadPruner(score="l0"), NeuronPruner(score="l0")]
LATE = Schedule("oneshot", begin=30, end=30)


def start(told: PruningSettings, steps: int = 32, rate: float = 1e-3, model: Any = None) -> Any:
    model = model or build_bert()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate)
    return model, optimizer, Pruning(model, told, total_steps=steps, optimizer=optimizer)


def train(run: Any, steps: int) -> None:
    model, optimizer, pruning = run
    for step in range(steps):
        take_step(model(**draw_batch(model, seed=step % 4)).loss, optimizer, pruning)


# what is learned, and its price
def test_the_first_step_of_an_adam_is_the_rate_against_the_gradients_sign():
    learned = Learned()
    learned.add({"a": torch.zeros(3), "b": torch.ones(1)})
    learned.descend({"a": torch.tensor([5.0, -0.2, 0.0])}, rate=0.5)
    torch.testing.assert_close(learned.values["a"], torch.tensor([-0.5, 0.5, 0.0]))
    assert learned.values["b"].tolist() == [1]
    learned.change(lambda named: {name: one[:1] for name, one in named.items()})
    learned.descend({"a": torch.tensor([5.0])}, rate=0.5)
    torch.testing.assert_close(learned.values["a"], torch.tensor([-1.0]))  # moments were cut along


def test_a_price_is_that_of_the_excess():
    prices = Lagrangian()
    aim = Aim(goal=0.5, costs={"a": 0.3, "b": 0.1}, alive={"a": torch.tensor([True, True, False])}, steps=10, fixed=0.2)
    opened = {"a": torch.tensor([1.0, 0.5, 0.9]), "b": torch.tensor([0.5, 0.5])}
    # 0.2 + 0.3 * 1.5 + 0.1 * 1 = 0.75 is left, 0.25 too much; b is 10 at first: 2 * 10 * 0.25 = 5 for a mean unit
    mean = (3 * 0.3 + 2 * 0.1) / 5
    slopes = prices.price([aim], opened, rate=0.1)
    torch.testing.assert_close(slopes["a"], torch.tensor([5 * 0.3 / mean, 5 * 0.3 / mean, 0.0]))
    torch.testing.assert_close(slopes["b"], torch.full((2,), 5 * 0.1 / mean))
    state = prices.state_dict()
    torch.testing.assert_close(state["values"]["0"], torch.tensor([0.1, 10.1]))  # they ascend


@pytest.mark.parametrize(("steps", "rate"), [(10, 0.1), (500, 0.02), (100_000, 0.01)])
def test_a_short_run_learns_faster(steps, rate):
    assert rate_of([Aim(0.5, {}, {}, steps)]) == rate


# gates
def evidence_of(pruning: Pruning) -> Any:
    return pruning.evidence["l0"]


def test_a_gate_is_the_hard_concrete_one():
    from hf_prune.evidence.l0 import _drawn, _in_evaluation

    zero = torch.zeros(3)
    # u = 0.5: s = sigmoid(log_alpha * 1.5), z = 1.2 s - 0.1
    torch.testing.assert_close(_drawn(torch.tensor([0.0, 10.0, -10.0]), zero), torch.tensor([0.5, 1.0, 0.0]))
    torch.testing.assert_close(
        _in_evaluation(torch.tensor([0.0, 2.5, -2.5])), torch.tensor([0.5, 1.0, 0.0]), atol=1e-2, rtol=0
    )
    told = PruningSettings(NeuronPruner(sparsity=0.5, score="l0"), LATE)
    run = start(told)
    train(run, 1)
    gates = evidence_of(run[2])
    group = next(one for one in run[2].groups if one.name == "layers.0.mlp.neurons")
    gates._gates.values[group.name].fill_(0.0)
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).logit()
    share = (_drawn(torch.tensor(0.0), draws) > 0).float().mean()
    torch.testing.assert_close(gates.of_units("l0", group)[0], share, atol=5e-3, rtol=0)  # its probability


def test_a_gates_gradient_is_that_of_the_loss():
    run = start(PruningSettings(GATED, LATE, Target(macs=0.5)))
    model, _, pruning = run
    gates, name = evidence_of(pruning), "layers.1.mlp.neurons"
    batch = draw_batch(model)
    model(**batch).loss.backward()
    found = float(gates._leaves[name].grad[3])
    losses = []
    for by in (1e-2, -1e-2):
        with torch.no_grad():
            gates._gates.values[name][3] += by
            losses.append(float(model(**batch).loss))
            gates._gates.values[name][3] -= by
    assert found == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05, abs=1e-5)


@pytest.mark.parametrize("live", [False, True])
def test_what_is_left_of_gates_goes_into_the_weights(live):
    """A closed gate and a unit that is gone are the same; one that is half open is half of its output weights."""
    told = PruningSettings(
        NeuronPruner(sparsity=0.5, score="l0"), Schedule("oneshot", begin=2, end=2), shrink_during_training=live
    )
    run = model, optimizer, pruning = start(told, rate=0.0)
    train(run, 1)
    for name, value in evidence_of(pruning)._gates.values.items():
        value.copy_(torch.where(torch.arange(24) % 2 == 0, 0.0, -9.0))
        assert name.endswith("neurons")
    gated = logits_of(model, draw_batch(model))
    before = model.bert.encoder.layer[0].output.dense.weight.clone()
    optimizer.step()
    assert pruning.step()
    after = model.bert.encoder.layer[0].output.dense.weight
    torch.testing.assert_close(after if live else after[:, ::2], before[:, ::2] / 2)
    torch.testing.assert_close(logits_of(model, draw_batch(model)), gated)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert pruning.finish().kept["layers.1.mlp.neurons"] == list(range(0, 24, 2))
    torch.testing.assert_close(logits_of(model, draw_batch(model)), gated)


@pytest.mark.parametrize("shrink", [False, True])
def test_a_run_that_ends_early_is_left_as_it_was_evaluated(shrink):
    told = PruningSettings(NeuronPruner(sparsity=0.5, score="l0"), Schedule("linear", begin=2, end=9, frequency=7))
    run = model, _, pruning = start(told)
    train(run, 3)
    for value in evidence_of(pruning)._gates.values.values():
        value.copy_(torch.linspace(-1, 1, 24))
    evaluated = logits_of(model, draw_batch(model))
    pruning.finish(shrink)
    torch.testing.assert_close(logits_of(model, draw_batch(model)), evaluated)


@pytest.mark.parametrize("target", [Target(macs=0.5), Target(parameters=0.8)])
def test_gates_meet_a_target_before_anything_is_cut(target):
    run = start(PruningSettings(GATED, Schedule("oneshot", begin=100, end=100), target), steps=100)
    train(run, 99)
    pruning = run[2]
    (aim,) = evidence_of(pruning).aims
    share = next(iter(target.said.values()))
    assert aim.goal == pytest.approx(1 - (1 - share) * 0.99)
    opened = {name: evidence_of(pruning).of_units("l0", pruning.masking.units.by_name[name]) for name in aim.costs}
    left = aim.fixed + sum(cost * float(opened[name].sum()) for name, cost in aim.costs.items())
    assert left == pytest.approx(aim.goal, abs=0.05)
    take_step(run[0](**draw_batch(run[0])).loss, *run[1:])
    assert pruning.budget.left(pruning.masking.units) / pruning.budget.dense <= share


def test_a_gate_that_costs_is_not_divided_by_costs_again():
    assert GATED[0].allocate() is ALLOCATIONS["as_is"]
    assert HeadPruner(score="l0", allocation="uniform").allocate() is ALLOCATIONS["uniform"]
    assert HeadPruner(score="taylor").allocate() is ALLOCATIONS["global"]


def test_gates_of_kv_groups_train_and_are_cut():
    model = build_llama()
    run = start(PruningSettings(GATED, LATE, Target(macs=0.6)), model=model)
    train(run, 32)
    report = run[2].finish()
    assert report.settings["macs_left"] <= 0.6


def test_gates_learn_under_a_trainer_and_resume_bit_for_bit(tmp_path):
    def trainer(steps: int) -> Any:
        model = build_bert(hidden_dropout_prob=0.1)
        callback = PruningCallback(GATED, Schedule("cubic", begin=2, end=6, frequency=2), target=Target(macs=0.5))
        told = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
        made = Trainer(
            model, training_arguments(tmp_path, **told), train_dataset=draw_rows(model, 24), callbacks=[callback]
        )
        return made, callback

    whole, first = trainer(8)
    whole.train()
    again, second = trainer(8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert first.report.kept == second.report.kept
    assert all(map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values()))


def once(score: str) -> None:
    prune(build_bert(), NeuronPruner(sparsity=0.5, score=score), data=[draw_batch(build_bert())])


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: once("l0"), "Score 'l0' needs steps that have learned: train with it"),
        (lambda: once("movement_adam"), "Score 'movement_adam' needs steps that have learned: train with it"),
        (lambda: start(PruningSettings(LayerPruner(sparsity=0.5, score="l0"))), "where a Linear reads units"),
        (lambda: start(PruningSettings(WeightPruner(sparsity=0.5, score="l0"))), "is for units"),
        (lambda: start(PruningSettings(NeuronPruner(sparsity=0.5, score="soft_movement"))), "follows single weights"),
    ],
)
def test_what_cannot_learn_is_refused(do, message):
    with pytest.raises(PruningError, match=message):
        do()


def snippets() -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "learned.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("snippet", snippets(), ids=lambda one: one.splitlines()[1].strip())
def test_recipes_of_the_document_begin(snippet):
    told = {"target": None, **yaml.safe_load(snippet)}
    recipe = load_recipe(
        "quickstart", [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in told.items()]
    )
    plain = dataclasses.replace(recipe.pruning, shrink_during_training=False)
    run = start(plain, steps=100, model=build_vit())
    train(run, 2)


# scores
def test_movement_by_adam_is_an_adams_of_the_straight_through_gradient():
    told = PruningSettings(WeightPruner(sparsity=0.5, score="movement_adam"), LATE)
    model, optimizer, pruning = start(told, rate=0.1)
    name, batch = "bert.encoder.layer.0.output.dense.weight", draw_batch(model)
    weight = model.get_parameter(name)
    value = torch.zeros_like(weight, requires_grad=True)
    adam = torch.optim.Adam([value], lr=0.01)
    for _ in range(3):
        model(**batch).loss.backward()
        value.grad = (weight * weight.grad).detach()
        adam.step()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()
    score = pruning.evidence["movement_adam"].of_weight("movement_adam", name, weight)
    torch.testing.assert_close(score, value.detach())


def test_units_that_the_loss_wants_open_score_more_by_adam():
    told = PruningSettings(NeuronPruner(sparsity=0.5, score="movement_adam"), LATE)
    model, optimizer, pruning = start(told, rate=0.0)
    batch, name = draw_batch(model), "layers.1.mlp.neurons"
    reader = model.bert.encoder.layer[1].output.dense
    expected = []
    reader.register_forward_pre_hook(lambda module, args: expected.append(args[0]) or args[0].retain_grad())
    model(**batch).loss.backward()
    gate = (expected[0] * expected[0].grad).sum((0, 1)).detach()  # dL/dgate
    pruning.after_backward()
    optimizer.step()
    pruning.step()
    group = pruning.masking.units.by_name[name]
    torch.testing.assert_close(
        pruning.evidence["gate_adam"].of_units("gate_adam", group), -0.01 * gate.sign(), atol=1e-4, rtol=0
    )


def test_soft_movement_meets_its_sparsity_before_anything_is_masked():
    told = PruningSettings(WeightPruner(sparsity=0.6, score="soft_movement"), Schedule("oneshot", begin=100, end=100))
    run = start(told, steps=100)
    train(run, 99)
    opened = [
        run[2].evidence["soft_movement"].of_weight("", name, run[0].get_parameter(name))
        for name in run[2].tasks.weights[0].weights
    ]
    assert float(torch.cat([one.flatten() for one in opened]).mean()) == pytest.approx(0.4, abs=0.06)
    take_step(run[0](**draw_batch(run[0])).loss, *run[1:])
    assert run[2].finish().settings["sparsity_weight"] == pytest.approx(0.6, abs=1e-3)
