"""Distillation: the loss by hand, the same gradient however a batch is cut up, and teachers of every form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    UNEVEN,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    logits_of,
    training_arguments,
    units_of,
)
from torch import tensor
from torch.nn import functional
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_prune import (
    Distillation,
    DistillationMixin,
    DistillationTrainer,
    PruningError,
    load_pruned,
    save_pruned,
    shrink,
)
from hf_prune.distillation import count_items, logits_loss, loss_rows

BUILDERS = {"bert": build_bert, "llama": build_llama}


def make_trainer(folder: Path, model: Any, teacher: Any = None, rows: int = 16, **changes: Any) -> Any:
    distillation = changes.pop("distillation", None)
    return DistillationTrainer(
        model,
        training_arguments(folder, **{"max_steps": 1, "max_grad_norm": 1e9, **changes}),
        train_dataset=draw_rows(model, rows),
        eval_dataset=draw_rows(model, 4, seed=1),
        teacher=teacher if teacher is not None else type(model)(model.config).eval(),
        distillation=distillation,
    )


def test_kl_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher = tensor([[math.log(3), 0.0]])
    assert logits_loss(torch.zeros(1, 2), teacher, 1.0).item() == pytest.approx(kl)
    assert logits_loss(torch.zeros(1, 2), 2 * teacher, 2.0).item() == pytest.approx(4 * kl)
    rows = torch.cat([teacher, torch.zeros(3, 2)])
    assert logits_loss(torch.zeros(4, 2), rows, 1.0).item() == pytest.approx(kl / 4)


def test_regression_takes_the_squared_difference():
    assert logits_loss(tensor([[1.0], [2.0]]), tensor([[0.0], [4.0]]), 2.0).item() == 2.5


def test_rows_are_those_that_the_labels_are_compared_with():
    logits = torch.arange(6.0).view(1, 3, 2)
    labels = tensor([[0, -100, 1]])
    assert loss_rows(build_llama(), logits, labels).tolist() == [[2, 3]]
    assert loss_rows(build_bert("ForTokenClassification"), logits, labels).tolist() == [[0, 1], [4, 5]]
    assert loss_rows(build_bert(), logits[0], tensor([0, 1, 1])).shape == (3, 2)
    assert count_items(build_llama(), labels) == 1
    assert count_items(build_bert("ForTokenClassification"), labels) == 2
    assert count_items(build_bert(), tensor([0, 1, 1])) == 3
    assert count_items(build_bert(), tensor([0.5, -100.0])) == 2


def gradient_norm(folder: Path, build: Any, rows: int, **changes: Any) -> float:
    trainer = make_trainer(folder, build(), build(seed=1), rows, **changes)
    trainer.train()
    return next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("rows", [16, 14])
def test_gradient_norm_does_not_depend_on_accumulation(name, rows, tmp_path):
    """14 rows fall into 4 + 4 + 4 + 2; Llama's rows have uneven numbers of labels."""
    whole = gradient_norm(tmp_path, BUILDERS[name], rows, per_device_train_batch_size=16)
    parts = gradient_norm(tmp_path, BUILDERS[name], rows, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert whole > 0.01
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_loss_is_the_mix_that_the_settings_say(name, tmp_path):
    model, teacher = BUILDERS[name](), BUILDERS[name](seed=1)
    batch = draw_batch(model)
    settings = Distillation(temperature=3.0, hard=0.2, logits=0.7)
    trainer = make_trainer(tmp_path, model, teacher, distillation=settings)
    student, other, labels = logits_of(model, batch), logits_of(teacher, batch), batch["labels"]
    if name == "llama":
        keep = labels[:, 1:] != -100
        student, other, labels = student[:, :-1][keep], other[:, :-1][keep], labels[:, 1:][keep]
    hard = functional.cross_entropy(student, labels)
    soft = functional.kl_div((student / 3).log_softmax(-1), (other / 3).softmax(-1), reduction="batchmean")
    loss = trainer.compute_loss(model.train(), batch)
    assert loss.item() == pytest.approx((0.2 * hard + 0.7 * 9 * soft).item(), rel=1e-4)


def test_gradients_are_those_of_the_formula(tmp_path):
    model, teacher = build_bert(), build_bert(seed=1)
    batch = draw_batch(model, rows=16)
    twin = build_bert()
    logits, target = twin(**batch).logits, teacher(**batch).logits.detach()
    loss = 0.5 * functional.cross_entropy(logits, batch["labels"])
    loss = loss + 0.5 * 4 * functional.kl_div(
        (logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean"
    )
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
    reached = gradient_norm(tmp_path, build_bert, 16, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert reached == pytest.approx(norm.item(), rel=1e-4)


def test_terms_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, build_bert(), max_steps=4, logging_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert all(entry["distillation_hard"] > 0 and entry["distillation_logits"] > 0 for entry in entries)


def test_evaluation_is_the_models_own_loss(tmp_path):
    model = build_bert()
    loss = model(**draw_batch(model, 4, seed=1)).loss.item()
    assert make_trainer(tmp_path, model).evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_self_is_the_weights_at_construction(tmp_path):
    model = build_bert()
    trainer = make_trainer(tmp_path, model, "self", max_steps=3)
    trainer.train()
    assert not torch.equal(model.classifier.weight, build_bert().classifier.weight)
    assert_same_weights(build_bert(), trainer.teacher)
    assert not trainer.teacher.training
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    shrink(model, UNEVEN)
    assert units_of(trainer.teacher, None) == units_of(build_bert(), None)


def test_a_folder_is_a_teacher(tmp_path):
    teacher = shrink(build_bert(seed=1), UNEVEN)
    save_pruned(teacher, tmp_path / "teacher")
    for path in (tmp_path / "teacher", str(tmp_path / "teacher")):
        trainer = make_trainer(tmp_path, build_bert(), path)
        assert_same_weights(teacher, trainer.teacher)
        trainer.train()


def test_a_model_is_a_teacher_and_stays_what_it_was(tmp_path):
    teacher = build_bert(seed=1, hidden_size=32)
    trainer = make_trainer(tmp_path, build_bert(), teacher, max_steps=2)
    trainer.train()
    assert trainer.teacher is teacher
    assert_same_weights(build_bert(seed=1, hidden_size=32), teacher)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(build_bert(num_labels=3), build_bert(num_labels=5)), (build_llama(), build_llama(vocab_size=64))],
)
def test_a_teacher_of_another_width_is_refused(student, teacher, tmp_path):
    with pytest.raises(PruningError, match="Received: "):
        make_trainer(tmp_path, student, teacher)


def test_a_teacher_is_required(tmp_path):
    with pytest.raises(TypeError, match="teacher"):
        DistillationTrainer(build_bert(), training_arguments(tmp_path))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"hard": -1}, {"logits": -0.1}, {"temprature": 2}])
