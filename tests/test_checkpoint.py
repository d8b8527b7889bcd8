"""Folders: what is written, who can load it, and who must refuse it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    BUILD,
    PLANS,
    UNEVEN,
    UNITS,
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    logits_of,
    training_arguments,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hf_prune import CheckpointError, PruningError, disable_loading, find_groups, load_pruned, save_pruned, shrink
from hf_prune.checkpoint import enable_loading

ROOT = Path(__file__).resolve().parent.parent
AUTO = {"bert": "SequenceClassification", "vit": "ImageClassification", "llama": "CausalLM", "llama_mha": "CausalLM"}
EVEN_NEURONS = {f"layers.{i}.mlp.neurons": [i, 5, 7, 20 + i] for i in range(2)}
EVEN_GROUPS = {**EVEN_NEURONS, "layers.0.attention.kv_groups": [1], "layers.1.attention.kv_groups": [0]}
F32 = {"dtype": torch.float32}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def edit_block(folder: Path, **changes: Any) -> None:
    config = read_config(folder)
    config["pruning_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("name", BUILD)
def test_auto_class_gives_the_small_model_back(name, tmp_path):
    model = shrink(BUILD[name](), PLANS[name])
    save_pruned(model, tmp_path)
    reloaded = getattr(transformers, f"AutoModelFor{AUTO[name]}").from_pretrained(tmp_path, **F32)
    assert type(reloaded) is type(model)
    assert_same_weights(model, reloaded)
    assert_same_outputs(model, reloaded)
    assert {group.name: group.units for group in find_groups(reloaded)} == {
        group.name: group.units for group in find_groups(model)
    }


def test_loading_initialises_nothing_at_random(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path)
    _, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_another_head_on_the_folder(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    save_pruned(model, tmp_path)
    other = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, **F32
    )
    assert other.classifier.out_features == 7
    assert_same_weights(model.bert.encoder, other.bert.encoder)


def test_base_model_of_the_folder_and_back(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    save_pruned(model, tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head", add_pooling_layer=False, **F32)
    assert_same_weights(model.bert.encoder, base.encoder)
    save_pruned(base, tmp_path / "base")
    head = load_pruned(tmp_path / "base", model_class=transformers.BertForQuestionAnswering, **F32)
    assert_same_weights(model.bert.encoder, head.bert.encoder)


def test_device_map(tmp_path):
    model = shrink(build_llama(), PLANS["llama"])
    save_pruned(model, tmp_path)
    assert_same_outputs(model, load_pruned(tmp_path, device_map="cpu", **F32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype, tmp_path):
    model = shrink(build_bert(), UNEVEN)
    save_pruned(model, tmp_path)
    reloaded = load_pruned(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {dtype}
    assert_same_weights(model.to(dtype), reloaded)


def test_sharded_folder(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    save_pruned(model, tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(model, load_pruned(tmp_path, **F32))


def test_from_config_builds_the_small_shape(tmp_path):
    model = shrink(build_bert(), UNEVEN)
    fresh = transformers.AutoModelForSequenceClassification.from_config(model.config)
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("kept", [UNEVEN, EVEN_NEURONS], ids=["uneven", "even"])
def test_plain_save_pretrained_writes_the_same_folder(kept, tmp_path):
    model = shrink(build_bert(), kept)
    save_pruned(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert_same_weights(model, load_pruned(tmp_path / "plain", **F32))


def test_config_says_what_was_removed(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path)
    block = read_config(tmp_path)["pruning_config"]
    assert (block["format"], block["stock"]) == (1, False)
    assert block["kept"]["layers.1.mlp.neurons"] == "5-17 of 24"
    assert read_config(tmp_path)["intermediate_size"] == 24


def test_a_dense_model_is_saved_as_ever(tmp_path):
    save_pruned(build_bert(), tmp_path)
    assert "pruning_config" not in read_config(tmp_path)
    assert_same_weights(build_bert(), load_pruned(tmp_path, **F32))


def test_a_stock_config_is_written_where_one_can_say_the_shape(tmp_path):
    for name, build, kept in (("bert", build_bert, EVEN_NEURONS), ("llama", build_llama, EVEN_GROUPS)):
        model = shrink(build(), kept)
        save_pruned(model, tmp_path / name, stock="require")
        config = read_config(tmp_path / name)
        assert (config["pruning_config"]["stock"], config["intermediate_size"]) == (True, 4)
        assert_same_weights(model, load_pruned(tmp_path / name, **F32))
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_dim"]) == (1, 2, 4)


def test_a_stock_folder_remembers_dense_numbers(tmp_path):
    save_pruned(shrink(build_bert(), EVEN_NEURONS), tmp_path)
    again = shrink(load_pruned(tmp_path, **F32), {"layers.0.mlp.neurons": [5, 20]})
    assert_same_weights(shrink(build_bert(), {**EVEN_NEURONS, "layers.0.mlp.neurons": [5, 20]}), again)
    assert again.config.pruning_config["kept"]["layers.0.mlp.neurons"] == "5,20 of 24"


def test_stock_never_states_the_dense_shape(tmp_path):
    model = shrink(build_bert(), EVEN_NEURONS)
    save_pruned(model, tmp_path, stock="never")
    config = read_config(tmp_path)
    assert (config["pruning_config"]["stock"], config["intermediate_size"]) == (False, 24)
    assert_same_weights(model, load_pruned(tmp_path, **F32))
    assert model.config.intermediate_size == 4, "saving must not change the model"


def test_stock_require_refuses_what_only_the_dense_shape_can_say_and_writes_nothing(tmp_path):
    heads = {name: units for name, units in UNEVEN.items() if name.endswith("heads")}
    rule = "No stock BertConfig can say this shape.*it can say is the dense one. Received: cuts in layers"
    with pytest.raises(PruningError, match=rule):
        save_pruned(shrink(build_bert(), heads), tmp_path / "new", stock="require")
    assert not (tmp_path / "new").exists()


def test_stock_is_one_of_three(tmp_path):
    with pytest.raises(PruningError, match="stock must be 'auto', 'never' or 'require'. Received: 'sometimes'"):
        save_pruned(build_bert(), tmp_path, stock="sometimes")


STOCK = """
import sys, torch, transformers
for name, head in (("bert", "SequenceClassification"), ("llama", "CausalLM")):
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(f"even_{name}", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**torch.load(f"batch_{name}.pt")).logits
    torch.testing.assert_close(logits, torch.load(f"logits_{name}.pt"), atol=1e-5, rtol=0)
    print(name, "loads without us")
    try:
        getattr(transformers, f"AutoModelFor{head}").from_pretrained(f"uneven_{name}")
    except Exception as error:
        print(name, "refused:", type(error).__name__)
