"""Relations of queries, keys and values: by hand, without padding, between models of other heads and widths."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import PLANS, build_bert, build_llama, draw_batch, draw_rows, randomize, training_arguments
from torch import Tensor, tensor
from torch.nn import functional

from hf_prune import (
    Distillation,
    DistillationTrainer,
    HeadPruner,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    mask_units,
    shrink,
)
from hf_prune.distillation.lesson import Lesson
from hf_prune.distillation.relations import log_relations, relation_loss

ALONE = {"hard": 1.0, "relations": 1.0}


def build_gpt2(seed: int = 0) -> Any:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=40, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return randomize(transformers.GPT2LMHeadModel(config), seed)


def build_bloom(seed: int = 0) -> Any:
    config = transformers.BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=4)
    return randomize(transformers.BloomForCausalLM(config), seed)


BUILDERS = {"bert": build_bert, "llama": build_llama, "gpt2": build_gpt2}


def lesson_of(student: Any, teacher: Any, **settings: Any) -> Lesson:
    return Lesson(student, teacher, Distillation(**{"logits": 0.0, "relations": 1.0, **settings}))


def term_of(student: Any, teacher: Any, batch: Any, **settings: Any) -> float:
    terms = lesson_of(student, teacher, **settings).terms(student, batch, [], ALONE)[1]
    assert set(terms) == {"relations"}
    value: float = terms["relations"].item()
    return value


# by hand
def test_relations_by_hand():
    """Tokens 0 and ln 3 of width 1: alike are (1/2, 1/2) for the first; the second's scores are 0 and (ln 3)^2."""
    vectors = tensor([0.0, math.log(3), 7.0]).view(1, 1, 3, 1)
    found = log_relations(vectors, tensor([[True, True, False]])).exp()[0, 0, :2]
    second = math.exp(math.log(3) ** 2)
    expected = tensor([[0.5, 0.5, 0.0], [1 / (1 + second), second / (1 + second), 0.0]])
    torch.testing.assert_close(found, expected)
    wider = log_relations(vectors.repeat(1, 1, 1, 4) / 2**0.5, None)  # four times as wide, each half: divided by two
    torch.testing.assert_close(wider, log_relations(vectors, None))


def test_divergence_of_relations_by_hand():
    """KL of (1/2, 1/2) to (1/4, 3/4); a row's second token is padding."""
    half, other = tensor([0.5, 0.5]).log(), tensor([0.25, 0.75]).log()
    teacher, student = torch.stack([half, half])[None, None], torch.stack([other, half])[None, None]
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert relation_loss(student, teacher, None).item() == pytest.approx(kl / 2)
    assert relation_loss(student, teacher, tensor([[True, False]])).item() == pytest.approx(kl)


