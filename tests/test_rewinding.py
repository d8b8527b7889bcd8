"""Lottery tickets and learning-rate rewinding: where each round begins, and that a killed run ends alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import build_bert, draw_rows, training_arguments
from test_distributed import RESUMES
from test_examples import run_example
from transformers import Trainer, TrainerCallback

from hf_prune import AccuracyGuard, HeadPruner, PruningError, PruningSettings, Rewinding, WeightPruner, rewind
from hf_prune.recipe import load_recipe

PRUNER = WeightPruner(sparsity=0.75, score="l1")


class Watcher(TrainerCallback):
    """Notes the weights and the learning rate with which each training begins, and its weights at step 4."""

    def __init__(self, stop=None):
        self.began, self.rates, self.steps, self.fourth, self.stop = [], [], [], [], stop

    def on_step_begin(self, args, state, control, **kwargs):
        if len(self.began) < self.trainings:
            self.began.append({name: one.detach().clone() for name, one in kwargs["model"].named_parameters()})
            self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
            self.steps.append(state.global_step)

    trainings = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.fourth.append({name: one.detach().clone() for name, one in kwargs["model"].named_parameters()})
        if self.stop == (self.trainings, state.global_step):
            raise KeyboardInterrupt


def make(folder, stop=None):
    model = build_bert()
    rows = {"train_dataset": draw_rows(model, 24), "eval_dataset": draw_rows(model, 8, seed=1)}
    return Trainer(model, training_arguments(folder), callbacks=[watcher := Watcher(stop)], **rows), watcher


def masked(begun, end):
    """Whether weights are those of `end` wherever they are not zero, and how many are zero."""
    name = "bert.encoder.layer.0.output.dense.weight"
    kept = begun[name] != 0
    assert torch.equal(begun[name][kept], end[name][kept])
    others = [one for one in begun if one.endswith("bias")]
    assert all(torch.equal(begun[one], end[one]) for one in others)
    return float((~kept).float().mean())


def test_each_round_leaves_the_same_share_of_what_was_left():
    assert Rewinding(rounds=2).sparsities(0.75) == [0.5, 0.75]
    assert Rewinding(rounds=3).sparsities(0.488) == pytest.approx([0.2, 0.36, 0.488])


def test_weights_go_back_to_the_start(tmp_path):
    trainer, watcher = make(tmp_path)
    start = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    report = rewind(trainer, PRUNER, Rewinding(rounds=2))
    assert watcher.steps == [0, 0, 0]
    assert watcher.rates == [1e-2] * 3
    zeros = [masked(begun, start) for begun in watcher.began]
    assert zeros[0] == 0 < zeros[1] < zeros[2]
    assert [one["sparsity"] for one in report.settings["rounds"]] == pytest.approx([0, 0.5, 0.75], abs=1e-4)
    assert all("eval_loss" in one["metrics"] for one in report.settings["rounds"])
    assert report.dense.nonzero > report.pruned.nonzero
    assert trainer.callback_handler.callbacks[-1] is watcher or watcher in trainer.callback_handler.callbacks


@pytest.mark.parametrize("to", [4, "4 steps", "0.667 epochs", 1 / 3])
def test_weights_go_back_to_a_later_moment(to, tmp_path):
    trainer, watcher = make(tmp_path)
    rewind(trainer, PRUNER, Rewinding(rounds=2, to=to))
    assert watcher.steps == [0, 4, 4]
    assert watcher.rates == pytest.approx([1e-2, 1e-2 * 8 / 12, 1e-2 * 8 / 12])
    assert masked(watcher.began[1], watcher.fourth[0]) > 0
    assert masked(watcher.began[2], watcher.fourth[0]) > masked(watcher.began[1], watcher.fourth[0])


@pytest.mark.parametrize("to", [0, 4])
def test_the_learning_rate_alone_goes_back(to, tmp_path):
    trainer, watcher = make(tmp_path)
    ends = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda: (
        ends.append({name: one.detach().clone() for name, one in trainer.model.named_parameters()}) or evaluate()
    )
    rewind(trainer, PRUNER, Rewinding(rounds=2, to=to, what="rate"))
    assert watcher.steps == [0, to, to]
    assert watcher.rates[1] == pytest.approx(1e-2 * (12 - to) / 12)
    assert 0 < masked(watcher.began[1], ends[0]) < masked(watcher.began[2], ends[1])


@pytest.mark.parametrize(
    ("rewinding", "stop"),
    [(Rewinding(rounds=2), (2, 5)), (Rewinding(rounds=2, to=4), (3, 6)), (Rewinding(2, 4, "rate"), (3, 11))],
)
def test_a_killed_run_ends_alike(rewinding, stop, tmp_path):
    whole, _ = make(tmp_path / "whole")
    told = rewind(whole, PRUNER, rewinding).settings["rounds"]
    killed, _ = make(tmp_path / "killed", stop)
    with pytest.raises(KeyboardInterrupt):
        rewind(killed, PRUNER, rewinding)
    again, _ = make(tmp_path / "killed")
    rounds = rewind(again, PRUNER, rewinding, resume=True).settings["rounds"]
    assert [one["sparsity"] for one in rounds] == [one["sparsity"] for one in told]
    assert [one["metrics"]["eval_loss"] for one in rounds] == [one["metrics"]["eval_loss"] for one in told]
    for name, one in whole.model.state_dict().items():
        assert torch.equal(one, again.model.state_dict()[name])
    other, _ = make(tmp_path / "killed")
    with pytest.raises(PruningError, match="goes on with the settings that it began with"):
        rewind(other, WeightPruner(sparsity=0.5, score="l1"), rewinding, resume=True)


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (HeadPruner(sparsity=0.5), "give one WeightPruner with a sparsity. Received: HeadPruner"),
        (WeightPruner(score="l1"), "give one WeightPruner with a sparsity"),
        (WeightPruner(sparsity=0.5, rule="rigl"), "Received: a rule that takes masks back"),
        (PruningSettings(PRUNER, guards=AccuracyGuard()), "Received: a guard"),
    ],
)
def test_what_cannot_be_rewound(pruner, message, tmp_path):
    trainer, _ = make(tmp_path)
    with pytest.raises(PruningError, match=message):
        rewind(trainer, pruner)


def test_an_optimizer_of_ones_own_is_refused(tmp_path):
    trainer, _ = make(tmp_path)
    trainer.create_optimizer()
    with pytest.raises(PruningError, match="leave that to the Trainer. Received: "):
        rewind(trainer, PRUNER)


def test_a_recipe_names_it():
    recipe = load_recipe(
        "quickstart",
        ["pruners={weights: {sparsity: 0.5, score: l1}}", "target=null", "rewinding={rounds: 2, to: 1 epochs}"],
    )
    assert recipe.rewinding == Rewinding(2, "1 epochs")
    assert load_recipe(recipe).yaml() == recipe.yaml()


def share(out):
    """Rewind in two processes; each tells what it ended with."""
    trainer, _ = make(out / "run")
    rounds = rewind(trainer, PRUNER, Rewinding(rounds=2, to=2)).settings["rounds"]
    sums = {name: float(one.double().sum()) for name, one in trainer.model.state_dict().items()}
    told = [[(one["sparsity"], one["metrics"]["eval_loss"]) for one in rounds], sums]
    (out / f"{trainer.args.process_index}.json").write_text(json.dumps(told))


@pytest.mark.skipif(not RESUMES, reason="Trainer of transformers 4 cannot load optimizers on a CPU in two processes")
def test_two_processes_agree(tmp_path):
    run_example(Path(__file__), tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [sparsity for sparsity, _ in first[0]] == pytest.approx([0, 0.5, 0.75], abs=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    share(Path.cwd())
