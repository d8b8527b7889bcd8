"""A teacher's answers that are kept: asked once a row, found again whatever the padding, refused where rows change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_same_weights, build_bert, build_llama, draw_rows, training_arguments
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, default_data_collator

from hf_prune import Distillation, DistillationTrainer, PruningError
from hf_prune.distillation.memory import Memory, row_keys


class Counting(torch.nn.Module):
    """Counts a teacher's forwards."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.forwards = 0
        teacher.register_forward_hook(lambda *_: setattr(self, "forwards", self.forwards + 1))


def train(folder, student, teacher, cache=None, callbacks=(), resume=None) -> Any:
    """Train on two batches in three epochs."""
    trainer = DistillationTrainer(
        student,
        training_arguments(folder, num_train_epochs=3, max_steps=-1, per_device_train_batch_size=4),
        train_dataset=draw_rows(student, 8),
        teacher=teacher,
        callbacks=list(callbacks),
        distillation=Distillation(cache=cache and str(cache)),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def pair(build=build_bert):
    torch.manual_seed(0)
    return build(), type(build())(build().config).eval()


def test_a_teacher_is_asked_once_a_row_in_all_epochs_and_runs(tmp_path):
    student, teacher = pair()
    counted, cache = Counting(teacher), tmp_path / "answers"
    fresh = train(tmp_path / "a", build_bert(), teacher)
    assert counted.forwards == 6
    counted.forwards = 0
    kept = train(tmp_path / "b", build_bert(), teacher, cache)
    assert counted.forwards == 2
    assert_same_weights(kept.model, fresh.model, atol=1e-6)
    counted.forwards = 0
    again = train(tmp_path / "c", build_bert(), teacher, cache)
    assert counted.forwards == 0
    assert_same_weights(again.model, kept.model, atol=1e-6)
    assert len(list(cache.iterdir())) == 1
    with torch.no_grad():
        next(teacher.parameters()).add_(0.1)
    train(tmp_path / "d", student, teacher, cache)
    assert counted.forwards == 2  # another teacher
    assert len(list(cache.iterdir())) == 2


class StopsIn(TrainerCallback):
    """Ends a training in a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.step


def test_a_resumed_run_finds_what_the_first_one_had_asked(tmp_path):
    _, teacher = pair()
    whole = train(tmp_path / "whole", build_bert(), teacher, tmp_path / "one")
    train(tmp_path / "run", build_bert(), teacher, tmp_path / "two", callbacks=[StopsIn(1)])
    counted = Counting(teacher)
    resumed = train(tmp_path / "run", build_bert(), teacher, tmp_path / "two", resume=tmp_path / "run" / "checkpoint-1")
    assert counted.forwards == 1  # the second batch of the first epoch
    assert_same_weights(resumed.model, whole.model, atol=0)
    later = train(
        tmp_path / "whole", build_bert(), teacher, tmp_path / "three", resume=tmp_path / "run" / "checkpoint-1"
    )
    assert_same_weights(later.model, whole.model, atol=1e-6)  # it had asked elsewhere


def test_a_row_is_the_same_whatever_its_padding():
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    wider = {name: torch.nn.functional.pad(one, (0, 4)) for name, one in batch.items()}
    left = {name: torch.nn.functional.pad(one, (2, 0)) for name, one in batch.items()}
    assert row_keys(batch) == row_keys(wider) == row_keys(left)
    assert len({*row_keys(batch), *row_keys({**batch, "token_type_ids": torch.ones_like(ids)})}) == 4
    images = {"pixel_values": torch.zeros(2, 1, 2, 2)}
    images["pixel_values"][1, 0, 0, 0] = 1e-7
    assert len({*row_keys(images)}) == 2
    assert row_keys({**images, "return_dict": True}) != row_keys(images)


def test_processes_find_what_others_have_asked(tmp_path):
    teacher = build_bert().eval()
    batches = [{"input_ids": torch.full((1, 3), n)} for n in (1, 2)]
    for rank, batch in enumerate(batches):
        memory = Memory(tmp_path, teacher, rank=rank)
        memory.answers(batch, lambda n=rank: {"logits": torch.full((1, 2), float(n))})
        memory.write()
    memory = Memory(tmp_path, teacher, rank=0)
    found = [memory.answers(batch, lambda: pytest.fail("asked"))["logits"] for batch in batches]
    assert torch.equal(torch.cat(found), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert (memory.asked, memory.found) == (2, 2)
    assert not Memory(tmp_path, teacher, "bf16").known


def test_a_row_keeps_its_first_answer_and_is_written_once(tmp_path):
    """Also where a batch has rows that are known and others."""
    memory = Memory(tmp_path, build_bert())
    for rows, value in ((1, 1.0), (2, 2.0)):
        ids = torch.arange(rows).view(-1, 1)
        memory.answers({"input_ids": ids}, lambda n=rows, v=value: {"logits": torch.full((n, 2), v)})
        memory.write()
    found = memory.answers({"input_ids": torch.tensor([[0], [1]])}, lambda: pytest.fail("asked"))["logits"]
    assert found.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert [len(load_file(path)["keys"]) for path in sorted(tmp_path.iterdir())] == [1, 1]


def test_a_damaged_file_counts_for_nothing(tmp_path):
    memory = Memory(tmp_path, build_bert())
    memory.answers({"input_ids": torch.ones(1, 2)}, lambda: {"logits": torch.ones(1, 2)})
    memory.write()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert not Memory(tmp_path, build_bert()).known


def test_rows_that_change_each_time_are_refused(tmp_path):
    student, teacher = pair()

    def augment(rows: list[Any]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        batch["input_ids"] = torch.randint_like(batch["input_ids"], 5, 30)
        return batch

    trainer = DistillationTrainer(
        student, training_arguments(tmp_path, num_train_epochs=3, max_steps=-1), train_dataset=draw_rows(student, 8),
        teacher=teacher, data_collator=augment, distillation=Distillation(cache=str(tmp_path / "answers")),
    )  # fmt: skip
    with pytest.raises(PruningError, match="leave it out where data are augmented.*8 rows of which none was known"):
        trainer.train()


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(PruningError, match=r"cache keeps a teacher's logits: .* where hidden is above 0. Received"):
        Distillation(cache="answers", hidden=1.0)
    student, teacher = pair(build_llama)
    with pytest.raises(PruningError, match=r"one row of logits for each row that they read.*Received: \(4, "):
        train(tmp_path / "run", student, teacher, tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    student, teacher = pair()
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(PruningError, match=r"cache must be a folder that can be written. Received: '.*file"):
            train(tmp_path / "run", student, teacher, tmp_path / place)
    with pytest.raises(PruningError, match=r"distillation.cache must be .* Received: '/proc/x' \("):
        train(tmp_path / "run", student, teacher, "/proc/x")  # root has all rights there


def test_a_disk_that_fills_does_not_end_training(tmp_path, caplog):
    student, teacher = pair()
    (tmp_path / "answers").mkdir()

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (tmp_path / "answers").rename(tmp_path / "away")
                (tmp_path / "answers").write_text("in the way")

    trainer = train(tmp_path / "run", student, teacher, tmp_path / "answers", [Full()])
    assert trainer.state.global_step == 6
    assert "distillation.cache" in caplog.text
    assert len(trainer.lesson.memory.known) == 8


def test_the_same_weights_under_another_config_are_another_teacher(tmp_path):
    student, teacher = pair()
    train(tmp_path / "a", student, teacher, tmp_path / "answers")
    other = build_bert(hidden_act="relu")
    other.load_state_dict(teacher.state_dict())
    counted = Counting(other)
    train(tmp_path / "b", build_bert(), other, tmp_path / "answers")
    assert counted.forwards == 2


def test_a_file_that_holds_something_else_is_asked_anew(tmp_path):
    student, teacher = pair()
    train(tmp_path / "a", student, teacher, tmp_path / "answers")
    (file,) = (tmp_path / "answers").iterdir()
    for keys, logits in ((torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(3, 7)), (torch.zeros(2), torch.zeros(()))):
        save_file({"keys": keys, "logits": logits, "lengths": torch.ones(2, dtype=torch.long)}, file)
        counted = Counting(teacher)
        train(tmp_path / "b", build_bert(), teacher, tmp_path / "answers")
        assert counted.forwards == 2


def test_a_teacher_that_changes_before_training_is_asked_anew(tmp_path):
    """The Trainer was made while the teacher was still to be trained."""
    _, teacher = pair()
    train(tmp_path / "a", build_bert(), teacher, tmp_path / "answers")
    counted, models = Counting(teacher), [build_bert(), build_bert()]
    settings = [Distillation(cache=str(tmp_path / "answers")), Distillation()]
    trainers = [
        DistillationTrainer(
            model, training_arguments(tmp_path), train_dataset=draw_rows(model, 8), teacher=teacher, distillation=one
        )
        for model, one in zip(models, settings)
    ]
    with torch.no_grad():
        for one in teacher.parameters():
            one.mul_(1.5)
    trainers[0].train()
    assert counted.forwards == 2
    trainers[1].train()
    assert_same_weights(models[0], models[1], atol=1e-6)
