"""Plain saving of a pruned model, by calls of transformers, writes what `save_pruned` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from models import BUILD, PLANS, UNEVEN, assert_same_weights, build_bert, draw_rows, training_arguments

from hf_prune import load_pruned, save_pruned, shrink


def model_files(folder: Path) -> dict[str, bytes]:
    """Return a folder's config and weights: what makes the model."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name in ("config.json", "generation_config.json") or path.name.startswith("model")
    }


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("shard_size", ["5GB", "5KB"])
def test_save_pretrained(name, shard_size, tmp_path):
    model = shrink(BUILD[name](), PLANS[name])
    save_pruned(model, tmp_path / "ours", max_shard_size=shard_size)
    model.save_pretrained(tmp_path / "plain", max_shard_size=shard_size)
    assert model_files(tmp_path / "plain") == model_files(tmp_path / "ours")


def test_trainers_save_model_and_checkpoints(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    arguments = training_arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    trainer = transformers.Trainer(model, arguments, train_dataset=draw_rows(model, 8))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    save_pruned(trainer.model, tmp_path / "ours")
    ours = model_files(tmp_path / "ours")
    assert ours.keys() >= {"config.json", "model.safetensors"}
    assert model_files(tmp_path / "saved") == ours
    assert model_files(tmp_path / "run" / "checkpoint-2") == ours
    assert_same_weights(trainer.model, load_pruned(tmp_path / "run" / "checkpoint-2", dtype=torch.float32))


def test_plain_saving_leaves_a_single_file_beside_shards_and_ours_does_not(tmp_path):
    """Why it is worth remembering us when a folder is saved over: the stale file is what would be loaded."""
    first, second = (shrink(build_bert(seed=seed), UNEVEN) for seed in (0, 1))
    for save in (save_pruned, lambda model, folder, **size: model.save_pretrained(folder, **size)):
        save(first, tmp_path, max_shard_size="5GB")
        save(second, tmp_path, max_shard_size="5KB")
        stale = (tmp_path / "model.safetensors").exists()
        assert_same_weights(first if stale else second, load_pruned(tmp_path, dtype=torch.float32))
        assert stale is (save is not save_pruned)
