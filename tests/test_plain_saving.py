"""Plain saving of a pruned model, by calls of transformers, writes what `save_pruned` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from models import BUILD, PLANS, UNEVEN, assert_same_weights, build_bert, draw_rows, training_arguments

from hf_prune import load_pruned, save_pruned, shrink
from hf_prune.card import write_card
from hf_prune.files import read_json


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


def test_a_folder_says_how_it_loads_where_stock_cannot(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    model.save_pretrained(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    told = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("path/to/folder", str(tmp_path / "plain")), told)
    assert_same_weights(model, told["model"])
    assert read_json(tmp_path / "plain" / "config.json")["pruning_config"]["load"].startswith("pip install hf_prune; ")
    assert "# plain" in write_card(tmp_path / "plain").read_text()  # no hand has written it


def test_a_card_that_is_there_stays_and_others_need_none(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    save_pruned(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    even = shrink(build_bert(), {f"layers.{i}.mlp.neurons": range(8) for i in range(2)})
    for folder, save in (("even", even.save_pretrained), ("dense", build_bert().save_pretrained)):
        save(tmp_path / folder)
        assert not (tmp_path / folder / "README.md").exists()
    save_pruned(model, tmp_path / "ours")
    assert not (tmp_path / "ours" / "README.md").exists()
    assert even.config.pruning_config["load"] == "stock transformers: from_pretrained"


def test_plain_saving_leaves_a_single_file_beside_shards_and_ours_does_not(tmp_path):
    """Why it is worth remembering us when a folder is saved over: the stale file is what would be loaded."""
    first, second = (shrink(build_bert(seed=seed), UNEVEN) for seed in (0, 1))
    for save in (save_pruned, lambda model, folder, **size: model.save_pretrained(folder, **size)):
        save(first, tmp_path, max_shard_size="5GB")
        save(second, tmp_path, max_shard_size="5KB")
        stale = (tmp_path / "model.safetensors").exists()
        assert_same_weights(first if stale else second, load_pruned(tmp_path, dtype=torch.float32))
        assert stale is (save is not save_pruned)


def test_a_folder_that_holds_another_model_now_no_longer_says_so(tmp_path):
    shrink(build_bert(), UNEVEN).save_pretrained(tmp_path)
    assert "BertForSequenceClassification" in (tmp_path / "README.md").read_text()
    build_bert().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="transformers 5 writes no pickles")
def test_a_pickle_that_will_not_load_is_remarked_when_it_is_written(tmp_path, caplog):
    shrink(build_bert(), UNEVEN).save_pretrained(tmp_path / "safe")
    build_bert().save_pretrained(tmp_path / "dense", safe_serialization=False)
    assert not caplog.records
    shrink(build_bert(), UNEVEN).save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert "without safe_serialization=False" in caplog.text
