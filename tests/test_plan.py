"""The written plan: runs of units as text, and strangers' texts that must not get through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNEVEN, build_bert, build_llama

from hf_prune import CheckpointError, find_groups, shrink
from hf_prune.plan import annotate, decode_units, encode_units, read_record


@pytest.mark.parametrize(
    ("units", "dense", "text"),
    [
        ([0, 1, 2, 3, 7], 12, "0-3,7 of 12"),
        ([5], 6, "5 of 6"),
        ([0, 2, 4], 5, "0,2,4 of 5"),
        ([0, 1, 2], 3, "0-2 of 3"),
    ],
)
def test_text_by_hand(units, dense, text):
    assert encode_units(units, dense) == text
    assert decode_units("g", text) == (units, dense)


@settings(deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 3000)).map(sorted), st.integers(3001, 5000))
def test_text_goes_there_and_back(units, dense):
    assert decode_units("g", encode_units(units, dense)) == (units, dense)


def test_text_is_short():
    assert len(encode_units(range(14336), 14336)) < 20


MALFORMED = [
    "",
    "0-3,7",
    "0-3 of",
    "3-0 of 12",
    "7,3 of 12",
    "3,3 of 12",
    "0-3,3 of 12",
    "12 of 12",
    "0-12 of 12",
    "-1 of 12",
    "0,,1 of 12",
    "0, 1 of 12",
    "0.5 of 12",
    "1e3 of 12",
    "0-3 of 12 of 12",
    "0-3 of 12\n",
    "\N{ARABIC-INDIC DIGIT ZERO} of 12",
    "__import__('os')",
    "9" * 5000 + " of 12",
    "0-999999998 of 999999999",
    None,
    7,
    [0, 1],
    {"0": 1},
    True,
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text)[:20])
def test_malformed_text_names_the_group_and_what_was_received(text):
    with pytest.raises(
        CheckpointError, match=r"kept\['layers.0'\] must be .*such as '0-3,7 of 12'. Received: "
    ) as caught:
        decode_units("layers.0", text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], "must be a mapping with a mapping 'kept'"),
        ("all", "must be a mapping"),
        ({"format": 1, "kept": ["0-3 of 4"]}, "kept must be of type dict"),
        ({"format": 2, "kept": {}}, "format must be 1 to 1 .*update hf_prune to load newer folders. Received: 2"),
        ({"format": 0, "kept": {}}, "Received: 0"),
        ({"format": "1", "kept": {}}, "Received: '1'"),
        ({"kept": {}}, "Received: None"),
        ({"format": 1, "kept": {"layers.0.mlp.neurons": "all"}}, r"kept\['layers.0.mlp.neurons'\]"),
    ],
)
def test_malformed_block(block, message):
    model = build_bert()
    model.config.pruning_config = block
    with pytest.raises(CheckpointError, match=message):
        read_record(model)


def test_block_without_cuts_is_an_empty_record():
    model = build_bert()
    assert read_record(model) == {}
    model.config.pruning_config = {"format": 1}
    assert read_record(model) == {}


def test_record_knows_dense_numbers():
    model = shrink(build_bert(), UNEVEN)
    record, groups = read_record(model), {group.name: group for group in find_groups(model)}
    assert record["layers.0.attention.heads"] == ([0, 2, 3], 4)
    assert record.dense_numbers(groups["layers.1.attention.heads"]) == [1]
    assert record.to_live(list(groups.values()), {"layers.0.attention.heads": [0, 3]}) == {
        "layers.0.attention.heads": [0, 2]
    }


def test_record_numbers_heads_of_kept_kv_groups():
    model = shrink(build_llama(), {"layers.0.attention.kv_groups": [1]})
    record, groups = read_record(model), {group.name: group for group in find_groups(model)}
    heads = groups["layers.0.attention.heads"]
    assert (record.dense_numbers(heads), record.dense_units(heads)) == ([2, 3], 4)


def test_unknown_keys_of_the_block_stay():
    model = shrink(build_bert(), UNEVEN)
    model.config.pruning_config["written_by_a_friend"] = [1, 2]
    shrink(model, {"layers.0.mlp.neurons": [0, 3]})
    assert model.config.pruning_config["written_by_a_friend"] == [1, 2]
    assert model.config.pruning_config["kept"]["layers.0.mlp.neurons"] == "0,3 of 24"


def test_notes_are_kept_beside_the_plan():
    model = shrink(build_bert(), UNEVEN)
    annotate(model, recipe="quickstart", base_model=None)
    assert model.config.pruning_config["recipe"] == "quickstart"
    assert "base_model" not in model.config.pruning_config
    assert model.config.pruning_config["kept"]["layers.1.attention.heads"] == "1 of 4"


def test_a_uniform_shape_is_said_by_the_config_and_taken_back_when_it_no_longer_is():
    model = shrink(build_bert(), {f"layers.{i}.mlp.neurons": range(8) for i in range(2)})
    assert (model.config.pruning_config["stock"], model.config.intermediate_size) == (True, 8)
    shrink(model, {"layers.0.mlp.neurons": range(4)})
    assert (model.config.pruning_config["stock"], model.config.intermediate_size) == (False, 24)


def test_uniform_heads_change_no_config_that_would_change_the_head_size():
    model = shrink(build_bert(), {f"layers.{i}.attention.heads": [0, 2] for i in range(2)})
    assert (model.config.pruning_config["stock"], model.config.num_attention_heads) == (False, 4)