def test_settings_check_themselves(settings):
    with pytest.raises(PruningError, match=next(iter(settings))):
        Distillation(**settings)


def test_mixin_goes_with_any_trainer(tmp_path):
    class Own(DistillationMixin, Seq2SeqTrainer):
        pass

    model = build_bert()
    arguments = Seq2SeqTrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = Own(model, arguments, train_dataset=draw_rows(model, 8), teacher="self")
    trainer.train()
    assert isinstance(trainer, Trainer)
    assert trainer.state.global_step == 1


def test_distilling_alone_pulls_the_student_to_the_teacher(tmp_path):
    model, teacher = build_bert(), build_bert(seed=1)
    batch = draw_batch(model, 16)

    def distance() -> float:
        return logits_loss(logits_of(model, batch), logits_of(teacher, batch), 1.0).item()

    before = distance()
    settings = Distillation(hard=0.0, logits=1.0)
    make_trainer(tmp_path, model, teacher, max_steps=60, per_device_train_batch_size=16, distillation=settings).train()
    assert distance() < before / 4


def test_a_saved_student_is_a_plain_model(tmp_path):
    trainer = make_trainer(tmp_path, build_bert(), "self")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert_same_weights(trainer.model, load_pruned(tmp_path / "final", dtype=torch.float32))
