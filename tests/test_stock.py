"""`stock="require"`: units of zeros are added until a stock config can say the shape."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
import zoo
from models import (
    BUILD,
    PLANS,
    UNEVEN,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    logits_of,
    units_of,
)

from hf_prune import PruningError, find_groups, load_pruned, save_pruned, shrink

AUTO = {"bert": "SequenceClassification", "vit": "ImageClassification", "llama": "CausalLM"}
BRANCHES = {"layers.0.attention.branch": [], "layers.0.mlp.branch": []}
KINDS = {
    "uneven": lambda name: PLANS[name],
    "branches": lambda name: {**{key: kept for key, kept in PLANS[name].items() if ".1." in key}, **BRANCHES},
    "layers": lambda name: {"layers": [1], "layers.1.mlp.neurons": [3, 5]},
}
STOCK = """
import json, sys, torch, transformers
for name, auto in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(name, dtype=torch.float32).eval()
    batch, expected = torch.load(f"{name}.pt")
    with torch.no_grad():
        logits = model(**batch).logits
    print(name, float((logits - expected).abs().max() / expected.abs().max()))
assert "hf_prune" not in sys.modules
"""


def test_stock_transformers_computes_the_same(tmp_path):
    autos = {}
    for name in ("bert", "vit", "llama"):
        for kind, plan in KINDS.items():
            model = shrink(BUILD[name](), plan(name))
            before = copy.deepcopy(model)
            save_pruned(model, tmp_path / f"{name}_{kind}", stock="require")
            assert_same_weights(before, model)
            for key in ("pruning_config", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
                assert getattr(before.config, key) == getattr(model.config, key), "saving must not change the model"
            batch = {key: value for key, value in draw_batch(model).items() if key != "labels"}
            torch.save((batch, logits_of(model, batch)), tmp_path / f"{name}_{kind}.pt")
            autos[f"{name}_{kind}"] = f"AutoModelFor{AUTO[name]}"
    command = [sys.executable, "-c", STOCK, json.dumps(autos)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    differences = dict(line.split() for line in result.stdout.splitlines())
    assert differences.keys() == autos.keys()
    assert max(map(float, differences.values())) < 1e-6


def test_layers_are_as_wide_as_the_widest(tmp_path, caplog):
    kept = {"layers.0.mlp.neurons": [1, 2, 3], "layers.1.mlp.neurons": [0, 4, 7, 9, 20]}
    with caplog.at_level(logging.WARNING):
        save_pruned(shrink(build_bert(), kept), tmp_path, stock="require")
    assert "Units of zeros were added, so that a stock config can say the shape: 2 of kind neuron." in caplog.messages
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["intermediate_size"] == 5
    assert config["pruning_config"]["kept"]["layers.0.mlp.neurons"] == "0-4 of 24"
    model = load_pruned(tmp_path, dtype=torch.float32)
    up, down = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense
    assert up.weight.any(1).tolist() == up.bias.bool().tolist() == [False, True, True, True, False]
    assert down.weight.any(0).tolist() == [False, True, True, True, False]


def test_kv_groups_and_heads_keep_their_ratio(tmp_path):
    model = build_llama(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    kept = {
        "layers.0.attention.kv_groups": [3],
        "layers.1.attention.kv_groups": [0, 2],
        "layers.1.attention.heads": [1, 4],  # one of two in each
    }
    small = shrink(model, kept)
    save_pruned(small, tmp_path, stock="require")
    padded = load_pruned(tmp_path, dtype=torch.float32)
    heads = {name: units for name, units in units_of(padded).items() if "attention" in name}
    assert set(heads.items()) == {
        (f"layers.{i}.attention.{k}", n) for i in (0, 1) for k, n in (("kv_groups", 2), ("heads", 4))
    }
    torch.testing.assert_close(
        logits_of(padded, draw_batch(padded)), logits_of(small, draw_batch(small)), atol=1e-5, rtol=0
    )


def test_shrinking_removes_again_what_was_added(tmp_path):
    small = shrink(build_llama(), PLANS["llama"])
    save_pruned(small, tmp_path, stock="require")
    padded = load_pruned(tmp_path, dtype=torch.float32)
    assert padded.num_parameters() > small.num_parameters()
    assert_same_weights(small, shrink(padded))


def test_alibi_needs_every_head_where_it_was(tmp_path):
    model = zoo.build("bloom", "causal_lm")
    batch = zoo.inputs(model)
    plan = {"layers.0.attention.heads": [1, 3], "layers": [0]}
    save_pruned(shrink(model, plan), tmp_path, stock="require")
    padded = load_pruned(tmp_path, dtype=torch.float32)
    assert {group.units for group in find_groups(padded, ["head"])} == {4}
    torch.testing.assert_close(zoo.outputs(padded, batch), zoo.outputs(model, batch), atol=1e-5, rtol=1e-5)


WIDTHS = {
    "gpt2": ("causal_lm", {"layers.0.mlp.neurons": [3, 4], "layers.1.mlp.neurons": [0, 1, 5]}),
    "whisper": (
        "speech_seq2seq",
        {f"{one}.layers.{i}.mlp.neurons": [i, 5] for one in ("encoder", "decoder") for i in (0, 1)},
    ),
    "mixtral": ("causal_lm", {f"layers.{i}.experts": [i, 2, 3] for i in (0, 1)}),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_other_configs_state_widths_and_experts(name, tmp_path):
    task, plan = WIDTHS[name]
    model = shrink(zoo.build(name, task, **({"n_inner": None} if name == "gpt2" else {})), plan)
    save_pruned(model, tmp_path, stock="require")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    stated = {"gpt2": ("n_inner", 3), "whisper": ("encoder_ffn_dim", 2), "mixtral": ("num_local_experts", 3)}[name]
    assert (config[stated[0]], config["pruning_config"]["stock"]) == (stated[1], True)
    batch = zoo.inputs(model)
    padded = load_pruned(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(zoo.outputs(padded, batch), zoo.outputs(model, batch), atol=1e-5, rtol=1e-5)


def test_uneven_experts_cannot_be_added(tmp_path):
    model = shrink(zoo.build("mixtral", "causal_lm"), {"layers.0.experts": [0, 2]})
    with pytest.raises(
        PruningError, match=r"whatever units of zeros are added: 'layers.0.experts' has 2 units.*builds 4"
    ):
        save_pruned(model, tmp_path / "new", stock="require")
    assert not (tmp_path / "new").exists()


def test_only_the_dense_shape_is_no_answer(tmp_path):
    heads = {name: units for name, units in UNEVEN.items() if name.endswith("heads")}
    with pytest.raises(PruningError, match="the nearest shape that it can say is the dense one"):
        save_pruned(shrink(build_bert(), heads), tmp_path, stock="require")


@pytest.mark.skipif(not hasattr(transformers, "MiMoV2FlashForCausalLM"), reason="transformers 4 has no such model")
@pytest.mark.parametrize(
    "plan",
    [
        {"layers.1.attention.kv_groups": [0, 1]},
        {"layers": [1], "layers.1.attention.kv_groups": [0, 1]},
        {f"layers.{i}.attention.kv_groups": [i % 2] for i in range(3)},
    ],
)
def test_layers_with_different_numbers_of_kv_heads_are_saved_and_loaded(plan, tmp_path):
    model = zoo.build("mimo_v2_flash", "causal_lm")
    batch = zoo.inputs(model)
    for name, kept in plan.items():  # one after another, as training does
        shrink(model, {name: kept})
    loaded = load_pruned(save_pruned(model, tmp_path), dtype=torch.float32)
    torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
