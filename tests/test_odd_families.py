"""Vision, speech and dual models whose code is odd: removed units equal masked ones, and what cannot go says why."""

import copy

import pytest
import torch
import zoo

from hf_prune import (
    PruningError,
    UnsupportedModelError,
    find_groups,
    load_pruned,
    mask_units,
    save_pruned,
    shrink,
    verify,
)
from hf_prune.architectures import inspect_model
from hf_prune.selfcheck import TOLERANCE, output_of, random_plan, relative_difference

HEADS = {
    "blip:tower": "vision.layers.0.attention.heads",  # a fused projection, reshaped to the width of the hidden states
    "clip:image_classification": "layers.0.attention.heads",  # reshaped so on transformers 4
    "kyutai_speech_to_text:speech_seq2seq": "layers.0.attention.heads",  # projections wrapped once more
    "perceiver:image_classification": "layers.0.attention.heads",  # a norm in the attention that is not over heads
    "pop2piano:speech_seq2seq": "decoder.attention.heads",  # one position bias for all layers
    "timesformer:tower": "layers.0.temporal_attention.attention.heads",
}


def build(case):
    model = zoo.build(*case.split(":"))
    return model, zoo.inputs(model)


@pytest.mark.parametrize("case", HEADS)
def test_every_kind_removed_equals_masked(case):
    model, batch = build(case)
    report = verify(model, batch)
    assert report.passed, report
    assert HEADS[case] in {group.name for group in find_groups(model, ["head"])}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
@pytest.mark.parametrize("case", ["blip:tower", "clip:image_classification"])
def test_reshaped_heads_can_be_cut_twice_saved_and_traced(case, tmp_path):
    model, batch = build(case)
    groups = find_groups(model, ["head"])
    first = {group.name: range(1, group.units) for group in groups}
    second = {group.name: [group.units - 1] for group in groups}
    expected = output_of(mask_units(copy.deepcopy(model), second), batch)
    small = shrink(shrink(model, first), second)
    save_pruned(small, tmp_path)
    loaded = load_pruned(tmp_path, model_class=type(model))
    assert relative_difference(expected, output_of(loaded, batch)) < TOLERANCE

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = loaded.eval()

        def forward(self, *values):
            return self.model(**dict(zip(batch, values)), return_dict=False)[0]

    traced = torch.jit.trace(Positional(), tuple(batch.values()), strict=False, check_trace=False)
    assert relative_difference(expected, traced(*batch.values()).float()) < TOLERANCE


@pytest.mark.parametrize("setting", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_position_bias_of_an_image_model_follows_its_heads(setting):
    model = zoo.build("beit", "image_classification", **{setting: True})
    groups = find_groups(model, ["head"])
    assert groups
    own = any("bias_table" in part.parameter for part in groups[0].slices)
    assert own == (setting == "use_relative_position_bias")  # a shared table stays whole: heads get their rows of it
    report = verify(model, zoo.inputs(model))
    assert report.passed, report


def test_heads_that_are_turned_before_projection_are_refused():
    model = zoo.build("wav2vec2-conformer", "audio_classification", position_embeddings_type="rotary")
    report = verify(model, zoo.inputs(model))
    assert report.passed, report
    assert "viewed as all heads" in report.refusals["layers.0.attention"]


def test_heads_behind_a_gate_over_all_heads_are_refused():
    model, _ = build("wavlm:audio_classification")
    reasons = {one.place: one.reason for one in inspect_model(model).refusals}
    assert "gate" in reasons["layers.0.attention"]
    with pytest.raises(UnsupportedModelError, match="gate"):
        find_groups(model, ["head"])


@pytest.mark.parametrize(("case", "name"), [("yolos:tower", "layers"), ("bridgetower:tower", "text.layers")])
def test_layers_that_other_tensors_follow_are_not_cut(case, name):
    model, batch = build(case)
    assert "layer" not in verify(model, batch).differences
    with pytest.raises(PruningError, match="would (have another shape|be shorter too)"):
        shrink(model, {name: [0]})


def test_a_skipped_block_hands_on_what_the_next_one_reads():
    model, batch = build("pop2piano:speech_seq2seq")
    for kind in ("branch", "layer"):
        plan = random_plan(model, find_groups(model, [kind]), 0)
        masked = output_of(mask_units(copy.deepcopy(model), plan), batch)
        assert relative_difference(masked, output_of(shrink(copy.deepcopy(model), plan), batch)) < TOLERANCE


def test_what_assigns_patches_to_groups_stays():
    model, batch = build("groupvit:tower")
    report = verify(model, batch)
    assert report.passed, report
    assert "group" in report.refusals["vision.layers.0.downsample.assign.branch"]
    assert "vision.layers.0.downsample.assign.heads" not in {group.name for group in find_groups(model)}


@torch.no_grad()
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_of_t5_alone_shares_its_position_bias_too(stack, tmp_path):
    model, batch = build("t5:seq2seq_lm")
    before = output_of(model, batch)
    alone = model.get_submodule(stack)
    kept = {"attention.heads": [1, 3], "layers.1.mlp.neurons": [0, 5, 6]}
    assert {"attention.heads"} == {one.name for one in find_groups(alone, ["head"]) if ".cross" not in one.name}
    masked = copy.deepcopy(model)
    mask_units(masked.get_submodule(stack), kept)
    shrink(alone, kept)
    assert relative_difference(before, output_of(model, batch)) > TOLERANCE
    assert relative_difference(output_of(masked, batch), output_of(model, batch)) < TOLERANCE
    loaded = load_pruned(save_pruned(model, tmp_path))
    assert relative_difference(output_of(model, batch), output_of(loaded, batch)) < TOLERANCE