assert "hf_prune" not in sys.modules
"""


def run_python(code: str, folder: Path, **environment: str) -> str:
    """Return what a process of its own prints."""
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_stock_transformers_loads_what_it_can_say_and_refuses_the_rest(tmp_path):
    for name, even in (("bert", EVEN_NEURONS), ("llama", EVEN_GROUPS)):
        model = shrink(BUILD[name](), even)
        save_pruned(model, tmp_path / f"even_{name}", stock="require")
        batch = draw_batch(model)
        torch.save(logits_of(model, batch), tmp_path / f"logits_{name}.pt")
        torch.save({key: value for key, value in batch.items() if key != "labels"}, tmp_path / f"batch_{name}.pt")
        save_pruned(shrink(BUILD[name](), PLANS[name]), tmp_path / f"uneven_{name}")
    lines = run_python(STOCK, tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{name} {what}" for name in ("bert", "llama") for what in ("loads without us", "refused")
    ]


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_prune\nfrom transformers import AutoModelForSequenceClassification",
        "from transformers import AutoModelForSequenceClassification, BertModel\nimport hf_prune",
    ],
    ids=["before", "after"],
)
def test_either_import_order_loads(imports, tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path / "small")
    code = f"{imports}\nmodel = AutoModelForSequenceClassification.from_pretrained('small')\n"
    code += "print([layer.intermediate.dense.out_features for layer in model.bert.encoder.layer])"
    assert run_python(code, tmp_path, PYTHONPATH=str(ROOT)).strip() == "[8, 13]"


def test_a_loaded_model_trains_again_and_saves_again(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path / "first")
    model = load_pruned(tmp_path / "first", **F32)
    arguments = training_arguments(tmp_path, max_steps=3)
    transformers.Trainer(model, arguments, train_dataset=draw_rows(model, 12)).train()
    first = load_pruned(tmp_path / "first", **F32)
    assert not torch.equal(first.classifier.weight, model.classifier.weight)
    save_pruned(model, tmp_path / "second")
    again = load_pruned(tmp_path / "second", **F32)
    assert_same_weights(model, again)
    assert again.config.pruning_config == first.config.pruning_config


def test_a_loaded_model_is_pruned_again_in_dense_numbering(tmp_path):
    save_pruned(shrink(build_llama(), PLANS["llama"]), tmp_path)
    further = {"layers.1.attention.kv_groups": [1], "layers.0.mlp.neurons": [3, 21]}
    again = shrink(load_pruned(tmp_path, **F32), further)
    assert_same_weights(shrink(shrink(build_llama(), PLANS["llama"]), further), again)


def test_an_uneven_folder_is_refused_once_loading_is_disabled(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path)
    disable_loading()
    try:
        disable_loading()
        with pytest.raises((RuntimeError, ValueError)):
            transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    finally:
        enable_loading()
        enable_loading()
    assert_same_weights(shrink(build_bert(), UNEVEN), load_pruned(tmp_path, **F32))


def test_a_constructor_that_raised_does_not_disable_later_loads(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path)
    broken = transformers.BertConfig(hidden_size=10, num_attention_heads=3)
    for _ in range(2):
        with pytest.raises(ValueError, match="hidden size"):
            transformers.BertForSequenceClassification(broken)
    edit_block(tmp_path, format=99)
    with pytest.raises(CheckpointError, match="update hf_prune"):
        load_pruned(tmp_path)
    edit_block(tmp_path, format=1)
    assert_same_weights(shrink(build_bert(), UNEVEN), load_pruned(tmp_path, **F32))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.9.mlp.neurons": "0 of 24"}, "names groups that BertForSequenceClassification does not have"),
        ({"layers.0.mlp.neurons": "0-6 of 25"}, "is for 25 units, BertForSequenceClassification has 24"),
        ({"layers": " of 2"}, "At least one unit of 'layers' must stay"),
        ({"layers": "0-1 of 3", "layers.2.mlp.neurons": "0 of 24"}, "names groups that"),
        ({"layers.0.mlp.neurons": "[0, 1]"}, "must be increasing unit runs"),
    ],
)
def test_a_strangers_plan_that_does_not_fit_is_refused(kept, message, tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path)
    edit_block(tmp_path, kept=kept)
    with pytest.raises(CheckpointError, match=message):
        load_pruned(tmp_path)


@pytest.mark.parametrize("text", ["0-6 of 24", " of 24"])
def test_a_plan_with_other_shapes_than_the_weights_is_refused(text, tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path)
    edit_block(tmp_path, kept={"layers.0.mlp.neurons": text})
    with pytest.raises((RuntimeError, ValueError)):
        load_pruned(tmp_path)


def test_load_pruned_takes_the_class_that_was_saved(tmp_path):
    save_pruned(shrink(build_bert("ForTokenClassification"), UNEVEN), tmp_path)
    assert type(load_pruned(tmp_path)) is transformers.BertForTokenClassification


def test_a_folder_that_names_no_class_says_so(tmp_path):
    save_pruned(build_bert(), tmp_path)
    config = {**read_config(tmp_path), "architectures": ["OwnModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match="config.architectures must name a class of transformers. Received: OwnModel"
    ):
        load_pruned(tmp_path)


def test_a_path_that_no_system_takes_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("", tmp_path / ("n" * 300), f"{tmp_path}/a\0b", tmp_path / "loop"):
        with pytest.raises(PruningError, match=r"^path must be a folder.* Received: '"):
            save_pruned(build_bert(), path)


def test_the_tokenizer_is_saved_beside(tmp_path):
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    save_pruned(BUILD["vit"](), tmp_path, tokenizer=processor)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 16


def test_two_models_of_one_config_do_not_share_a_plan(tmp_path):
    first = shrink(build_bert(), UNEVEN)
    second = type(first)(first.config)
    shrink(second, {"layers.0.mlp.neurons": [0]})
    assert {group.name: group.units for group in find_groups(second)}["layers.0.mlp.neurons"] == 1
    assert UNITS["bert"]["layers.0.mlp.neurons"] == 24


def test_a_tokenizer_of_no_model_in_particular_is_named_as_both_lanes_know_it(tmp_path):
    core = Tokenizer(WordLevel({"[UNK]": 0, "good": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path, tokenizer=tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("good")["input_ids"] == [1]
