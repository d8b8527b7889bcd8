"""Resuming: killed runs, incomplete checkpoints, lost pruning states, checkpoints smaller than the model."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_weights, build_bert, draw_batch, draw_rows, training_arguments
from resuming import DISTILLED, KINDS, kill_runs
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from hf_prune import (
    CheckpointError,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    PruningCallback,
    Schedule,
    Target,
    WeightPruner,
    latest_checkpoint,
    shrink,
)
from hf_prune.resume import ASIDE, STATE, fault_of, resumed_folder

EARLY = Schedule("cubic", begin=1, end=9, frequency=2)
UNITS = {"pruners": [HeadPruner(), NeuronPruner()], "target": Target(macs=0.5)}
WEIGHTS = {"pruners": WeightPruner(sparsity=0.7)}
MODEL, OPTIMIZER, RANDOM, TRAINER = "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"


def make_trainer(folder: Path, settings: dict[str, Any], model: Any = None, **changes: Any) -> Any:
    """Return a Trainer of twelve steps that saves at 4, 8 and 12, and its callback."""
    model = build_bert() if model is None else model
    callback = PruningCallback(schedule=EARLY, **settings)
    arguments = training_arguments(folder, **{"save_strategy": "steps", "save_steps": 4, **changes})
    rows, others = draw_rows(model, 24), draw_rows(model, 8, seed=1)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=others, callbacks=[callback]), callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run, its model and its callback."""
    return run_whole(tmp_path_factory.mktemp("whole"), UNITS)


def run_whole(folder: Path, settings: dict[str, Any], **changes: Any) -> tuple[Path, Any, PruningCallback]:
    trainer, callback = make_trainer(folder, settings, **changes)
    trainer.train()
    return folder, trainer.model, callback


@pytest.fixture
def copied(whole, tmp_path):
    """Return a copy of that run's folder, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DISTILLED])
def test_killed_three_times_a_run_ends_as_if_nothing_had_been(kind, tmp_path):
    counts = kill_runs(kind, tmp_path, kills=3, steps=12)  # whole epochs: else a Trainer resumed at its end goes on
    assert counts["kills"] == 3
    assert counts["equal"] == counts["runs"], counts["different"]


def cut(name: str) -> Any:
    def damage(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)

    return damage


def lose(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def mix(name: str) -> Any:
    return lambda folder: shutil.copy(folder.with_name("checkpoint-8") / name, folder / name)


DAMAGES = {
    "no trainer state": (lose(TRAINER), f"{TRAINER}, which a Trainer writes last, is missing"),
    "half a trainer state": (cut(TRAINER), f"{TRAINER} is cut off"),
    "half a model": (cut(MODEL), f"{MODEL} is cut off"),
    "half an optimizer": (cut(OPTIMIZER), f"{OPTIMIZER} is cut off"),
    "half a random state": (cut(RANDOM), f"{RANDOM} is cut off"),
    "no optimizer": (lose(OPTIMIZER), f"{OPTIMIZER} is missing"),
    "no random state": (lose(RANDOM), f"{RANDOM} is missing"),
    "another model": (mix(MODEL), f"{MODEL} is of another save"),
    "another optimizer": (mix(OPTIMIZER), f"{OPTIMIZER} is of another save"),
    "another trainer state": (mix(TRAINER), f"{TRAINER} is of step 8"),
    "no pruning state": (lose(STATE), f"{STATE} is missing"),
    "half a pruning state": (cut(STATE), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_set_aside(damage, copied, caplog):
    do, told = DAMAGES[damage]
    assert latest_checkpoint(copied) == copied / "checkpoint-12"
    do(copied / "checkpoint-12")
    assert latest_checkpoint(copied) == copied / "checkpoint-8"
    assert folders_in(copied) == [f"{ASIDE}checkpoint-12", "checkpoint-4", "checkpoint-8"]
    assert "checkpoint-12 is not whole" in caplog.text
    assert told in caplog.text


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "not there") is None


def test_one_set_aside_replaces_an_older_one(copied):
    for _ in range(2):
        lose(TRAINER)(copied / "checkpoint-12")
        latest_checkpoint(copied)
        shutil.copytree(copied / "checkpoint-8", copied / "checkpoint-12")
    assert (copied / f"{ASIDE}checkpoint-12" / MODEL).is_file()


def test_resume_by_true_passes_over_incomplete_ones(whole, copied, caplog):
    cut(OPTIMIZER)(copied / "checkpoint-12")
    lose(TRAINER)(copied / "checkpoint-8")
    trainer, callback = make_trainer(copied, UNITS, build_bert(seed=1))
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(whole[1], trainer.model)
    assert callback.report.to_dict() == whole[2].report.to_dict()
    assert caplog.text.count("is not whole") == 2
    assert {"checkpoint-8", "checkpoint-12", f"{ASIDE}checkpoint-8"} < {*os.listdir(copied)}


def test_a_trainer_of_others_is_left_alone(copied):
    lose(TRAINER)(copied / "checkpoint-12")
    trainer = Trainer(
        build_bert(), training_arguments(copied.parent / "other"), train_dataset=draw_rows(build_bert(), 4)
    )
    trainer.args.output_dir = str(copied)
    with pytest.raises(FileNotFoundError, match=TRAINER):
        trainer.train(resume_from_checkpoint=True)
    assert (copied / "checkpoint-12").is_dir()


@pytest.mark.parametrize("damage", ["no optimizer", "no random state", "another model"])
def test_a_damaged_checkpoint_that_is_named_is_refused(damage, copied):
    do, told = DAMAGES[damage]
    do(copied / "checkpoint-12")
    trainer, _ = make_trainer(copied, UNITS)
    with pytest.raises(CheckpointError, match=f"checkpoint-12 is not whole: {told}"):
        trainer.train(resume_from_checkpoint=str(copied / "checkpoint-12"))


def test_a_run_goes_on_in_another_folder(whole, tmp_path):
    trainer, _ = make_trainer(tmp_path, UNITS, build_bert(seed=1))
    trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert_same_weights(whole[1], trainer.model)


class Stranger:
    """A Trainer whose methods call the folder by names of their own."""

    callback_handler = None

    def begin(self, args: Any, *, checkpoint_path: Any) -> Path:
        return self.look(args)

    def look(self, args: Any) -> Path:
        return resumed_folder(args, 4)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_folder_is_found_whatever_a_trainer_calls_it(kind, tmp_path):
    def begin(mine: Path, given: Any) -> Path:  # a user's own function may have folders too
        return Stranger().begin(training_arguments(mine), checkpoint_path=given)

    there = tmp_path / "there"
    there.mkdir()
    assert begin(tmp_path, kind(there)) == there
    assert begin(tmp_path, None) == tmp_path / "checkpoint-4"
    assert begin(tmp_path, True) == tmp_path / "checkpoint-4"


def folders_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


class Look(TrainerCallback):
    """Note what a folder held at on_save: a Trainer has deleted older checkpoints by then."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], bool]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        self.seen.append((folders_in(folder), (folder / f"checkpoint-{state.global_step}" / STATE).is_file()))


