"""Folders that lie on people's disks: each written format, transformers' own `pruned_heads`, others' cuts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from models import assert_same_outputs, build_bert, build_llama, build_vit, draw_batch, logits_of
from safetensors.torch import load_file
from torch import nn
from write_folders import FOLDERS, LANE, prune_heads

from hf_prune import CheckpointError, PruningError, adopt_shapes, find_groups, load_pruned, save_pruned
from hf_prune.plan import FORMAT

NAMES = sorted(path.name for path in FOLDERS.iterdir())
F32 = {"dtype": torch.float32}


def auto_class(name: str) -> Any:
    """Return the Auto class of a folder's kind of model."""
    kinds = {"bert": "SequenceClassification", "vit": "ImageClassification"}
    return getattr(transformers, f"AutoModelFor{kinds.get(name.rpartition('-')[2], 'CausalLM')}")


def check_output(model: Any, folder: Path) -> None:
    """Check a model against what the one that wrote the folder computed."""
    batch = load_file(folder / "expected.safetensors")
    expected = batch.pop("expected")
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_was_written_once_loads(name, tmp_path):
    for load in (load_pruned, auto_class(name).from_pretrained):
        model = load(FOLDERS / name, **F32)
        check_output(model, FOLDERS / name)
    save_pruned(model, tmp_path)  # in today's format
    check_output(load_pruned(tmp_path, **F32), FOLDERS / name)
    assert json.loads((tmp_path / "config.json").read_text())["pruning_config"]["kept"]


def test_every_format_has_folders_of_both_lanes():
    formats = {name.rpartition("-")[0] for name in NAMES} - {"pruned_heads"}
    assert formats == {f"format{one}-transformers{lane}" for one in range(1, FORMAT + 1) for lane in (4, 5)}


def test_legacy_heads_are_the_right_ones():
    model = load_pruned(FOLDERS / "pruned_heads-bert", **F32)
    assert model.config.pruning_config["kept"] == {
        "layers.0.attention.heads": "0,3 of 4",
        "layers.1.attention.heads": "1-3 of 4",
    }
    assert not model.config.pruned_heads
    assert [group.units for group in find_groups(model, kinds=["head"])] == [2, 3]


@pytest.mark.parametrize(
    "heads", [{"0": [4]}, {"0": [-1]}, {"2": [0]}, {"0": [0, 1, 2, 3]}, {"x": [0]}, {"0": 3}, {"0": ["y"]}, [0]]
)
def test_legacy_heads_that_the_model_does_not_have_are_refused(heads, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FOLDERS / "pruned_heads-bert", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pruned_heads": heads}))
    with pytest.raises(CheckpointError):
        load_pruned(folder, **F32)


@pytest.mark.skipif(LANE != "transformers4", reason="transformers 5 cannot prune heads")
def test_heads_that_transformers_pruned_live_are_saved_like_ours(tmp_path):
    model = prune_heads(zoo.build("roberta", "sequence_classification"), {0: [0], 1: [1, 2]})
    batch = zoo.inputs(model)
    expected = logits_of(model, batch)
    save_pruned(model, tmp_path)
    torch.testing.assert_close(logits_of(load_pruned(tmp_path, **F32), batch), expected, atol=0, rtol=0)


def narrow(module: Any, names: str, rows: Any = slice(None), columns: Any = slice(None)) -> None:
    """Cut linear layers as Torch-Pruning does: new parameters, new widths, and nobody else is told."""
    for name in names.split():
        layer = module.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.data[rows][:, columns].clone())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.data[rows].clone())
        layer.out_features, layer.in_features = layer.weight.shape


def others_bert() -> Any:
    model = build_bert()
    for number, layer in enumerate(model.bert.encoder.layer):
        width = 12 - 4 * number  # heads of 4: three, two
        narrow(layer, "attention.self.query attention.self.key attention.self.value", rows=slice(4, 4 + width))
        narrow(layer, "attention.output.dense", columns=slice(4, 4 + width))
        narrow(layer, "intermediate.dense", rows=slice(0, 24, 2 + number))
        narrow(layer, "output.dense", columns=slice(0, 24, 2 + number))
        layer.attention.self.num_attention_heads, layer.attention.self.all_head_size = width // 4, width
    return model


def others_llama() -> Any:
    """Cut as LLM-Pruner does: the first layer keeps its attention, the second one of two KV groups."""
    model = build_llama()
    narrow(model.model.layers[1].self_attn, "k_proj v_proj", rows=slice(4, 8))
    narrow(model.model.layers[1].self_attn, "q_proj", rows=slice(8, 16))
    narrow(model.model.layers[1].self_attn, "o_proj", columns=slice(8, 16))
    narrow(model.model.layers[0].mlp, "gate_proj up_proj", rows=slice(3, 20))
    narrow(model.model.layers[0].mlp, "down_proj", columns=slice(3, 20))
    return model


def others_grouped_llama() -> Any:
    """Keep one query head of each KV group."""
    model = build_llama()
    for layer in model.model.layers:
        rows = [0, 1, 2, 3, 12, 13, 14, 15]
        narrow(layer.self_attn, "q_proj", rows=rows)
        narrow(layer.self_attn, "o_proj", columns=rows)
        layer.self_attn.num_key_value_groups = 1
    return model


@pytest.mark.parametrize("build", [others_bert, others_llama, others_grouped_llama])
def test_what_another_tool_cut_is_saved_like_ours(build, tmp_path):
    model = build()
    batch = draw_batch(model)
    expected = logits_of(model, batch)
    assert adopt_shapes(model) is model
    torch.testing.assert_close(logits_of(model, batch), expected, atol=0, rtol=0)
    save_pruned(model, tmp_path)
    torch.testing.assert_close(logits_of(load_pruned(tmp_path, **F32), batch), expected, atol=0, rtol=0)


def test_a_dense_model_has_nothing_to_adopt():
    model = adopt_shapes(build_bert())
    assert_same_outputs(model, build_bert(), atol=0)
    assert not getattr(model.config, "pruning_config", {}).get("kept")


def cut_half_a_head(model: Callable[[], Any]) -> Any:
    vit = model()
    for layer in vit.base_model.modules():
        for name, module in layer.named_children():
            if name in ("query", "key", "value", "q_proj", "k_proj", "v_proj"):
                narrow(layer, name, rows=slice(6))
                assert module.out_features == 6
    return vit


@pytest.mark.parametrize("model", [build_vit, build_bert])
def test_what_is_not_whole_units_is_not_adopted(model):
    cut = cut_half_a_head(model)
    with pytest.raises(PruningError, match=r"Only units of groups may be missing: .* must be .* Received: \(6, 16\)"):
        adopt_shapes(cut)
