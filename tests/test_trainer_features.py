"""What else a Trainer can do, with pruning: each feature in a short run of a tiny model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import assert_same_weights, build_bert, build_llama, draw_batch, draw_rows, training_arguments, units_of
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_prune import HeadPruner, NeuronPruner, PruningCallback, PruningError, Schedule, Target, WeightPruner
from hf_prune.architectures import prunable_macs

EARLY = Schedule("cubic", begin=1, end=7, frequency=2)
BOTH = [HeadPruner(), NeuronPruner()]


def make_callback(**changes: Any) -> PruningCallback:
    return PruningCallback(BOTH, EARLY, **{"target": Target(macs=0.5), **changes})


def make_trainer(folder: Path, callback: PruningCallback, model: Any = None, **changes: Any) -> Trainer:
    model = build_bert() if model is None else model
    arguments = training_arguments(folder, **{"max_steps": 8, **changes})
    trainer = Trainer(model, arguments, train_dataset=draw_rows(model, 24), eval_dataset=draw_rows(model, 8, seed=1))
    return callback.attach(trainer)


def train(folder: Path, model: Any = None, **changes: Any) -> tuple[Trainer, PruningCallback]:
    trainer = make_trainer(folder, callback := make_callback(), model, **changes)
    trainer.train()
    assert 0.4 < prunable_macs(trainer.model) / callback.pruning.live.dense_macs <= 0.5
    return trainer, callback


@pytest.fixture(autouse=True)
def _one_precision(monkeypatch):
    """Mixed precision is set in the environment and in a state that all Trainers of a process share."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Trainer, PruningCallback]:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_each_batch_once(reentrant, plain, tmp_path):
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, callback = train(tmp_path, **changes)
    for name, scores in plain[1].pruning.evidence["gate"].means["gate_square"].items():
        torch.testing.assert_close(callback.pruning.evidence["gate"].means["gate_square"][name], scores)
    assert callback.report.kept == plain[1].report.kept
    assert_same_weights(plain[0].model, trainer.model, atol=1e-5)


