"""What is compared of both models' outputs, which model learns, and what a checkpoint brings back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import (
    assert_same_weights,
    build_bert,
    build_llama,
    build_vit,
    draw_batch,
    draw_rows,
    logits_of,
    training_arguments,
)
from torch.nn import functional

from hf_prune import (
    CheckpointError,
    Distillation,
    DistillationTrainer,
    HeadPruner,
    NeuronPruner,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
)
from hf_prune.distillation import load_teacher
from hf_prune.distillation.losses import hidden_loss
from hf_prune.distillation.outputs import pool
from hf_prune.distillation.trainer import Lesson

WEIGHTS = {"hard": 1.0, "logits": 1.0, "hidden": 0.0, "attention": 0.0}
WHOLE = {"per_device_train_batch_size": 16}  # the order of rows is nobody's matter then
WIDER = Distillation(hidden=1.0)  # of a teacher of another width: matrices are learned between the two


def term_of(student: Any, teacher: Any, batch: Any) -> torch.Tensor:
    return Lesson(student, teacher, Distillation()).terms(student, batch, [], WEIGHTS)[1]["logits"]


# words
SIZES = pytest.mark.parametrize(("student", "teacher"), [(60, 63), (63, 60)])


@SIZES
@pytest.mark.parametrize("labelled", [True, False])
def test_padded_words_do_not_count(student, teacher, labelled, tmp_path):
    """The common words are a distribution of their own: by hand, in both directions."""
    models = [build_llama(seed, vocab_size=size) for seed, size in enumerate((student, teacher))]
    batch = draw_batch(models[0])
    ours, theirs = (logits_of(model, batch)[..., :60].div(2) for model in models)
    terms = functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1) * 4
    counts, shift = batch["attention_mask"].bool(), 0
    if labelled:
        counts, shift = batch["labels"][:, 1:] != -100, 1
    expected = terms[:, : terms.shape[1] - shift]
    if labelled:
        expected = expected[counts].mean()
    else:
        del batch["labels"]
        expected = torch.stack([row[keep].mean() for row, keep in zip(expected, counts)]).mean()
    assert term_of(*models, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def build_bart(seed: int = 0, **changes: Any) -> Any:
    sizes = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    config = transformers.BartConfig(
        d_model=16, max_position_embeddings=40, dropout=0.0, pad_token_id=0, **sizes, **changes
    )
    return models.randomize(transformers.BartForConditionalGeneration(config), seed)


def build_masked(seed: int = 0, **changes: Any) -> Any:
    return build_bert("ForMaskedLM", seed, **changes)


@SIZES
@pytest.mark.parametrize("build", [build_bart, build_masked])
def test_padded_words_of_other_language_models_do_not_count(build, student, teacher):
    pair = [build(seed, vocab_size=size) for seed, size in enumerate((student, teacher))]
    batch = draw_batch(pair[0])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    counts = batch["labels"] != -100
    ours, theirs = (logits_of(model, batch)[..., :60][counts].div(2) for model in pair)
    expected = 4 * functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    assert term_of(*pair, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_one_warning_says_both_sizes(tmp_path, caplog):
    student, teacher = build_llama(), build_llama(1, vocab_size=63)
    options = {"args": training_arguments(tmp_path, max_steps=2), "train_dataset": draw_rows(student, 8)}
    DistillationTrainer(student, teacher=teacher, **options).train()
    assert [one.getMessage() for one in caplog.records if one.name.startswith("hf_prune")] == [
        "The student has 60 words and the teacher 63: the first 60 are compared, as a distribution of their own"
    ]


def test_vocabularies_that_share_less_are_refused(tmp_path):
    for ours, theirs in ((60, 64), (64, 60)):
        with pytest.raises(PruningError, match=rf"at least 95% .*Received: {theirs} words for the student's {ours}"):
            load_teacher(build_llama(1, vocab_size=theirs), build_llama(vocab_size=ours))


def test_words_that_only_the_student_has_may_pad():
    """As a token for padding does that was added to the student."""
    student, teacher = build_llama(vocab_size=63), build_llama(1)
    batch = draw_batch(student)
    padded = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 62)}
    assert term_of(student, teacher, padded).item() == pytest.approx(term_of(student, teacher, batch).item())
    batch["input_ids"][0, 0] = 61
    with pytest.raises(PruningError, match=r"teacher of 60 words .* Received: input_ids with the word 61"):
        term_of(student, teacher, batch)


# labels
def named(names: list[str], seed: int = 0, build: Any = build_bert) -> Any:
    model = build(seed=seed)
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))
    return model


@pytest.mark.parametrize("build", [build_bert, build_vit])
def test_labels_in_another_order_are_brought_into_the_students(build):
    student = named(["no", "maybe", "yes"], build=build)
    other = named(["YES", "no", "Maybe"], build=build)
    order = [2, 0, 1]  # the student's number of each of its labels
    for parameter in other.classifier.parameters():
        parameter.data = parameter.data[order].clone()
    batch = draw_batch(student)
    assert term_of(student, other, batch).item() == pytest.approx(0, abs=1e-6)
    other.config.id2label = {number: f"LABEL_{number}" for number in range(3)}
    other.config.label2id = {name: number for number, name in other.config.id2label.items()}
    assert term_of(student, other, batch).item() > 1e-3


def test_other_labels_are_refused_with_both_lists():
    student, teacher = named(["no", "maybe", "yes"]), named(["negative", "neutral", "positive"], 1)
    with pytest.raises(PruningError, match=r"'no', 'maybe', 'yes'.*Received: \['negative', 'neutral', 'positive'\]"):
        load_teacher(teacher, student)
    assert load_teacher(build_bert(seed=1), student) is not None  # LABEL_0 and so on say nothing
    heads = [build_bert("Model", seed, label2id={a: 0, b: 1}, id2label={0: a, 1: b}, num_labels=2)
             for seed, (a, b) in enumerate((("x", "y"), ("u", "v")))]  # fmt: skip
    assert load_teacher(heads[1], heads[0]) is heads[1]  # no labels come out of these


# half precision
def test_terms_are_computed_in_float32():
    """Sums of a long text, and squares of large states, are beyond float16."""
    hidden = torch.full((1, 400, 4), 400.0, dtype=torch.float16)
    assert pool(hidden, torch.ones(1, 400)).tolist() == [[400.0] * 4]
    assert pool(hidden, None).dtype == torch.float32
    assert hidden_loss(hidden, hidden * 2, None).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["bf16", "fp16 weights"])
def test_half_precision_learns_what_float32_does(name, tmp_path):
    losses = []
    for half in (False, True):
        student, teacher = build_bert(), build_bert(seed=1, hidden_size=32)
        options = {"bf16": half} if name == "bf16" else {}
        if half and name == "fp16 weights":
            teacher = teacher.half()
        trainer = DistillationTrainer(
            student, training_arguments(tmp_path, max_steps=2, **options), train_dataset=draw_rows(student, 8),
            teacher=teacher, distillation=WIDER,
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0])
    for key in ("loss", "distillation_logits", "distillation_hidden"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=0.05)


# the model that learns
def searched(folder: Path, teacher: Any, begun: list[Any], **changes: Any) -> Any:
    def begin(trial: Any = None) -> Any:
        model = build_bert(seed=0 if trial is None else trial.number)
        begun.append(copy.deepcopy(model))
        return model

    arguments = training_arguments(folder, **{"max_steps": 3, "seed": 7, **WHOLE, **changes})
    trainer = DistillationTrainer(
        args=arguments, model_init=begin, train_dataset=draw_rows(build_bert(), 16),
        eval_dataset=draw_rows(build_bert(), 4), teacher=teacher, distillation=WIDER,
    )  # fmt: skip
    return PruningCallback(
        [HeadPruner(), NeuronPruner()], Schedule(begin=1, end=2, frequency=1), target=Target(macs=0.5)
    ).attach(trainer)


def terms_logged(trainer: Any) -> list[float]:
    return [entry["distillation_hidden"] for entry in trainer.state.log_history if "distillation_hidden" in entry]


def test_every_trial_has_a_lesson_of_its_own(tmp_path):
    """Each learns as a Trainer of its own does, whose student is pruned and shrunk: matrices drawn by its seed too."""
    pytest.importorskip("optuna")
    begun: list[Any] = []
    teacher = build_bert(seed=9, hidden_size=32)
    trainer = searched(tmp_path, teacher, begun)
    seen: list[tuple[int, list[float], Any]] = []

    def objective(metrics: Any) -> float:
        projection = trainer.lesson.projections["layers"].weight
        assert any(one is projection for group in trainer.optimizer.param_groups for one in group["params"])
        assert trainer.lesson.student is trainer.model
        assert not any(module._forward_hooks for module in [*trainer.model.modules(), *teacher.modules()])
        seen.append((trainer.args.seed, terms_logged(trainer), projection.detach().clone()))
        return metrics["eval_loss"]

    trainer.hyperparameter_search(
        lambda trial: {"seed": 3 + trial.number}, objective, n_trials=2, backend="optuna", direction="minimize"
    )
    assert [seed for seed, _, _ in seen] == [3, 4]
    for number, (seed, terms, projection) in enumerate(seen):
        alone = DistillationTrainer(
            copy.deepcopy(begun[1 + number]), training_arguments(tmp_path, max_steps=3, seed=seed, **WHOLE),
            train_dataset=draw_rows(build_bert(), 16), teacher=teacher, distillation=WIDER,
        )  # fmt: skip
        PruningCallback(
            [HeadPruner(), NeuronPruner()], Schedule(begin=1, end=2, frequency=1), target=Target(macs=0.5)
        ).attach(alone).train()
        assert terms_logged(alone) == pytest.approx(terms, abs=2e-3)
        torch.testing.assert_close(alone.lesson.projections["layers"].weight.detach(), projection, atol=1e-3, rtol=0)


def test_self_is_what_each_trial_begins_with(tmp_path):
    begun: list[Any] = []
    trainer = searched(tmp_path, "self", begun)
    for _ in range(2):
        trainer.train()
        assert trainer.lesson.student is trainer.model
        assert_same_weights(begun[-1], trainer.teacher)
        assert terms_logged(trainer)[0] == pytest.approx(0, abs=1e-4)
        assert terms_logged(trainer)[-1] > 1e-3


def test_a_model_that_takes_anothers_place_learns(tmp_path):
    trainer = DistillationTrainer(
        build_bert(), training_arguments(tmp_path, max_steps=1), train_dataset=draw_rows(build_bert(), 8),
        teacher=build_bert(seed=1), distillation=WIDER,
    )  # fmt: skip
    trainer.model = trainer.model_wrapped = build_bert(seed=2)
    trainer.train()
    alone = DistillationTrainer(
        build_bert(seed=2), training_arguments(tmp_path, max_steps=1), train_dataset=draw_rows(build_bert(), 8),
        teacher=build_bert(seed=1), distillation=WIDER,
    )  # fmt: skip
    alone.train()
    assert terms_logged(trainer) == terms_logged(alone)
    assert_same_weights(alone.model, trainer.model)


# what is learned beside the model
def test_a_checkpoint_has_the_matrices_before_it_is_whole(tmp_path):
    """Killed in between, a folder has no trainer_state.json, and nobody resumes from it."""

    def build() -> Any:
        arguments = training_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        return DistillationTrainer(
            build_bert(), arguments, train_dataset=draw_rows(build_bert(), 16),
            teacher=build_bert(seed=1, hidden_size=32), distillation=WIDER,
        )  # fmt: skip

    whole = build()
    whole.train()
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 4)]
    for folder in folders:
        times = [(folder / name).stat().st_mtime_ns for name in ("distillation.safetensors", "trainer_state.json")]
        assert times == sorted(times)
    for file in folders[1].iterdir():
        file.unlink()
    folders[1].rmdir()
    resumed = build()
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.lesson.projections, resumed.lesson.projections)
    (folders[0] / "distillation.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no distillation.safetensors.*Received"):
        build().train(resume_from_checkpoint=str(folders[0]))