# of models
def vectors_of(model: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Return queries, keys and values of the last layer, ``(rows, positions, width)``, and how many heads each has."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-2]
    kind = model.config.model_type
    if kind == "bert":
        core = model.bert.encoder.layer[-1].attention.self
        return [(one(hidden), 4) for one in (core.query, core.key, core.value)]
    if kind == "gpt2":
        block = model.transformer.h[-1]
        return [(one, 4) for one in block.attn.c_attn(block.ln_1(hidden)).split(16, -1)]
    layer = model.model.layers[-1]
    hidden, core = layer.input_layernorm(hidden), layer.self_attn
    return [(core.q_proj(hidden), 4), (core.k_proj(hidden), 2), (core.v_proj(hidden), 2)]


def by_hand(student: Any, teacher: Any, batch: dict[str, Tensor], split: int | None, averaged: bool) -> float:
    mask, losses = batch["attention_mask"].bool(), []
    for pair in zip(vectors_of(student, batch), vectors_of(teacher, batch)):
        found = []
        for vectors, heads in pair:
            parts = torch.stack(vectors.chunk(split or heads, -1), 1)
            scores = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
            shares = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
            found.append(shares.mean(1, keepdim=True) if averaged else shares)
        kl = torch.where(found[1] > 0, found[1] * (found[1] / found[0]).log(), 0).sum(-1).mean(1)
        losses.append(torch.stack([row[keep].mean() for row, keep in zip(kl, mask)]).mean())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("settings", "split", "averaged"),
    [
        ({}, None, True),
        ({"heads": "kept"}, None, False),
        ({"relation_heads": 8}, 8, False),
        ({"relation_heads": 1}, 1, False),
    ],
)
def test_relations_are_what_the_projections_say(name, settings, split, averaged):
    student, teacher = (BUILDERS[name](seed=seed) for seed in (0, 1))
    batch = {key: one for key, one in draw_batch(student).items() if key != "labels"}
    expected = by_hand(student, teacher, batch, split, averaged)
    assert term_of(student, teacher, batch, **settings) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4
    assert term_of(student, copy.deepcopy(student), batch, **settings) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("heads", ["mean", "kept"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_masked_learns_what_shrunk_does(name, heads):
    """Masked heads are no part of it; a teacher of one layer has the same queries for the heads that were kept."""
    teacher = BUILDERS[name](num_hidden_layers=1)
    plan = {key: units for key, units in PLANS[name].items() if "layers.1" not in key and not key.endswith("branch")}
    masked, shrunk = mask_units(copy.deepcopy(teacher), plan), shrink(copy.deepcopy(teacher), plan)
    batch = draw_batch(teacher)
    term = term_of(masked, teacher, batch, heads=heads)
    assert term_of(shrunk, teacher, batch, heads=heads) == pytest.approx(term, rel=1e-4, abs=1e-6)
    assert (term < 1e-6) == (heads == "kept")


def test_heads_and_widths_may_be_others():
    student, teacher = build_bert(), build_bert(seed=1, hidden_size=32, num_attention_heads=2)
    batch = draw_batch(student)
    assert term_of(student, teacher, batch) > 1e-4
    assert term_of(student, teacher, batch, relation_heads=16) > 1e-4
    longer = {key: functional.pad(one, (0, 3), value=0) if one.ndim == 2 else one for key, one in batch.items()}
    assert term_of(student, teacher, longer) == pytest.approx(term_of(student, teacher, batch), rel=1e-4)


def test_the_teachers_layer_can_be_chosen():
    """The student's last layer learns from the layer that is told: from itself where that is the last one it has."""
    teacher = build_bert(num_hidden_layers=3)
    student = shrink(copy.deepcopy(teacher), {"layers": [0, 1]})
    batch = draw_batch(student)
    assert term_of(student, teacher, batch, relation_layer=1) == pytest.approx(0, abs=1e-6)
    assert term_of(student, teacher, batch) == pytest.approx(term_of(student, teacher, batch, relation_layer=2))
    assert term_of(student, teacher, batch) > 1e-4


def train(folder: Path, student: Any, teacher: Any, callback: Any = None, **changes: Any) -> list[dict[str, float]]:
    settings = changes.pop("distillation", Distillation(hard=0.3, relations=2.0))
    trainer = DistillationTrainer(
        student, training_arguments(folder, **{"max_grad_norm": 1e9, **changes}), train_dataset=draw_rows(student, 14),
        teacher=teacher, distillation=settings,
    )  # fmt: skip
    if callback is not None:
        callback.attach(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def test_relations_alone_pull_the_student_to_the_teacher(tmp_path):
    student, teacher = build_bert(), build_bert(seed=1, hidden_size=32, num_attention_heads=2)
    batch, settings = draw_batch(student), Distillation(hard=0.0, logits=0.0, relations=1.0)
    before = term_of(student, teacher, batch)
    train(tmp_path, student, teacher, max_steps=40, distillation=settings)
    assert term_of(student.eval(), teacher, batch) < before / 2


def test_the_gradient_does_not_depend_on_accumulation(tmp_path):
    norms = []
    for changes in (
        {"per_device_train_batch_size": 14},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ):
        (entry,) = train(tmp_path, build_bert(), build_bert(seed=1), max_steps=1, **changes)
        norms.append(entry["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("shrinking", [False, True])
def test_heads_leave_while_relations_are_learned(shrinking, tmp_path):
    callback = PruningCallback(
        [HeadPruner(min_kept=0)], Schedule(begin=1, end=5, frequency=1), target=Target(macs=0.75),
        shrink_during_training=shrinking,
    )  # fmt: skip
    entries = train(tmp_path, build_bert(), build_bert(seed=1), callback, max_steps=8)
    assert all(math.isfinite(one["loss"]) and one["distillation_relations"] > 0 for one in entries)
    assert callback.report.settings["macs_left"] <= 0.75


def test_adapters_are_part_of_the_queries():
    peft = pytest.importorskip("peft")
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2, "init_lora_weights": False}
    student = peft.get_peft_model(build_bert(), peft.LoraConfig(**options))
    teacher, batch = build_bert(), draw_batch(build_bert())
    term = term_of(student, teacher, batch)
    assert term > 1e-4
    assert term == pytest.approx(term_of(student.merge_and_unload(), teacher, batch), rel=1e-3)


# what cannot be
def test_what_cannot_be_split_or_found_is_refused():
    shorn = shrink(build_bert(), {"layers.1.attention.heads": [0, 1, 2]})
    with pytest.raises(PruningError, match=r"must divide the width .* of the student has left .*, 12; .*Received: 8"):
        lesson_of(shorn, build_bert(seed=1), relation_heads=8)
    assert lesson_of(shorn, build_bert(seed=1), relation_heads=4)
    with pytest.raises(PruningError, match=r"of the teacher has left .*, 16; .*Received: 6"):
        lesson_of(shorn, build_bert(seed=1), relation_heads=6)
    with pytest.raises(PruningError, match=r"relation_layer must be a layer .*: 0, 1. Received: 2"):
        lesson_of(build_bert(), build_bert(seed=1), relation_layer=2)
    with pytest.raises(PruningError, match=r"queries, keys and values from three.*Received: Bloom"):
        lesson_of(build_bloom(), build_bloom(1))
    with pytest.raises(PruningError, match=r"cache keeps a teacher's logits.*relations=1.0"):
        Distillation(relations=1.0, cache="answers")
    with pytest.raises(
        PruningError, match=r"heads='kept' needs a teacher with the student's heads of layers.1.attention"
    ):
        term_of(build_bert(), shorn, draw_batch(shorn), heads="kept")