def test_the_state_is_there_before_the_older_checkpoint_goes(tmp_path):
    trainer, _ = make_trainer(tmp_path, UNITS, save_total_limit=1)
    look = Look()
    trainer.callback_handler.callbacks.insert(0, look)
    trainer.train()
    assert look.seen == [([f"checkpoint-{step}"], True) for step in (4, 8, 12)]


def test_a_checkpoint_saved_over_an_older_one_is_incomplete_until_it_is_whole(whole, copied):
    """Killed between the new model and the new Trainer's state, the folder holds the old one of the same step."""
    trainer, _ = make_trainer(copied, UNITS, build_bert(seed=1))
    trainer.model.save_pretrained(copied / "checkpoint-8")
    assert fault_of(copied / "checkpoint-8") == f"{MODEL} is of another save"
    trainer.train()
    assert fault_of(copied / "checkpoint-8") is None


def without_states(folder: Path, *steps: int) -> None:
    """Leave these checkpoints only, without pruning states."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) in steps:
            (checkpoint / STATE).unlink()
        else:
            shutil.rmtree(checkpoint)


GATES = {"pruners": [HeadPruner(), NeuronPruner()], "target": Target(macs=0.5), "data": [draw_batch(build_bert())]}
EXACT = {
    "units, finished": (UNITS, 12),
    "units by data": (GATES, 4),
    "units by their weights": ({"pruners": NeuronPruner(sparsity=0.5, score="l2")}, 8),
    "weights": (WEIGHTS, 4),
    "weights, finished": (WEIGHTS, 12),
    "units at random": ({"pruners": HeadPruner(sparsity=0.5, score="random")}, 4),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_lost_state_is_read_from_zeros(case, tmp_path, caplog):
    settings, step = EXACT[case]
    folder, model, first = run_whole(tmp_path, settings)
    without_states(folder, step)
    trainer, second = make_trainer(folder, settings, build_bert(seed=1))
    trainer.train(resume_from_checkpoint=True)
    assert "recovered from the zeros" in caplog.text
    assert_same_weights(model, trainer.model)
    assert (second.report.kept, second.report.pruned) == (first.report.kept, first.report.pruned)
    assert second.pruning.logs() == first.pruning.logs()
    assert second.pruning.masks.keys() == first.pruning.masks.keys()
    for name, mask in first.pruning.masks.items():
        assert torch.equal(mask, second.pruning.masks[name])


def refuse(folder: Path, settings: dict[str, Any], told: str, model: Any = None) -> None:
    trainer, _ = make_trainer(folder, settings, model)
    with pytest.raises(CheckpointError, match=told):
        trainer.train(resume_from_checkpoint=True)


def test_lost_running_means_are_refused(copied):
    without_states(copied, 4)
    refuse(copied, UNITS, "zeros in its weights do not tell all: running means .* changes are due until step 9")


def test_layers_are_more_than_zeros(copied):
    without_states(copied, 12)
    refuse(copied, {"pruners": LayerPruner(sparsity=0.5)}, "masks of kind layer are more than zeros")


def test_too_few_zeros_are_refused(copied):
    without_states(copied, 12)
    refuse(copied, {**UNITS, "target": Target(macs=0.25)}, "of the MACs are left, and the schedule was at 0.2500")
    refuse(copied, {"pruners": NeuronPruner(sparsity=0.9)}, "of 48 units are zero, and the schedule has masked 43")


def test_a_weight_that_is_zero_by_chance_is_refused(tmp_path):
    folder, _, callback = run_whole(tmp_path, WEIGHTS)
    without_states(folder, 12)
    tensors = load_file(folder / "checkpoint-12" / MODEL)
    name, mask = next((name, mask) for name, mask in callback.pruning.masks.items() if mask.any())
    tensors[name][tuple(mask.nonzero()[0])] = 0
    save_file(tensors, folder / "checkpoint-12" / MODEL, metadata={"format": "pt"})
    refuse(folder, WEIGHTS, r"(\d+) of \d+ weights are zero, and the schedule has masked \d+")


def test_a_state_of_another_step_is_refused(copied):
    shutil.copy(copied / "checkpoint-8" / STATE, copied / "checkpoint-12" / STATE)
    trainer, _ = make_trainer(copied, UNITS)
    with pytest.raises(CheckpointError, match="checkpoint-12 is not whole: .* is of another save"):
        trainer.train(resume_from_checkpoint=str(copied / "checkpoint-12"))


LIVE = {**UNITS, "shrink_during_training": True}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Return the folder of a run that shrinks while it trains, its model and its callback."""
    return run_whole(tmp_path_factory.mktemp("live"), LIVE)


