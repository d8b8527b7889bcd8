"""Loops that are not a Trainer's: what they save of a pruning goes on bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_weights, build_bert, draw_rows
from test_examples import run_example
from torch.utils.data import DataLoader

from hf_prune import HeadPruner, NeuronPruner, Pruning, PruningError, Schedule, Target, load_pruned
from hf_prune.architectures import prunable_macs

ROOT = Path(__file__).resolve().parent.parent
BOTH, EARLY, HALF = [HeadPruner(), NeuronPruner()], Schedule(begin=1, end=7, frequency=2), Target(macs=0.5)
STEPS, STOP = 8, 4


def batches_of(model: Any) -> DataLoader:
    return DataLoader(draw_rows(model, 4 * STEPS), batch_size=4)


def lightning_run(folder: Path, resume: Path | None = None) -> tuple[Any, Any]:
    """Train by the callback of the example, in steps of two batches; return the callback and the model."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from lightning import Trainer
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning_callback import Classifier, PruningOfLightning
    finally:
        sys.path.pop(0)
    model = build_bert()
    callback = PruningOfLightning(BOTH, EARLY, HALF)
    keeping = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[callback, keeping], **quiet)
    rows = DataLoader(draw_rows(model, 4 * STEPS), batch_size=4)  # of half of the steps
    trainer.fit(Classifier(model, 1e-3), rows, ckpt_path=resume)
    return callback, model


@pytest.mark.filterwarnings("ignore")
def test_lightning_prunes_and_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("lightning")
    whole, expected = lightning_run(tmp_path / "whole")
    assert 0.3 < prunable_macs(expected) / prunable_macs(build_bert()) <= 0.5
    again, found = lightning_run(tmp_path / "again", tmp_path / "whole" / "epoch=0.ckpt")
    assert again.report.kept == whole.report.kept
    assert_same_weights(expected, found)


def accelerate_run(folder: Path, first: int, last: int) -> tuple[Any, Any]:
    """Take the steps from `first` to `last` in a loop of one's own; what it saves before the end lies in the folder."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), build_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches_of(model))
    pruning = Pruning(model, BOTH, EARLY, target=HALF, total_steps=STEPS, optimizer=optimizer, accelerator=accelerator)
    accelerator.register_for_checkpointing(pruning)
    if first:
        accelerator.load_state(str(folder))
    for batch in list(batches)[first:last]:
        accelerator.backward(model(**batch).loss)
        pruning.after_backward()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()
    if last < STEPS:
        accelerator.save_state(str(folder))
        pruning.close()
    return (pruning.finish() if last == STEPS else None), pruning.model


def test_accelerate_keeps_a_pruning_that_is_registered_for_checkpointing(tmp_path):
    whole, expected = accelerate_run(tmp_path, 0, STEPS)
    accelerate_run(tmp_path, 0, STOP)
    again, found = accelerate_run(tmp_path, STOP, STEPS)
    assert again.kept == whole.kept
    assert_same_weights(expected, found)


def test_deepspeeds_optimizer_is_refused():
    from accelerate import Accelerator
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    model, _ = build_bert(), Accelerator(cpu=True)  # which its wrappers ask for
    optimizer = DeepSpeedOptimizerWrapper(torch.optim.AdamW(model.parameters()))
    with pytest.raises(PruningError, match="Use DDP or FSDP2. Received: DeepSpeedOptimizerWrapper"):
        Pruning(model, BOTH, EARLY, target=HALF, total_steps=STEPS, optimizer=optimizer)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_that_deepspeed_has_wrapped_is_refused(stage):
    deepspeed = pytest.importorskip("deepspeed")
    model, told = build_bert(), {"train_batch_size": 4, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(model.parameters())
    engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=told)
    for given, received in (((engine, None), "DeepSpeedEngine"), ((model, wrapped), type(wrapped).__name__)):
        with pytest.raises(PruningError, match=f"Use DDP or FSDP2. Received: {received}"):
            Pruning(given[0], BOTH, EARLY, target=HALF, total_steps=STEPS, optimizer=given[1])
    assert_same_weights(model, build_bert())


def test_the_example_runs_as_it_stands(tmp_path):
    pytest.importorskip("lightning")
    printed = run_example(ROOT / "examples" / "lightning_callback.py", tmp_path, "--tiny", "--output", "out")
    assert "saved to" in printed
    assert prunable_macs(load_pruned(tmp_path / "out" / "final")) <= 0.5 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