def test_accumulation_clipping_and_bf16(plain, tmp_path):
    trainer, callback = train(
        tmp_path,
        bf16=True,
        max_grad_norm=0.1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    scores = [
        callback.pruning.evidence["gate"].means["gate_square"].values(),
        plain[1].pruning.evidence["gate"].means["gate_square"].values(),
    ]
    assert all(one.dtype == torch.float32 and one.isfinite().all() for one in scores[0])
    assert {one.dtype for one in trainer.model.parameters()} == {torch.float32}
    assert callback.report.pruned.parameters < callback.report.dense.parameters


def test_a_compiled_model_gets_scores_and_is_shrunk_itself(plain, tmp_path):
    torch._dynamo.reset()
    trainer, callback = train(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert type(trainer.model).__name__ == "BertForSequenceClassification"
    for name, scores in plain[1].pruning.evidence["gate"].means["gate_square"].items():
        torch.testing.assert_close(
            callback.pruning.evidence["gate"].means["gate_square"][name], scores, atol=1e-4, rtol=1e-3
        )
    assert callback.report.kept == plain[1].report.kept
    expected = plain[0].model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        if "key.bias" not in name:  # it has no gradient but noise, which Adam makes large
            torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_masks_of_single_weights_hold_in_a_compiled_model(tmp_path):
    torch._dynamo.reset()
    callback = PruningCallback(WeightPruner(sparsity=0.5), EARLY)
    trainer = make_trainer(tmp_path, callback, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    named = dict(trainer.model.named_parameters())
    assert all(not named[name][~mask].any() for name, mask in callback.pruning.masks.items())
    assert sum(int((~mask).sum()) for mask in callback.pruning.masks.values()) > 1000
    torch._dynamo.reset()


class Worsening(TrainerCallback):
    """Make every evaluation look worse than the one before."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


def test_early_stopping_waits_for_the_end_of_the_ramp(tmp_path):
    """Patience of two evaluations, each worse: the run would stop at step 3; the schedule ends at step 7."""
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, max_steps=12, save_total_limit=2, **every, **best)
    for one in (Worsening(), EarlyStoppingCallback(early_stopping_patience=2)):
        trainer.add_callback(one)
    trainer.train()
    assert trainer.state.global_step == 9
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-7"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-9"]
    assert prunable_macs(trainer.model) / prunable_macs(build_bert()) <= 0.5


class OutOfMemory(TrainerCallback):
    """Fail as a GPU does, as long as the batch is large, once masks have changed."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size > 2 and state.global_step == 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_next_attempt_at_a_batch_size_begins_anew(tmp_path):
    wanted = {"max_steps": 8, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, callback := make_callback(), auto_find_batch_size=True, **wanted)
    before = copy.deepcopy(trainer.model)
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append((state.train_batch_size, copy.deepcopy(model.state_dict()), hooks(model)))

    trainer.add_callback(Look())
    trainer.add_callback(OutOfMemory())
    trainer.train()
    assert [batch > 2 for batch, _, _ in seen] == [True] * (len(seen) - 1) + [False]
    assert len(seen) > 1
    assert {count for _, _, count in seen} == {4}  # two blocks in each of two layers, watched once
    for _, weights, _ in seen:
        assert all(torch.equal(weights[name], one) for name, one in before.state_dict().items())
    assert prunable_macs(trainer.model) / prunable_macs(before) <= 0.5
    assert sum(map(len, callback.report.kept.values())) == sum(units_of(trainer.model).values())
    assert hooks(trainer.model) == 0
    with pytest.raises(PruningError, match="auto_find_batch_size=True"):
        make_trainer(tmp_path, make_callback(shrink_during_training=True), auto_find_batch_size=True).train()


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_run_that_failed_leaves_no_hooks_to_the_next(tmp_path):
    trainer = make_trainer(tmp_path, callback := make_callback(), per_device_train_batch_size=4)
    trainer.add_callback(OutOfMemory())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.remove_callback(OutOfMemory)
    trainer.train()
    assert hooks(trainer.model) == 0
    assert sum(map(len, callback.report.kept.values())) == sum(units_of(trainer.model).values())


def test_each_trial_of_a_search_has_its_own_model_and_session(tmp_path):
    pytest.importorskip("optuna")
    callback, sessions = make_callback(), []
    data = draw_rows(build_bert(), 24)
    arguments = training_arguments(tmp_path, max_steps=8, eval_strategy="no")
    trainer = Trainer(args=arguments, model_init=lambda: build_bert(), train_dataset=data, eval_dataset=data[:8])
    callback.attach(trainer)

    class Look(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            sessions.append((callback.pruning, callback.report, id(model), prunable_macs(model)))

    trainer.add_callback(Look())
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        direction="minimize",
        n_trials=2,
        backend="optuna",
    )
    assert best.objective > 0
    assert len({id(session) for session, *_ in sessions}) == len(sessions) == 2
    for _, report, _, left in sessions:
        assert report.dense.parameters == sum(one.numel() for one in build_bert().parameters())
        assert left / prunable_macs(build_bert()) <= 0.5


def test_seq2seq_trainer(tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 1, "vocab_size": 60}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    )
    ids = torch.randint(1, 60, (24, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
    arguments = transformers.Seq2SeqTrainingArguments(
        **{**training_arguments(tmp_path, max_steps=8).to_dict(), "predict_with_generate": True, "report_to": "none"}
    )
    callback, dense = make_callback(), prunable_macs(model)
    trainer = transformers.Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    callback.attach(trainer).train()
    assert 0.4 < prunable_macs(model) / dense <= 0.5
    assert trainer.predict(rows[:4], max_length=5).predictions.shape[0] == 4


@pytest.mark.parametrize("adapters", [False, True])
def test_trl_sft(adapters, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(59)} | {"</s>": 59}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    model, texts = (
        build_llama(pad_token_id=59),
        [{"text": " ".join(f"w{(i + j) % 59}" for j in range(8))} for i in range(24)],
    )
    settings = training_arguments(tmp_path, max_steps=8).to_dict()
    names = ("learning_rate", "per_device_train_batch_size", "max_steps", "use_cpu", "logging_steps", "disable_tqdm")
    arguments = trl.SFTConfig(
        str(tmp_path), **{name: settings[name] for name in names}, save_strategy="no", report_to="none", bf16=False
    )
    more = {}
    if adapters:
        peft = pytest.importorskip("peft")
        more["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, task_type="CAUSAL_LM")
    callback = make_callback()
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(texts), processing_class=tokenizer, **more
    )
    callback.attach(trainer).train()
    assert hasattr(trainer.model, "peft_config") == adapters
    assert 0.4 < prunable_macs(trainer.model) / prunable_macs(build_llama()) <= 0.5
    assert trainer.state.log_history[-2]["macs_left"] <= 0.5
    with torch.no_grad():
        assert trainer.model(**draw_batch(build_llama())).logits.isfinite().all()


def test_an_epoch_ends_with_the_batches_that_are_left_over(tmp_path):
    """Six batches in steps of four are two steps an epoch, the second one of two batches."""
    schedule = Schedule("linear", begin="1 epochs", end="3 epochs", frequency="1 epochs")
    callback = PruningCallback(HeadPruner(0.5, "l1"), schedule)
    trainer = make_trainer(tmp_path, callback, max_steps=-1, num_train_epochs=4, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.state.global_step == 8
    assert [task.changes for task in callback.pruning.tasks] == [(2, 4, 6)]
