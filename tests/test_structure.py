"""Where units are: names and numbers that are equal on every lane, and clear words where there are none."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import (
    BRANCHES,
    BUILD,
    HEADS,
    KV_GROUPS,
    LAYERS,
    NEURONS,
    SIZES,
    TEXT,
    UNEVEN,
    UNITS,
    assert_same_outputs,
    build_bert,
    build_llama,
    randomize,
    units_of,
)
from torch import nn

from hf_prune import (
    Group,
    PruningError,
    Slice,
    UnsupportedModelError,
    find_groups,
    mask_units,
    register_architecture,
    shrink,
)
from hf_prune.architectures import ARCHITECTURES, inspect_model, prunable_macs
from hf_prune.structure import keep_vectors, live_shapes, matrix_entries, unit_cost


@pytest.mark.parametrize("name", BUILD)
def test_groups_have_the_same_names_and_units_on_every_lane(name):
    assert units_of(BUILD[name](), None) == {**UNITS[name], **BRANCHES, **LAYERS}


def test_groups_come_in_layer_order_with_kv_groups_before_their_heads():
    names = [group.name for group in find_groups(build_llama())]
    one_layer = ["attention.kv_groups", "attention.heads", "attention.branch", "mlp.branch", "mlp.neurons"]
    assert names == ["layers", *(f"layers.{i}.{place}" for i in range(2) for place in one_layer)]


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForTokenClassification"])
def test_names_are_relative_to_the_base_model(head):
    assert units_of(build_bert(head), None) == {**UNITS["bert"], **BRANCHES, **LAYERS}


def test_order_goes_by_layer_number_not_by_text():
    groups = find_groups(build_bert(num_hidden_layers=11), kinds=["head"])
    assert [group.name for group in groups] == [f"layers.{i}.attention.heads" for i in range(11)]


def test_heads_inside_kv_groups_are_parts():
    by_name = {group.name: group for group in find_groups(build_llama())}
    assert by_name["layers.0.attention.heads"].parts == 2
    assert by_name["layers.0.attention.heads"].per_part == 2
    assert by_name["layers.0.attention.kv_groups"].parts == 1


def test_a_shrunk_model_has_fewer_units_under_the_same_names():
    model = shrink(build_bert(), UNEVEN)
    assert units_of(model, None) == {**{name: len(kept) for name, kept in UNEVEN.items()}, **BRANCHES, **LAYERS}


def test_kv_groups_with_one_head_each_are_still_kv_groups():
    model = shrink(build_llama(), {f"layers.{i}.attention.heads": [0, 3] for i in range(2)})
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 2
    units = {group.name: group.units for group in find_groups(model, kinds=["head", "kv_group"])}
    assert units == {**KV_GROUPS, **dict.fromkeys(HEADS, 2)}


def test_kinds_choose():
    assert {group.kind for group in find_groups(build_llama(), kinds=["kv_group", "neuron"])} == {"kv_group", "neuron"}


def test_groups_print_as_a_table_and_are_a_list():
    model = build_bert()
    found = find_groups(model, ["head", "neuron"])
    assert isinstance(found, list)
    assert [line.split() for line in str(found).splitlines()][:3] == [
        ["|", "group", "|", "kind", "|", "units", "|"],
        ["|--------------------------|-------:|------:|"],
        ["|", "layers.0.attention.heads", "|", "head", "|", "4", "|"],
    ]
    assert "| layers.1.mlp.neurons" in found._repr_html_()


def test_a_part_of_what_was_found_is_no_wall_of_text():
    found = find_groups(build_llama())
    assert repr(found[:2]) == str(found[:2]) == found[:2].table()
    assert len(repr(found[:2]).splitlines()) == 4
    assert isinstance(found[0], Group)
    assert repr([one for one in found if one.kind == "kv_group"][:1]) == (
        f"[Group('layers.0.attention.kv_groups', kv_group, {found[0].units} units)]"
    )


def test_misspelt_kind_is_named():
    with pytest.raises(PruningError, match=r"kinds must be among head, .*Did you mean 'head'\? Received: 'heads'"):
        find_groups(build_bert(), kinds=["heads"])


def test_kind_that_the_model_lacks():
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification has no groups of kind kv_group"):
        find_groups(build_bert(), kinds=["kv_group"])


def test_model_without_groups_says_what_was_looked_for_and_the_one_file_to_write():
    with pytest.raises(UnsupportedModelError) as caught:
        find_groups(nn.Sequential(nn.Linear(4, 4)))
    for part in ("Sequential", "(query, key, value)", "(query_key_value)", "(gate_proj, up_proj, down_proj)"):
        assert part in str(caught.value)
    assert "one function under hf_prune.register_architecture(model_type)" in str(caught.value)


def test_a_norm_over_all_heads_is_not_offered():
    config = transformers.Olmo2Config(**TEXT, **SIZES)
    model = randomize(transformers.Olmo2ForCausalLM(config))
    assert units_of(model, None) == {**NEURONS, **BRANCHES, **LAYERS}
    assert {one.place: one.reason for one in inspect_model(model).refusals} == {
        f"layers.{i}.attention": "q_norm.weight is a norm over all heads: removing one would change the others"
        for i in range(2)
    }


class OwnConfig(transformers.PretrainedConfig):
    model_type = "own_model"


class OwnModel(transformers.PreTrainedModel):
    """Two odd matrices; the second one is transposed."""

    config_class = OwnConfig
    main_input_name = "inputs"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.into = nn.Linear(3, 8)
        self.out = nn.Parameter(torch.zeros(8, 5))
        self.post_init()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.into(inputs).relu() @ self.out


def groups_of_own_model(model: nn.Module) -> list[Group]:
    """Say it once: pairs of hidden entries are a unit."""
    slices = (Slice("into.weight", 0, 2), Slice("into.bias", 0, 2), Slice("out", 0, 2))
    return [Group("pairs", "channel", model.out.shape[0] // 2, slices)]


@pytest.fixture
def own_model():
    register_architecture("own_model")(groups_of_own_model)
    yield randomize(OwnModel(OwnConfig()))
    del ARCHITECTURES._entries["own_model"]


def test_architecture_from_outside_is_one_function(own_model):
    inputs = torch.randn(7, 3)
    expected = own_model.into(inputs).relu()[:, [2, 3, 6, 7]] @ own_model.out[[2, 3, 6, 7]]
    torch.testing.assert_close(mask_units(own_model, {"pairs": [1, 3]})(inputs), expected)
    torch.testing.assert_close(shrink(own_model)(inputs), expected)
    assert own_model.into.out_features == 4
    assert own_model.config.pruning_config["kept"] == {"pairs": "1,3 of 4"}


def test_architecture_is_registered_once(own_model):
    with pytest.raises(PruningError, match="architecture named 'own_model' is registered already"):
        register_architecture("own_model")(groups_of_own_model)


def test_slice_without_parts_by_hand():
    assert Slice("w", 0, per_unit=2, offset=1).index(torch.tensor([0, 3]), per_part=4).tolist() == [1, 2, 7, 8]


def test_slice_with_parts_by_hand():
    """Two heads of two entries in each part, parts ten entries apart."""
    slices = Slice("w", 0, per_unit=2, offset=1, part_stride=10)
    assert slices.index(torch.tensor([0, 1, 2, 3]), per_part=2).tolist() == [1, 2, 3, 4, 11, 12, 13, 14]


GROUPS = [
    Group("outer", "kv_group", 2, (Slice("k", 0, 1), Slice("o", 1, 2))),
    Group("inner", "head", 4, (Slice("o", 1, 1),), parts=2),
]
SHAPES = {"k": (2, 3), "o": (3, 4)}


def test_entries_stay_when_all_groups_agree():
    vectors = keep_vectors(GROUPS, {"outer": [1], "inner": [0, 2]}, SHAPES)
    assert {key: vector.tolist() for key, vector in vectors.items()} == {
        ("k", 0): [False, True],
        ("o", 1): [False, False, True, False],
    }
    assert keep_vectors(GROUPS, {"outer": [0, 1]}, SHAPES) == {}


def test_costs_by_hand():
    vectors = keep_vectors(GROUPS, {"outer": [1], "inner": [2]}, SHAPES)
    assert matrix_entries(GROUPS, SHAPES) == 2 * 3 + 3 * 4
    assert matrix_entries(GROUPS, SHAPES, vectors) == 1 * 3 + 3 * 1
    assert [unit_cost(group, GROUPS, SHAPES) for group in GROUPS] == [3 + 2 * 3, 3]


def test_prunable_macs_by_hand():
    attention, feed_forward = 4 * 16 * 16, 2 * 16 * 24
    assert prunable_macs(build_bert()) == 2 * (attention + feed_forward)
    grouped = 2 * 16 * 16 + 2 * 16 * 8
    assert prunable_macs(build_llama()) == 2 * (grouped + 3 * 16 * 24)
    groups, shapes = find_groups(build_bert()), live_shapes(build_bert())
    assert {group.name: unit_cost(group, groups, shapes) for group in groups[:6]} == {
        "layers": attention + feed_forward,
        "layers.0.attention.heads": attention / 4,
        "layers.0.attention.branch": attention,
        "layers.0.mlp.branch": feed_forward,
        "layers.0.mlp.neurons": feed_forward / 24,
        "layers.1.attention.heads": attention / 4,
    }


def test_finding_groups_changes_nothing():
    model = build_bert()
    find_groups(model)
    assert_same_outputs(build_bert(), model, atol=0)


def test_weights_that_are_computed_from_others_are_not_offered():
    model = build_bert()
    first, _ = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    torch.nn.utils.parametrizations.weight_norm(first)
    assert {group.name for group in find_groups(model, ["neuron"])} == {"layers.1.mlp.neurons"}
    refused = next(one for one in inspect_model(model).refusals if one.place == "layers.0.mlp.neurons")
    assert "is computed from other tensors: call hf_prune.adopt_torch_masks" in refused.reason
    torch.nn.utils.parametrize.remove_parametrizations(first, "weight")
    assert len(find_groups(model, ["neuron"])) == 2
