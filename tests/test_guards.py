"""Guards: how far a metric lets a run go, and what they leave behind when something is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from models import build_bert, draw_batch, draw_rows, take_step, training_arguments
from transformers import Trainer

from hf_prune import (
    AccuracyGuard,
    NeuronPruner,
    Pruning,
    PruningArguments,
    PruningCallback,
    PruningError,
    PruningSettings,
    Recipe,
    Schedule,
    WeightPruner,
)
from hf_prune.recipe import load_recipe

STEPS = 60
HALF = WeightPruner(sparsity=0.5, score="l1")


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def run_under(guard, bearable, schedule=None, pruner=HALF, steps=STEPS, every=1):
    """Train under a guard that sees 0.9 while sparsity is bearable, and 0.5 where it is not."""
    model = build_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = schedule or Schedule("linear", begin=1, end=21, frequency=4)
    pruning = Pruning(model, pruner, schedule, total_steps=steps, optimizer=optimizer, guard=guard)
    pruning.observe({"eval_accuracy": 0.9, "eval_runtime": 1.0})
    seen = []
    for step in range(steps):
        take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)
        seen.append(pruning.logs().get("sparsity_weight", 0.0))
        if step % every == 0:
            pruning.observe({"eval_accuracy": 0.9 if seen[-1] <= bearable else 0.5})
    return model, pruning, seen, pruning.finish()


@pytest.mark.parametrize("bearable", [0.06, 0.23, 0.33, 0.41])
def test_it_ends_at_the_largest_sparsity_that_the_metric_bears(bearable):
    model, pruning, seen, report = run_under(AccuracyGuard(max_drop=0.01, patience=2), bearable, steps=120)
    told = report.settings["guards"]["accuracy"]
    zeros = [(model.get_parameter(name) == 0).float().mean() for name in pruning.masks]
    assert bearable - 0.5 * 0.02 * 2 <= report.settings["sparsity_weight"] <= bearable
    assert max(seen) > bearable
    assert sum(zeros) / len(zeros) == pytest.approx(report.settings["sparsity_weight"], abs=0.05)
    assert told["dense"] == 0.9
    assert told["allowed"] == pytest.approx(0.89)
    assert told["undone"] > 1
    assert told["changes"] > told["undone"]
    assert told["level"] == pytest.approx(report.settings["sparsity_weight"] / 0.5, abs=1e-3)


def test_a_metric_that_bears_all_changes_nothing():
    plain = run_under(None, 1.0)
    told = run_under(AccuracyGuard(), 1.0)
    assert plain[2] == told[2]
    assert told[3].settings["guards"]["accuracy"]["undone"] == 0
    assert told[1].finished
    assert told[1].guarding.state_dict()["good"] is None


def test_it_undoes_by_hand():
    """Fractions 0, 0.2, 0.4, … at steps 1, 5, 9, …; 0.4 is too much, so 0.2 + 0.1 is next, which is bearable."""
    _, _, seen, report = run_under(AccuracyGuard(patience=2), 0.17, steps=22)
    rounded = [round(one, 2) for one in seen]
    assert rounded[:9] == [0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.2]
    assert rounded[9:13] == [0.2, 0.2, 0.2, 0.1]  # due at step 13, it is undone
    assert rounded[13:15] == [0.15, 0.2]  # half as far; approved, half as far again
    assert report.settings["sparsity_weight"] == pytest.approx(0.15, abs=0.02)


def test_values_come_back_too():
    model = build_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    guard = AccuracyGuard(dense=0.9, patience=1)
    pruning = Pruning(model, HALF, Schedule("oneshot", begin=2), total_steps=4, optimizer=optimizer, guard=guard)
    for step in range(2):
        take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)
        pruning.observe({"accuracy": 0.9 if step == 0 else 0.1})
    assert pruning.logs()["sparsity_weight"] == 0.5
    report = pruning.finish()  # no change is due any more: the end undoes it
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert report.settings["guards"]["accuracy"]["undone"] == 1
    assert report.settings["guards"]["accuracy"]["level"] == 0


def test_without_evaluations_it_waits():
    model = build_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruning = Pruning(model, HALF, Schedule(begin=1, end=3), total_steps=4, optimizer=optimizer, guard=AccuracyGuard())
    for step in range(4):
        assert not take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)
    assert pruning.clock.position == 0


@pytest.mark.parametrize(
    ("metric", "dense", "good", "bad"),
    [
        ("accuracy", 0.9, 0.89, 0.88),
        ("eval_f1", 0.9, 0.95, 0.5),
        ("loss", 0.5, 0.51, 0.52),
        ("eval_perplexity", 20.0, 20.01, 21.0),
        ("eval_accuracy", 0.9, 0.9, math.nan),
    ],
)
def test_which_way_is_better(metric, dense, good, bad):
    for name in (metric.removeprefix("eval_"), f"eval_{metric.removeprefix('eval_')}"):
        guard = AccuracyGuard(metric, 0.01, dense=dense)
        guard.observe({name: good})
        assert guard.verdict() == "go"
        guard.observe({name: bad})
        assert guard.verdict() == "wait"
    assert AccuracyGuard("loss", greater_is_better=True).lower_is_better is False


def test_what_training_itself_costs_is_allowed_for_less_and_less():
    guard = AccuracyGuard(dense=0.9, max_drop=0.01)
    for guard.progress, value in ((0.0, 0.9), (0.1, 0.88), (0.2, 0.86)):  # that at the start says nothing of training
        guard.observe({"accuracy": value})
    assert guard.before == [0.88, 0.86]
    assert guard.slack == pytest.approx(0.8 * 0.03)
    assert (guard.verdict(), guard.proven(), guard.lasting()) == ("wait", False, False)
    guard.observe({"accuracy": 0.87})
    assert (guard.verdict(), guard.proven(), guard.lasting()) == ("go", True, False)
    guard.level = 0.5
    guard.changed()
    for guard.progress, value, good in (
        (0.5, 0.876, True),
        (0.5, 0.874, False),
        (1.0, 0.889, False),
        (1.0, 0.89, True),
    ):
        guard.observe({"accuracy": value})
        assert (not guard.bad) is good
    assert guard.lasting()
    loss = AccuracyGuard("loss", dense=0.3, max_drop=0.01)
    for loss.progress, value in ((0.5, 0.4), (0.5, 0.35)):
        loss.observe({"loss": value})
    assert loss.slack == pytest.approx(0.5 * 0.075)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_ends_with_what_was_approved_without_slack(resumed):
    """0.15 of the weights may leave; 0.3 and 0.5 are approved only for what the learning rate is thought to cost."""

    def session():
        model, told = build_bert(), Schedule(steps=[[4, 0.3], [8, 0.6], [12, 1.0]])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        guard = AccuracyGuard(max_drop=0.01, patience=100)
        return model, optimizer, Pruning(model, HALF, told, total_steps=40, optimizer=optimizer, guard=guard)

    def train(model, optimizer, pruning, steps):
        for _ in range(steps):
            changed = take_step(model(**draw_batch(model)).loss, optimizer, pruning)
            sparsity = pruning.logs()["sparsity_weight"]
            pruning.observe({"accuracy": 0.86 if not sparsity else 0.895 if sparsity < 0.2 else 0.885})
            seen.append((round(sparsity, 2), changed))

    seen = []
    model, optimizer, pruning = session()
    pruning.observe({"accuracy": 0.9})
    train(model, optimizer, pruning, 13)
    assert [one for one, changed in seen if changed] == [0.15, 0.3, 0.5]
    if resumed:
        weights, state = model.state_dict(), pruning.state_dict()
        model, optimizer, pruning = session()
        model.load_state_dict(weights)
        pruning.load_state_dict(state)
    train(model, optimizer, pruning, 27)
    report = pruning.finish()
    assert report.settings["sparsity_weight"] == pytest.approx(0.15, abs=0.001)
    assert report.settings["guards"]["accuracy"]["level"] == pytest.approx(0.3)


def test_what_is_approved_while_no_change_is_tried_any_more_is_kept_too():
    """0.25 is approved for what the learning rate costs, 0.5 is not; 0.25 without slack once, and not at the end."""
    model, told = build_bert(), Schedule(steps=[[2, 0.5], [4, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = AccuracyGuard(max_drop=0.01, patience=1, smallest=0.4)
    pruning = Pruning(model, HALF, told, total_steps=20, optimizer=optimizer, guard=guard)
    pruning.observe({"accuracy": 0.9})
    for value in [0.85, 0.88, 0.88, 0.7, *[0.88] * 10, 0.895, *[0.88] * 5]:
        take_step(model(**draw_batch(model)).loss, optimizer, pruning)
        pruning.observe({"accuracy": value})
    told = pruning.finish().settings
    assert (told["sparsity_weight"], told["guards"]["accuracy"]["level"]) == (pytest.approx(0.25, abs=0.001), 0.5)


def test_the_dense_value_is_the_best_before_anything_is_pruned():
    guard = AccuracyGuard("loss")
    for value in (0.7, 0.5, 0.6):
        guard.observe({"eval_loss": value})
    assert guard.measured == 0.5
    guard.level = 0.5
    guard.changed()
    guard.observe({"eval_loss": 0.1})
    assert guard.measured == 0.5


def test_a_metric_that_never_comes_is_named_and_no_hook_stays():
    model = build_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruning = Pruning(
        model, NeuronPruner(sparsity=0.5), Schedule(begin=1, end=3), total_steps=4, optimizer=optimizer,
        guard=AccuracyGuard("f1"),
    )  # fmt: skip
    pruning.observe({"eval_loss": 1.0, "eval_accuracy": 0.9})
    assert hooks_of(model) > 0
    with pytest.raises(PruningError, match="no metric 'f1' in .*Received: eval_accuracy, eval_loss"):
        take_step(model(**draw_batch(model)).loss, optimizer, pruning)
    assert hooks_of(model) == 0
    assert not optimizer._optimizer_step_pre_hooks


def test_a_recipe_knows_the_metrics_that_its_guard_can_see():
    for metric in ("accuracy", "eval_accuracy", "loss"):
        load_recipe("quickstart", [f"guard.metric={metric}"])
    load_recipe("quickstart", ["guard.metric=whatever", "metrics=[glue]"])  # the Hub's say later what they give
    with pytest.raises(PruningError, match="accuracy, loss. Did you mean 'accuracy'. Received: 'acuracy'"):
        load_recipe("quickstart", ["guard.metric=acuracy"])


def test_a_run_that_a_guard_has_held_says_so():
    model = build_bert()
    schedule = Schedule("linear", begin=1, end=3, frequency=1)
    pruning = Pruning(model, HALF, schedule, total_steps=4, guard=AccuracyGuard(dense=0.9, patience=3))
    pruning.observe({"accuracy": 0.1})
    for _ in range(4):
        pruning.step()
    (told,) = pruning.finish().settings["warnings"]
    assert told.startswith("Training ended at step 4, while a guard held the schedule at 0 of 3: the model is denser")


def test_recovery_without_undoing_by_hand():
    """Each change waits until the metric is back; where it does not come back in three evaluations it goes on."""
    model = build_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = AccuracyGuard(dense=0.9, undo=False, patience=3)
    assert not guard.goes_back
    told = PruningSettings(
        NeuronPruner(sparsity=0.5),
        Schedule("linear", begin=1, end=3, frequency=1),
        guards=guard,
        shrink_during_training=True,
    )
    pruning = Pruning(model, told, total_steps=12, optimizer=optimizer)
    found, changes = [0.9, 0.9, 0.8, 0.8, 0.9, 0.8, 0.8, 0.8, 0.8], []
    for step, value in enumerate(found):
        pruning.observe({"eval_accuracy": value})
        changes.append(take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning))
    assert changes == [True, True, False, False, True, False, False, False, False]
    assert pruning.finished
    pruning = Pruning(build_bert(), HALF, Schedule("linear", begin=1, end=3, frequency=1), total_steps=9, guard=guard)
    for value in (0.9, 0.9, 0.8, 0.8, 0.8, 0.9):
        pruning.observe({"eval_accuracy": value})
        changes.append(pruning.step())
    assert changes[-6:] == [True, True, False, False, True, False]


def test_states_find_their_guards_by_name():
    guards = [AccuracyGuard("accuracy"), AccuracyGuard("loss")]
    first = Pruning(build_bert(), PruningSettings(HALF, guards=guards), total_steps=STEPS)
    first.observe({"eval_accuracy": 0.7, "eval_loss": 0.3})
    state = first.state_dict()
    assert {name: one["value"] for name, one in state["guards"]["guards"].items()} == {
        "accuracy": 0.7,
        "accuracy 2": 0.3,
    }
    other = Pruning(build_bert(), PruningSettings(HALF, guards=guards), total_steps=STEPS)
    state["guards"]["guards"] = dict(reversed(state["guards"]["guards"].items()))
    other.load_state_dict(state)
    assert {name: one["value"] for name, one in other.state_dict()["guards"]["guards"].items()} == {
        "accuracy": 0.7,
        "accuracy 2": 0.3,
    }
    with pytest.raises(PruningError, match="must be of these guards: accuracy. Received: accuracy 2, accuracy"):
        Pruning(build_bert(), PruningSettings(HALF, guards=AccuracyGuard()), total_steps=STEPS).load_state_dict(state)


def test_a_trainer_is_guarded_and_resumes_bit_for_bit(tmp_path):
    def trainer(folder):
        model = build_bert()
        guard = AccuracyGuard(max_drop=0.3, patience=1)
        callback = PruningCallback(HALF, Schedule("linear", begin=1, end=9, frequency=2), guard=guard)
        arguments = training_arguments(
            folder, eval_strategy="steps", eval_steps=1, eval_on_start=True, save_steps=4, save_strategy="steps"
        )
        rows = {"train_dataset": draw_rows(model, 24), "eval_dataset": draw_rows(model, 8, seed=1)}
        weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")

        def dense_share(prediction):  # stands for a metric that falls with sparsity
            return {"accuracy": float((weight != 0).float().mean())}

        return callback.attach(Trainer(model, arguments, compute_metrics=dense_share, **rows)), callback

    whole, told = trainer(tmp_path / "whole")
    whole.train()
    guard = told.report.settings["guards"]["accuracy"]
    assert guard["undone"] > 0
    assert 0 < guard["level"] < 1
    again, resumed = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.report.settings["guards"]["accuracy"] == guard
    for name, one in whole.model.state_dict().items():
        assert torch.equal(one, again.model.state_dict()[name])


def test_a_trainer_that_does_not_evaluate_is_refused(tmp_path):
    model = build_bert()
    trainer = Trainer(model, training_arguments(tmp_path), train_dataset=draw_rows(model, 8))
    with pytest.raises(PruningError, match="AccuracyGuard needs evaluations.*eval_strategy='steps'.*'no'"):
        PruningCallback(HALF, guard=AccuracyGuard()).attach(trainer).train()


def test_arguments_and_recipes_name_it():
    arguments = PruningArguments(prune_sparsity=0.5, prune_guard="f1", prune_max_drop=0.02)
    assert arguments.callback().settings.guards == (AccuracyGuard("f1", 0.02),)
    recipe: Recipe = load_recipe("quickstart", ["guard.metric=accuracy", "guard.max_drop=0.02"])
    assert recipe.pruning.guards == (AccuracyGuard("accuracy", 0.02),)
    assert "max_drop: 0.02" in recipe.yaml()
    with pytest.raises(PruningError, match="guards must be guards, such as AccuracyGuard.*Received: 'accuracy'"):
        PruningSettings(HALF, guards="accuracy")
    with pytest.raises(PruningError, match="AccuracyGuard: max_drop: .*Received: -1"):
        AccuracyGuard(max_drop=-1)
