"""The most probable words of a language model's teacher, kept on disk: by hand, exact with all, without padding."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    logits_of,
    randomize,
    training_arguments,
)
from torch import Tensor, tensor
from torch.nn import functional

from hf_prune import Distillation, DistillationTrainer, PruningError
from hf_prune.distillation.kept import form_of
from hf_prune.distillation.lesson import Lesson
from hf_prune.distillation.losses import Top, divergence, top_divergence, top_of
from hf_prune.distillation.memory import Memory, row_keys

WEIGHTS = {"hard": 1.0, "logits": 1.0, "hidden": 0.0, "attention": 0.0}


def build_masked(seed: int = 0, **changes: Any) -> Any:
    return build_bert("ForMaskedLM", seed, **changes)


def build_bart(seed: int = 0, **changes: Any) -> Any:
    config = transformers.BartConfig(
        d_model=16, max_position_embeddings=40, dropout=0.0, pad_token_id=0, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        **{"vocab_size": 60, **changes},
    )  # fmt: skip
    return randomize(transformers.BartForConditionalGeneration(config), seed)


def build_gpt2(seed: int = 0) -> Any:
    config = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=40)
    return randomize(transformers.GPT2LMHeadModel(config), seed).eval()


BUILDERS = {"causal": build_llama, "masked": build_masked, "seq2seq": build_bart}


def batch_of(model: Any, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return texts whose every word has a label; a decoder's are in other numbers than the encoder's."""
    batch = draw_batch(model, rows, seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    longer = model.config.is_encoder_decoder
    return {**batch, "labels": functional.pad(labels.flip(0), (0, 2), value=-100) if longer else labels}


def told(folder: Path, **changes: Any) -> Distillation:
    return Distillation(**{"cache": str(folder), "top_k": 60, "cache_dtype": "float32", **changes})


def lesson_of(student: Any, teacher: Any, settings: Distillation) -> Lesson:
    memory = Memory(settings.cache, teacher, form=form_of(settings, student, teacher)) if settings.cache else None
    return Lesson(student, teacher, settings, memory=memory)


def term_of(lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
    return lesson.terms(lesson.student, batch, [], WEIGHTS)[1]["logits"]


# by hand
def test_the_rest_is_one_word_more():
    """Teacher (1/2, 1/4, 1/8, 1/8), two words kept: (1/2, 1/4, 1/4) against a uniform student's (1/4, 1/4, 1/2)."""
    top = top_of(tensor([[2.0, 8.0, 2.0, 4.0]]).log(), 2, 1.0)
    assert top.ids.tolist() == [[1, 3]]
    assert top.logs.exp().tolist() == [[pytest.approx(0.5), pytest.approx(0.25), pytest.approx(0.25)]]
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert top_divergence(torch.zeros(1, 4), top, 1.0).item() == pytest.approx(kl)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_fewer_words_never_say_more(temperature):
    """With all words the divergence is the whole one, its gradient too; a word less is the same, as its rest is one."""
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    whole = divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(whole.sum(), student)
    terms = [top_divergence(student, top_of(teacher, count, temperature), temperature) for count in range(1, 10)]
    assert all((more >= less - 1e-6).all() for less, more in itertools.pairwise(terms))
    for exact in terms[-2:]:
        torch.testing.assert_close(exact, whole, atol=1e-6, rtol=1e-5)
        (own,) = torch.autograd.grad(exact.sum(), student, retain_graph=True)
        torch.testing.assert_close(own, gradient, atol=1e-6, rtol=1e-5)
    itself = top_of(student.detach(), 3, temperature)
    rounded = Top(itself.logs.half().float(), itself.ids)
    assert top_divergence(student, rounded, temperature).abs().max() < 1e-4


# as the live teacher
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("sizes", [(60, 60), (60, 63), (63, 60)])
@pytest.mark.parametrize("name", BUILDERS)
def test_all_words_are_the_live_teachers_term(name, sizes, labelled, tmp_path):
    student, teacher = (BUILDERS[name](seed, vocab_size=size).eval() for seed, size in enumerate(sizes))
    batch = batch_of(student)
    batch = batch if labelled or name == "seq2seq" else {key: batch[key] for key in ("input_ids", "attention_mask")}
    live = term_of(lesson_of(student, teacher, Distillation()), batch).item()
    kept = lesson_of(student, teacher, told(tmp_path))
    for again in range(2):
        assert term_of(kept, batch).item() == pytest.approx(live, rel=1e-5)
        assert kept.memory.found == 4 * again
    kept.memory.write()
    later = lesson_of(student, teacher, told(tmp_path))
    assert term_of(later, batch).item() == pytest.approx(live, rel=1e-5)
    assert later.memory.new == 0


def train(folder: Path, build: Any, teacher: Any, settings: Distillation, **resume: Any) -> Any:
    """Train on two batches in three epochs."""
    student = build()
    batch = batch_of(student, 8)
    trainer = DistillationTrainer(
        student, training_arguments(folder, num_train_epochs=3, max_steps=-1, save_strategy="steps", save_steps=1),
        train_dataset=[{key: value[row] for key, value in batch.items()} for row in range(8)], teacher=teacher,
        distillation=settings,
    )  # fmt: skip
    trainer.train(**resume)
    return trainer


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_a_language_model_is_asked_once_a_text(name, tmp_path):
    teacher, calls, cache = BUILDERS[name](1).eval(), list[int](), tmp_path / "answers"
    live = train(tmp_path / "live", BUILDERS[name], teacher, Distillation())
    teacher.register_forward_hook(lambda *_: calls.append(1))
    kept = train(tmp_path / "kept", BUILDERS[name], teacher, told(cache))
    assert len(calls) == 2
    terms = [[one["distillation_logits"] for one in run.state.log_history[:-1]] for run in (live, kept)]
    assert terms[1] == pytest.approx(terms[0], abs=2e-4)
    step = tmp_path / "kept" / "checkpoint-3"
    resumed = train(tmp_path / "kept", BUILDERS[name], teacher, told(cache), resume_from_checkpoint=str(step))
    assert len(calls) == 2
    assert_same_weights(resumed.model, kept.model, atol=0)
    assert len({*cache.iterdir()}) == 2  # one a checkpoint in which there was something new
    train(tmp_path / "other", BUILDERS[name], teacher, told(cache, temperature=3.0))
    assert len(calls) == 4


def test_few_words_in_half_precision_are_near_and_small(tmp_path):
    student, teacher = build_llama(), build_llama(1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(8)  # sure of few words, as trained models are
    batch = batch_of(student)
    exact, half = (
        lesson_of(student, teacher, told(tmp_path / dtype, top_k=8, cache_dtype=dtype))
        for dtype in ("float32", "float16")
    )
    near = term_of(exact, batch).item()
    assert term_of(half, batch).item() == pytest.approx(near, rel=1e-3)
    live = term_of(lesson_of(student, teacher, Distillation()), batch).item()
    assert 0.5 * live < near <= live
    tokens = int(batch["attention_mask"].sum())
    for lesson, bytes_a_token in ((exact, 8 * 8 + 4), (half, 6 * 8 + 2)):
        lesson.memory.write()
        (file,) = Path(lesson.settings.cache).iterdir()
        assert 0 < file.stat().st_size - tokens * bytes_a_token < 600  # keys, lengths and the header


# padding
def test_padding_on_either_side_is_left_out(tmp_path):
    """What a padded position says of the first word behind it is no answer to a text."""
    student, teacher = build_llama().eval(), build_llama(1).eval()
    right = batch_of(student)
    counts = right["attention_mask"].sum(1)
    left = {
        key: torch.stack([row.roll(9 - int(count)) for row, count in zip(value, counts)])
        for key, value in right.items()
    }
    lesson = lesson_of(student, teacher, told(tmp_path))
    term = term_of(lesson, right).item()
    assert term_of(lesson, left).item() == pytest.approx(term, rel=1e-4)
    assert (lesson.memory.asked, lesson.memory.found) == (8, 4)
    labels = {**right, "labels": right["input_ids"]}  # padding has labels too
    logits = (logits_of(model, right)[:, :-1][right["attention_mask"][:, :-1].bool()] for model in (student, teacher))
    assert term_of(lesson, labels).item() == pytest.approx(divergence(*logits, 2.0).mean().item(), rel=1e-4)


def test_places_are_part_of_a_text_where_a_model_counts_them():
    """GPT-2's padding before a text moves it; rotary positions are relative."""
    batch = {"input_ids": tensor([[0, 5, 6, 7]]), "attention_mask": tensor([[0, 1, 1, 1]])}
    plain = {name: one[:, 1:] for name, one in batch.items()}
    assert row_keys(batch) == row_keys(plain)
    assert row_keys(batch, places=True) != row_keys(plain, places=True)
    assert row_keys(plain, places=True) == row_keys(plain)
    teacher, folder = build_gpt2(1), Path("unused")
    lesson = lesson_of(build_gpt2(), teacher, told(folder))
    for one in (batch, plain):
        term_of(lesson, {**one, "labels": one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)})
    assert (lesson.memory.asked, lesson.memory.found) == (2, 0)
    assert not folder.exists()


def test_a_decoders_texts_are_told_apart_by_what_it_writes():
    """The source is padded to the target's length: its mask says nothing about the target."""
    source = {"input_ids": tensor([[5, 6, 0]]), "attention_mask": tensor([[1, 1, 0]])}
    one, other = ({**source, "labels": tensor([[7, 8, last]])} for last in (9, 10))
    assert row_keys(one) != row_keys(other)
    longer = {**one, "labels": tensor([[7, 8, 9, -100]])}
    assert row_keys(longer) == row_keys(one)


def test_packed_texts_are_refused(tmp_path):
    lesson = lesson_of(build_llama(), build_llama(1), told(tmp_path))
    ids = torch.arange(1, 7)[None]
    packed = {"input_ids": ids, "labels": ids, "position_ids": tensor([[0, 1, 2, 0, 1, 2]])}
    with pytest.raises(PruningError, match=r"not for packed ones.*Received: position_ids that begin anew"):
        term_of(lesson, packed)
    assert term_of(lesson, {**packed, "position_ids": torch.arange(6)[None]}).item() > 0


# what cannot be
def test_what_top_k_is_not_for_is_refused_before_training(tmp_path):
    with pytest.raises(PruningError, match=r"give cache a folder.*Received: top_k=5, cache=None"):
        Distillation(top_k=5)
    with pytest.raises(PruningError, match=r"top_k.*Received"):
        Distillation(cache="answers", top_k=0)
    refused = (
        (build_llama, 61, "top_k must be at most 60, .*Received: 61"),
        (build_bert, 2, "for language models.*: 2 for Bert"),
    )
    for build, top_k, why in refused:
        with pytest.raises(PruningError, match=why):
            DistillationTrainer(
                build(), training_arguments(tmp_path), train_dataset=draw_rows(build(), 4), teacher=build(seed=1),
                distillation=told(tmp_path / "answers", top_k=top_k),
            )  # fmt: skip
    assert not (tmp_path / "answers").exists()
