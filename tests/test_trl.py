"""TRL's Trainers that have a teacher of their own prune, with masks or live, and go on from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import assert_same_weights, build_llama
from test_distillation_trainers import QUIET, tokenizer
from test_peft import EARLY

from hf_prune import HeadPruner, NeuronPruner, PruningCallback, Target
from hf_prune.architectures import prunable_macs

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl.experimental import gkd  # noqa: E402

SETTINGS = {**QUIET, "max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "bf16": False,
            "gradient_checkpointing": False}  # fmt: skip
TALKS = [[f"w{3 + n % 9} w{4 + n % 7}", f"w{20 + n % 5} w{30 + n % 11} w{40 + n % 3}"] for n in range(32)]
KINDS = ("GKD, on its texts", "GKD, on the student's", "Distillation")


def words() -> Any:
    """Return a tokenizer that puts what is said one behind the other."""
    made = tokenizer()
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def make_trainer(kind: str, model: Any, teacher: Any, folder: Path, **changes: Any) -> Any:
    settings, common = {**SETTINGS, **changes}, {"teacher_model": teacher, "processing_class": words()}
    if kind == "Distillation":
        rows = Dataset.from_dict({"prompt": [asked for asked, _ in TALKS]})
        arguments = trl.DistillationConfig(str(folder), **settings, max_completion_length=4)
        return trl.DistillationTrainer(model, args=arguments, train_dataset=rows, **common)
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": role, "content": text} for role, text in zip(roles, talk)]} for talk in TALKS]
    own = float(kind == "GKD, on the student's")
    arguments = gkd.GKDConfig(str(folder), **settings, lmbda=own, max_new_tokens=4, max_length=16)
    return gkd.GKDTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), **common)


def train(kind: str, folder: Path, live: bool, resume: Path | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Return the student, its teacher, and the callback that has pruned.

    A teacher that is the student itself would give no gradient, and so no scores, before anything has left.
    """
    model, teacher = build_llama(), build_llama(seed=1)
    callback = PruningCallback(
        [HeadPruner(), NeuronPruner()], EARLY, target=Target(macs=0.5), shrink_during_training=live
    )
    trainer = make_trainer(kind, model, teacher, folder, **changes)
    callback.attach(trainer).train(resume_from_checkpoint=str(resume) if resume else None)
    assert trainer.state.log_history[-2]["macs_left"] <= 0.5
    return model, teacher, callback


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_with_a_teacher_of_its_own_prunes(kind, live, tmp_path):
    model, teacher, callback = train(kind, tmp_path, live)
    assert 0.4 < prunable_macs(model) / prunable_macs(teacher) <= 0.5
    assert callback.report.pruned.parameters < callback.report.dense.parameters
    assert_same_weights(teacher, build_llama(seed=1))


@pytest.mark.parametrize("live", [False, True])
def test_it_goes_on_from_its_checkpoint(live, tmp_path):
    told = {"save_strategy": "steps", "save_steps": 4}
    whole, _, first = train(KINDS[0], tmp_path / "out", live, **told)
    again, _, second = train(KINDS[0], tmp_path / "out", live, tmp_path / "out" / "checkpoint-4", **told)
    assert first.report.kept == second.report.kept
    assert_same_weights(whole, again, atol=1e-6)