@pytest.mark.parametrize("how", ["true", "path", "latest"])
@pytest.mark.parametrize("settings", [LIVE, UNITS], ids=["live", "masks from then on"])
def test_a_shrunk_checkpoint_resumes_into_a_dense_model(settings, how, live, tmp_path):
    folder = Path(shutil.copytree(live[0], tmp_path / "run"))
    lose(TRAINER)(folder / "checkpoint-12")
    lose(TRAINER)(folder / "checkpoint-8")
    given = {"true": True, "path": str(folder / "checkpoint-4"), "latest": None}[how]
    trainer, callback = make_trainer(folder, settings, build_bert(seed=1))
    trainer.train(resume_from_checkpoint=latest_checkpoint(folder) if how == "latest" else given)
    assert callback.report.kept == live[2].report.kept
    assert_same_weights(live[1], trainer.model, atol=0 if settings is LIVE else 1e-3)


def test_the_best_model_of_a_resumed_run_is_that_of_the_whole_one(tmp_path):
    saving = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    folder, model, _ = run_whole(tmp_path / "run", LIVE, **saving)
    for damaged in ("checkpoint-11", "checkpoint-12"):
        lose(TRAINER)(folder / damaged)
    trainer, _ = make_trainer(folder, LIVE, build_bert(seed=1), **saving)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(model, trainer.model)


def test_a_shrunk_checkpoint_without_state_is_refused(live, tmp_path):
    folder = Path(shutil.copytree(live[0], tmp_path / "run"))
    without_states(folder, 12)
    refuse(folder, LIVE, "checkpoint-12 is smaller than the model, and does not say how far pruning was")


def test_a_model_smaller_than_the_checkpoint_is_refused(live):
    small = shrink(build_bert(), {"layers.0.attention.heads": [0], "layers.1.attention.heads": [0]})
    trainer, _ = make_trainer(live[0], LIVE, small)
    with pytest.raises(CheckpointError, match="does not fit the model, which must not be smaller"):
        trainer.train(resume_from_checkpoint=str(live[0] / "checkpoint-4"))


def test_a_state_says_which_files_it_belongs_to(whole):
    from hf_prune.resume import read_state

    told = read_state(whole[0] / "checkpoint-8" / STATE)["files"]
    assert {*told} == {MODEL, OPTIMIZER, "scheduler.pt", RANDOM}
    assert told[MODEL][0] == (whole[0] / "checkpoint-8" / MODEL).stat().st_size
    assert json.loads((whole[0] / "checkpoint-8" / TRAINER).read_text(encoding="utf-8"))["global_step"] == 8
    assert logging.getLogger("hf_prune.resume").isEnabledFor(logging.WARNING)
