"""A checkpoint is untrusted input: a damaged or hostile folder is refused clearly, and none loads as something else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import torch
import transformers
import zoo
from hypothesis import HealthCheck, given, settings
from models import PLANS, UNEVEN, assert_same_outputs, assert_same_weights, build_bert, build_llama, logits_of
from safetensors.torch import load_file, save_file
from test_checkpoint import F32, edit_block, read_config

import hf_prune
from hf_prune import CheckpointError, load_pruned, save_pruned, shrink
from hf_prune.checkpoint import enable_loading


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pruned(shrink(build_bert(), UNEVEN), tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **changes}), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard(folder: Path) -> Path:
    model = load_pruned(folder, **F32)
    (folder / "model.safetensors").unlink()
    save_pruned(model, folder, max_shard_size="5KB")
    return folder / "model.safetensors.index.json"


def both_ways(folder: Path) -> list[Callable[[], Any]]:
    auto = transformers.AutoModelForSequenceClassification
    return [lambda: load_pruned(folder, **F32), lambda: auto.from_pretrained(folder, **F32)]


def assert_refused(folder: Path, message: str) -> None:
    for load in both_ways(folder):
        with pytest.raises(CheckpointError, match=message):
            load()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("all", "pruning_config must be a mapping"),
        ([], "pruning_config must be a mapping"),
        ({"format": 1, "kept": ["0-3 of 4"]}, "kept must be of type dict"),
        ({"format": 1}, "cannot be loaded"),
        ({"format": True, "kept": {}}, "format must be 1"),
        ({"format": 99, "kept": {}}, "update hf_prune to load newer folders. Received: 99"),
        ({"format": 1, "kept": {}, "stock": "no"}, "stock must be of type bool. Received: 'no'"),
        ({"format": 1, "kept": {}, "digests": []}, "digests must be of type dict"),
        ({"format": 1, "kept": {}}, "cannot be loaded"),
        ({"format": 1, "kept": {"layers.0.mlp.neurons": "0-9999999 of 9999999"}}, "must be increasing unit runs"),
        ({"format": 1, "kept": {"x": "0-9999998 of 9999999"}}, "must keep units that Bert.* has. Received: 9999999"),
        ({"format": 1, "kept": {"x": "1" * 10**6}}, "must be increasing unit runs such as"),
        ({"format": 1, "kept": {"../../../etc": "0 of 4"}}, "names groups that BertForSequenceClassification does not"),
        ({"format": 1, "kept": {"layers.0.mlp.neurons": "3,3 of 24"}}, "must be increasing unit runs"),
        ({"format": 1, "kept": {"layers.0.mlp.neurons": "-3 of 24"}}, "must be increasing unit runs"),
        ({"format": 1, "kept": {"layers.0.mlp.neurons": 5}}, "must be increasing unit runs"),
        ({"format": 1, "kept": {"layers.0.mlp.neurons": "0-11 of 24"}}, "cannot be loaded"),
    ],
)
def test_a_block_that_is_not_this_models_is_refused(block, message, folder):
    edit_config(folder, pruning_config=block)
    assert_refused(folder, message)


def test_a_folder_that_says_it_is_stock_must_have_these_shapes(folder):
    edit_block(folder, stock=True)
    assert_refused(folder, r"layers.0.attention.heads'\] is for 4 units, Bert.* has 4. Received: '0,2-3 of 4'")


@pytest.mark.parametrize("cut", [0, 1, 7, 100, -1])
def test_a_truncated_file_is_refused(cut, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert_refused(folder, "cannot be loaded: a file is damaged.*SafetensorError")


@pytest.mark.parametrize("size", [2**63, 10**8, 0])
def test_a_header_that_claims_another_size_is_refused(size, folder):
    file = folder / "model.safetensors"
    file.write_bytes(size.to_bytes(8, "little") + file.read_bytes()[8:])
    assert_refused(folder, "cannot be loaded")


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"])
def test_a_missing_tensor_is_not_drawn_at_random(name, folder):
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert_refused(folder, rf"must hold every tensor of BertForSequenceClassification. Received: none of \['{name}'\]")
    with pytest.raises(CheckpointError, match="must hold every tensor of BertForTokenClassification"):
        transformers.AutoModelForTokenClassification.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="must hold every tensor of BertModel"):
        transformers.AutoModel.from_pretrained(folder)


def test_a_tensor_without_a_place_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update(stray=torch.zeros(3)))
    assert_refused(folder, r"must have a place in BertForSequenceClassification. Received: \['stray'\]")


def test_tensors_of_different_shape_that_changed_places_are_refused(folder):
    first, second = (f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in range(2))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(folder, swap)
    assert_refused(folder, "cannot be loaded")


@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn, torch.float16])
def test_weights_of_a_type_that_none_has_are_refused(kind, folder):
    edit_config(folder, dtype="bfloat16")
    name = "classifier.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    assert_refused(folder, "Weights must be of one floating type, as config.dtype says. Received: classifier.weight is")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "x.bin", "", 5])
def test_a_name_that_leads_elsewhere_is_refused(name, folder):
    index = shard(folder)
    told = json.loads(index.read_text())
    told["weight_map"]["classifier.bias"] = name
    index.write_text(json.dumps(told))
    assert_refused(folder, "Weight files must be safetensors files of the folder itself|cannot be loaded")


def test_weights_named_by_the_config_must_lie_in_the_folder(folder):
    edit_config(folder, transformers_weights="../../secret.safetensors")
    assert_refused(folder, "Weight files must be safetensors files of the folder itself")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_a_damaged_index_is_refused(text, folder):
    shard(folder).write_text(text)
    assert_refused(folder, "cannot be loaded|index.json must (be a JSON file|hold a mapping)")


def test_a_pickle_beside_a_plan_is_never_read(folder):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (folder / "it_ran",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    assert_refused(folder, "needs model.safetensors, or model.safetensors.index.json and the files .* Received: none")
    assert not (folder / "it_ran").exists()


@pytest.mark.parametrize("name", ["model.pth", "prune_log/pytorch_model.bin"])
def test_another_tools_pickle_is_refused_with_the_way_to_convert_it(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    torch.save(build_bert(), file)
    for path in (file, file.parent):
        with pytest.raises(
            CheckpointError, match=r"A pickle runs code.*adopt_shapes.*save_pruned.*Received: " + file.name
        ):
            load_pruned(path)


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_pruned(folder)


@pytest.mark.parametrize("names", [None, [], ["load_tool"], ["../x"], [5], "BertModel"])
def test_architectures_must_name_a_model(names, folder):
    edit_config(folder, architectures=names)
    with pytest.raises(CheckpointError, match=r"config.architectures must name a class|cannot be loaded"):
        load_pruned(folder)


def test_stock_folders_are_checked_like_others(tmp_path):
    even = {f"layers.{i}.mlp.neurons": range(8) for i in range(2)}
    save_pruned(shrink(build_bert(), even), tmp_path, stock="require")
    edit_tensors(tmp_path, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    assert_refused(tmp_path, "must hold every tensor")


def test_dense_folders_load_as_ever(tmp_path, caplog):
    build_bert().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("classifier.bias"))
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)  # stock transformers warns; so be it


# digests
def test_digests_are_of_each_tensor_and_are_not_the_live_models(tmp_path):
    model = shrink(build_llama(), PLANS["llama"])
    save_pruned(model, tmp_path, digest=True, max_shard_size="5KB")
    digests = read_config(tmp_path)["pruning_config"]["digests"]
    assert len(digests) == len(set(digests.values())) == len(model.state_dict()) + 1  # and the config
    loaded = load_pruned(tmp_path, **F32)
    assert_same_weights(model, loaded)
    for one in (model, loaded):
        assert "digests" not in one.config.pruning_config


@pytest.mark.parametrize("offset", [-1, -1000])
def test_a_flipped_bit_is_found_by_digests(offset, tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path, digest=True)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    assert_refused(
        tmp_path, "Each tensor, and the config, must have the SHA-256 of pruning_config.digests. Received: 1 others"
    )


def test_tensors_of_one_shape_that_changed_places_are_found_by_digests(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path, digest=True)
    first, second = (f"bert.encoder.layer.{i}.output.LayerNorm.weight" for i in range(2))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(tmp_path, swap)
    assert_refused(tmp_path, "Received: 2 others")


def test_another_config_is_found_by_digests(tmp_path):
    save_pruned(shrink(build_bert(), UNEVEN), tmp_path, digest=True)
    edit_config(tmp_path, layer_norm_eps=0.1)
    assert_refused(tmp_path, "Received: 1 others, first 'config.json'")


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="transformers 5 does not save such tables")
def test_a_table_that_the_constructor_makes_may_be_missing(tmp_path):
    model = zoo.build("swin", "image_classification")
    save_pruned(shrink(model, {"stages.0.layers.0.mlp.neurons": [0, 3]}), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "position_index" not in k}, file, {"format": "pt"})
    batch = zoo.inputs(model)
    torch.testing.assert_close(logits_of(load_pruned(tmp_path, **F32), batch), logits_of(model, batch), atol=0, rtol=0)


def test_an_index_that_says_another_file_is_refused(tmp_path):
    save_pruned(shrink(build_llama(), PLANS["llama"]), tmp_path, max_shard_size="5KB")
    file = tmp_path / "model-00001-of-00004.safetensors"
    name, tensor = next(iter(load_file(file).items()))
    save_file({f"{name}s": tensor, **{k: v for k, v in load_file(file).items() if k != name}}, file)
    assert_refused(tmp_path, f"must say of each tensor which file holds it. Received: '{name}'")


@pytest.mark.parametrize("layers", [10**9, 42])
def test_more_layers_than_tensors_are_refused_before_any_is_built(layers, folder):
    edit_config(folder, num_hidden_layers=layers)
    assert_refused(folder, f"cannot have more layers than tensors, 41. Received: {layers} layers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_position_embeddings": 10**9},
            r"config.max_position_embeddings must fit weights .* Received: 1000000000",
        ),
        ({"hidden_size": 10**5}, r"the weight files can fill. Received: one of \d{11} parameters|RuntimeError"),
    ],
)
def test_sizes_that_the_files_cannot_fill_are_never_allocated(changes, message, folder):
    edit_config(folder, **changes)
    assert_refused(folder, message)


def test_a_dense_folder_is_checked_too_by_load_pruned(tmp_path):
    build_bert().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    with pytest.raises(
        CheckpointError, match=r"must hold every tensor .* Received: none of \['bert.embeddings.LayerNorm.bias'"
    ):
        load_pruned(tmp_path, **F32)


def test_a_dense_model_can_have_digests_too(tmp_path):
    save_pruned(build_bert(), tmp_path, digest=True)
    assert_same_outputs(build_bert(), load_pruned(tmp_path, **F32))
    edit_tensors(tmp_path, lambda tensors: tensors["classifier.bias"].add_(1))
    assert_refused(tmp_path, "Received: 1 others")


@pytest.fixture
def elsewhere(folder) -> Path:
    """A file of other weights outside the folder, under names that a config or an index may lead to."""
    place = folder.parent / "elsewhere"
    place.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: one + 1 for name, one in tensors.items()}, place / "s.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "../elsewhere/s.safetensors")}
    (folder / "w.safetensors.index.json").write_text(json.dumps(index))
    return place


@pytest.mark.parametrize("beside", [True, False])
def test_weights_that_the_config_names_are_those_that_are_checked(beside, folder, elsewhere):
    edit_config(folder, transformers_weights="w.safetensors.index.json")
    if not beside:
        (folder / "model.safetensors").unlink()
    assert_refused(folder, "Weight files must be safetensors files of the folder itself")
    with pytest.raises(CheckpointError, match="Weight files must be"):
        load_pruned(folder, transformers_weights="w.safetensors.index.json", **F32)


def test_weights_under_another_name_load_and_are_checked(folder):
    model = load_pruned(folder, **F32)
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    edit_config(folder, transformers_weights="w.safetensors")
    assert_same_weights(model, load_pruned(folder, **F32))
    edit_config(folder, num_hidden_layers=20000)
    assert_refused(folder, "cannot have more layers than tensors, 41. Received: 20000")


def test_weights_of_a_variant_are_checked(folder):
    model = load_pruned(folder, **F32)
    (folder / "model.safetensors").rename(folder / "model.mine.safetensors")
    assert_same_weights(model, load_pruned(folder, variant="mine", **F32))
    edit_config(folder, num_hidden_layers=20000)
    with pytest.raises(CheckpointError, match="cannot have more layers than tensors"):
        load_pruned(folder, variant="mine", **F32)


@pytest.mark.parametrize("method", ["mine", None, [], {}, 5])
def test_an_unknown_quantization_switches_no_check_off(method, folder):
    edit_config(folder, quantization_config={"quant_method": method})
    edit_tensors(folder, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    assert_refused(folder, "must hold every tensor|cannot be loaded")
    edit_tensors(folder, lambda tensors: tensors.update({"classifier.bias": torch.zeros(3, dtype=torch.int8)}))
    assert_refused(folder, "Weights must be of one floating type")


def test_load_pruned_checks_and_cuts_without_the_hook(folder):
    model = load_pruned(folder, **F32)
    hf_prune.disable_loading()
    try:
        assert_same_weights(model, load_pruned(folder, **F32))
        with pytest.raises(Exception, match="mismatch|size"):  # others' calls are not ours
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        edit_tensors(folder, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
        with pytest.raises(CheckpointError, match="must hold every tensor"):
            load_pruned(folder, **F32)
    finally:
        enable_loading()
    assert_refused(folder, "must hold every tensor")


@pytest.mark.parametrize("depths", [[1, 10**6], [[1, 10**6]], [10**9, -(10**9)], 10**6])
def test_depths_in_lists_are_bounded(depths, tmp_path):
    save_pruned(shrink(zoo.build("swin", "image_classification"), {"stages.0.layers.0.mlp.neurons": [0, 3]}), tmp_path)
    edit_config(tmp_path, depths=depths)
    with pytest.raises(CheckpointError, match="cannot have more layers than tensors|must fit weights|cannot be loaded"):
        load_pruned(tmp_path)


def test_empty_tensors_are_no_layers(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"z{i}": torch.zeros(0) for i in range(20000)}))
    edit_config(folder, num_hidden_layers=20000)
    assert_refused(folder, "cannot have more layers than tensors, 41. Received: 20000 layers")


def test_a_plan_may_have_removed_more_layers_than_there_are_tensors(tmp_path):
    model = shrink(build_llama(num_hidden_layers=40), {"layers": [0]})
    save_pruned(model, tmp_path, stock="never")
    assert len(load_file(tmp_path / "model.safetensors")) < 40
    assert_same_weights(model, load_pruned(tmp_path, **F32))


def test_modules_are_counted_while_they_are_built(folder):
    class Many(transformers.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(10**9))

    with pytest.raises(CheckpointError, match="Received: one of far more modules"):
        load_pruned(folder, model_class=Many)


@pytest.mark.parametrize("depth", [150, 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_nested_json_is_refused(name, depth, folder):
    shard(folder)
    text = (folder / name).read_text()
    nested = "[" * depth + "]" * depth
    (folder / name).write_text(text.replace("{", f'{{"odd": {nested}, ', 1))
    with pytest.raises(CheckpointError, match="nested"):
        load_pruned(folder)


def test_a_huge_number_is_named_by_its_size(folder):
    edit_config(folder, hidden_size=10**4000)
    assert_refused(folder, "config.hidden_size must fit .* Received: an integer of 13,288 bits")


def test_a_config_of_many_megabytes_is_not_read(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="config.json must be a file of at most 64 MB. Received: 1048576 MB"):
        load_pruned(folder)


# a bounded slice of benchmarks/fuzz.py
@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, fuzzing.Sound]:
    return fuzzing.sound_folders(tmp_path_factory.mktemp("sound"))


def test_damaged_folders_are_refused_or_load_as_what_they_were(sound, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("damaged") / "model"

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(fuzzing.damaged(sound))
    def check(damage):
        fuzzing.load(sound[damage.name], damage, scratch)

    check()
