"""What joins a checkpoint: parts that are there before it is whole, and of the same save, or it is passed over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_weights, build_bert, draw_rows, training_arguments
from resuming import DISTILLED, kill_at_each_write
from safetensors.torch import load_file, save_file
from test_resume import UNITS, cut, folders_in, lose
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from hf_prune import CheckpointError, Distillation, DistillationTrainer, PruningCallback, Schedule, latest_checkpoint
from hf_prune.distillation.lesson import PROJECTIONS
from hf_prune.resume import ASIDE, STATE, fault_of, join_checkpoints, leave_checkpoints, read_state, write_part

SOON = Schedule(begin=1, end=5, frequency=2)
MODEL, TRAINER = "model.safetensors", "trainer_state.json"


def make_trainer(folder: Path, pruned: bool, seed: int = 0, **changes: Any) -> Any:
    """Return a Trainer of six steps that saves at 2, 4 and 6, with a teacher that is wider than its student."""
    callback = PruningCallback(schedule=SOON, **UNITS)
    arguments = training_arguments(folder, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **changes})
    return DistillationTrainer(
        build_bert(seed=seed), arguments, train_dataset=draw_rows(build_bert(), 24),
        callbacks=[callback] if pruned else None,
        teacher=build_bert(seed=9, hidden_size=32), distillation=Distillation(hidden=1.0),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["pruned", "alone"])
def whole(request, tmp_path_factory):
    """Return the folder of an uninterrupted run, its Trainer, and whether it pruned."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), request.param)
    trainer.train()
    return Path(trainer.args.output_dir), trainer, request.param


@pytest.fixture
def copied(whole, tmp_path):
    """Return a copy of that run's folder, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def assert_ends_alike(whole: Any, folder: Path, given: Any = True) -> None:
    """Resume with other weights and another seed of the matrices: nothing of them may be left."""
    resumed = make_trainer(folder, whole[2], seed=1)
    resumed.lesson.draw(5)
    resumed.train(resume_from_checkpoint=given)
    assert_same_weights(whole[1].lesson.projections, resumed.lesson.projections)
    assert_same_weights(whole[1].model, resumed.model)


@pytest.mark.parametrize("kind", DISTILLED)
def test_killed_in_any_write_a_run_ends_as_if_nothing_had_been(kind, tmp_path):
    assert kill_at_each_write(kind, tmp_path, steps=3, writes=range(11, 22)) == []


def foreign(folder: Path) -> None:
    shutil.copy(folder.with_name("checkpoint-2") / PROJECTIONS, folder / PROJECTIONS)


def earlier_run(folder: Path) -> None:
    """Leave what a kill leaves in a folder of an earlier run: a new model beside the old Trainer's state."""
    build_bert(seed=3).save_pretrained(folder)


DAMAGES = {
    "missing": (lose(PROJECTIONS), f"{PROJECTIONS} is missing"),
    "half": (cut(PROJECTIONS), f"{PROJECTIONS} is cut off"),
    "of another save": (foreign, "is of another save"),
    "beside a new model": (earlier_run, "is of another save"),
    "no trainer state": (lose(TRAINER), f"{TRAINER}, which a Trainer writes last, is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_whose_matrices_are_not_its_own_is_passed_over(damage, whole, copied, caplog):
    do, told = DAMAGES[damage]
    do(copied / "checkpoint-6")
    assert_ends_alike(whole, copied)
    assert f"{ASIDE}checkpoint-6" in folders_in(copied)
    assert told in caplog.text


def test_a_foreign_part_of_a_named_checkpoint_is_refused(whole, copied):
    foreign(copied / "checkpoint-4")
    with pytest.raises(CheckpointError, match="checkpoint-4 is not whole: .* is of another save"):
        make_trainer(copied, whole[2]).train(resume_from_checkpoint=str(copied / "checkpoint-4"))


def test_a_checkpoint_in_another_folder_brings_its_matrices(whole, tmp_path):
    assert_ends_alike(whole, tmp_path, str(whole[0] / "checkpoint-4"))


def test_checkpoints_of_older_versions_resume(whole, copied):
    """They have the matrices, and nothing says which files these go with."""
    shutil.rmtree(copied / "checkpoint-6")
    file = copied / "checkpoint-4" / PROJECTIONS
    save_file(load_file(file), file)
    if whole[2]:
        drop_from_state(copied / "checkpoint-4", PROJECTIONS)
    assert fault_of(copied / "checkpoint-4") is None
    assert_ends_alike(whole, copied)


def drop_from_state(folder: Path, name: str) -> None:
    from hf_prune.resume import write_state

    state = read_state(folder / STATE)
    assert state["files"].pop(name)
    write_state(state, folder / STATE)


def test_where_no_checkpoint_has_matrices_none_is_set_aside(copied, whole):
    """A teacher that joins a run later finds none: it says so, and takes nothing away."""
    for folder in copied.glob("checkpoint-*"):
        file = folder / PROJECTIONS
        file.unlink()
        if whole[2]:
            drop_from_state(folder, PROJECTIONS)
    with pytest.raises(CheckpointError, match=f"no {PROJECTIONS}.*Received"):
        make_trainer(copied, whole[2]).train(resume_from_checkpoint=True)
    assert folders_in(copied) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_another_trainer_in_the_same_folder_needs_no_matrices(copied):
    make_trainer(copied, True)  # would need them
    callback = PruningCallback(schedule=SOON, **UNITS)
    arguments = training_arguments(copied, save_strategy="steps", save_steps=2, max_steps=8)
    Trainer(build_bert(), arguments, train_dataset=draw_rows(build_bert(), 24), callbacks=[callback]).train()
    assert latest_checkpoint(copied) == copied / "checkpoint-8"


def test_parts_join_before_the_state_and_leave(tmp_path):
    folder, state, order = tmp_path / "checkpoint-1", TrainerState(), []
    folder.mkdir()

    def add(name: str) -> Any:
        def write(folder: Path) -> None:
            order.append((name, sorted(os.listdir(folder))))
            write_part({"a": torch.ones(2)}, folder / name)

        return write

    for name in (STATE, "b.safetensors", "a.safetensors"):
        join_checkpoints(state, name, add(name))
    for _ in range(2):
        order.clear()
        state.save_to_json(str(folder / TRAINER))
        assert order == [
            ("b.safetensors", []),
            ("a.safetensors", ["b.safetensors"]),
            (STATE, ["a.safetensors", "b.safetensors"]),
        ]
        assert fault_of(folder) == "trainer_state.json is of step 0"
    for name in (STATE, "b.safetensors", "a.safetensors"):
        assert "save_to_json" in vars(state)
        leave_checkpoints(state, name)
    assert "save_to_json" not in vars(state)


def test_a_part_of_several_processes_says_nothing_of_their_random_states(tmp_path):
    """The others write theirs when they please."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / MODEL)
    for rank in (0, 1):
        torch.save({"a": rank}, folder / f"rng_state_{rank}.pth")
    write_part({"a": torch.ones(2)}, folder / PROJECTIONS)
    (folder / TRAINER).write_text('{"global_step": 1}')
    torch.save({"b": 3}, folder / "rng_state_1.pth")
    assert fault_of(folder) is None
    save_file({"a": torch.zeros(2)}, folder / MODEL)
    assert fault_of(folder) == f"{MODEL} is of another save"
