"""Sparsities and targets mean the dense model, also of a model that was pruned before; what is missed is said."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from models import build_bert, build_llama, draw_batch, draw_rows, randomize, training_arguments

from hf_prune import (
    ExpertPruner,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    PruningCallback,
    Schedule,
    Target,
    find_groups,
    load_pruned,
    prune,
    save_pruned,
    shrink,
)
from hf_prune.architectures import prunable_macs
from hf_prune.dense import dense_macs
from hf_prune.plan import BLOCK, read_record

UNITS = [HeadPruner(), NeuronPruner()]


def count(model):
    return sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("live", [False, True])
def test_a_second_training_leaves_what_the_first_has_left(live, tmp_path):
    model = build_bert(intermediate_size=64)
    macs, parameters = prunable_macs(model), count(model)
    schedule = Schedule(begin=1, end=6, frequency=1)
    callback = PruningCallback(UNITS, schedule, target=Target(macs=0.5), shrink_during_training=live)
    trainer = transformers.Trainer(model, training_arguments(tmp_path, max_steps=8), train_dataset=draw_rows(model, 24))
    callback.attach(trainer).train()
    left, first = prunable_macs(model), callback.report
    assert 0.4 < left / macs <= 0.5
    trainer.train()
    assert prunable_macs(trainer.model) == left
    assert callback.report.kept == first.kept
    assert callback.report.dense.prunable_macs == macs
    assert callback.report.dense.parameters == parameters
    assert callback.report.settings["macs_left"] == pytest.approx(left / macs, abs=1e-6)
    assert callback.report.settings.pop("warnings")[0].startswith("No unit was removed")
    assert callback.report.settings == first.settings


@pytest.mark.parametrize("stock", ["auto", "never"])
def test_a_folder_that_was_loaded_again_is_pruned_towards_the_dense_models_share(stock, tmp_path):
    model = build_llama(intermediate_size=64)
    macs = prunable_macs(model)
    data = [draw_batch(model)]
    prune(model, NeuronPruner(allocation="uniform"), target=Target(macs=0.8), data=data)
    model = load_pruned(save_pruned(model, tmp_path / "m", stock=stock), dtype=torch.float32)
    report = prune(model, UNITS, target=Target(macs=0.5), data=data)
    assert 0.4 < prunable_macs(model) / macs <= 0.5
    assert report.settings["macs_left"] == pytest.approx(prunable_macs(model) / macs, abs=1e-6)
    assert report.units["layers.0.mlp.neurons"] == 64
    assert report.dense.prunable_macs == macs


@pytest.mark.parametrize("pruner", [HeadPruner(sparsity=0.5), NeuronPruner(sparsity=0.5)])
def test_a_sparsity_that_was_reached_removes_nothing_more(pruner):
    model = build_bert(num_hidden_layers=3)
    data = [draw_batch(model)]
    first = prune(model, pruner, data=data)
    again = prune(model, pruner, data=data)
    assert again.kept == first.kept


def test_units_of_layers_that_are_gone_count_as_removed():
    model = build_llama(num_hidden_layers=4)
    shrink(model, {"layers": [0, 2]})  # with them, half of all neurons have left
    report = prune(model, NeuronPruner(sparsity=0.5, score="l1"))
    assert {name: len(units) for name, units in report.kept.items() if name.endswith("neurons")} == {
        "layers.0.mlp.neurons": 24,
        "layers.2.mlp.neurons": 24,
    }
    report = prune(model, NeuronPruner(sparsity=0.75, score="l1"))
    assert sum(len(units) for name, units in report.kept.items() if name.endswith("neurons")) == 24


def test_the_dense_models_cost_is_found_where_no_note_says_it():
    model = build_llama(num_hidden_layers=4)
    macs = prunable_macs(model)
    shrink(model, {"layers": [0, 2, 3], "layers.0.mlp.neurons": range(5), "layers.2.attention.kv_groups": [1]})
    assert getattr(model.config, BLOCK)["dense"]["prunable_macs"] == macs
    del getattr(model.config, BLOCK)["dense"]  # as an older version has written it
    assert dense_macs(model, find_groups(model), read_record(model)) == macs


def test_heads_leave_where_there_is_one_kv_group():
    model = build_llama(num_key_value_heads=1)
    report = prune(model, HeadPruner(sparsity=0.5, score="l1"))
    heads = {group.name: group.units for group in find_groups(model, ["head"])}
    assert sum(heads.values()) == 4
    assert sum(len(units) for name, units in report.kept.items() if name.endswith("heads")) == 4
    assert report.settings["sparsity_head"] == 0.5
    assert model(**draw_batch(model)).logits.isfinite().all()


def test_each_attention_decides_whether_kv_groups_or_heads_are_removed():
    groups = [*find_groups(build_llama(num_key_value_heads=1)), *find_groups(build_llama(num_key_value_heads=2))]
    one = [group.kind for group in HeadPruner().choose(groups[: len(groups) // 2])]
    several = [group.kind for group in HeadPruner().choose(groups[len(groups) // 2 :])]
    assert (set(one), set(several)) == ({"head"}, {"kv_group"})
    assert {group.kind for group in HeadPruner(unit="kv_group").choose(groups)} == {"kv_group"}


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "pruner", "said"),
    [
        (
            build_llama,
            HeadPruner(sparsity=0.75, score="l1"),
            "HeadPruner was not reached, 2 of 4 units",
        ),
        (
            mixtral,
            ExpertPruner(sparsity=0.75, score="l1"),
            "ExpertPruner was not reached, 4 of 8 units",
        ),
        (
            build_bert,
            NeuronPruner(sparsity=0.9, score="l1", min_kept=20),
            "NeuronPruner was not reached, 8 of 48 units",
        ),
        (build_bert, HeadPruner(sparsity=0.5, score="l1"), ""),
        (build_llama, LayerPruner(sparsity=0.5, score="l1"), ""),
    ],
)
def test_a_sparsity_that_was_not_reached_is_said(build, pruner, said, caplog):
    with caplog.at_level(logging.WARNING, "hf_prune"):
        prune(build(), pruner)
    messages = [record.getMessage() for record in caplog.records]
    assert [said in one for one in messages] == ([True] if said else [])


def test_a_part_counts_from_its_own_dense_size(tmp_path):
    sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    dense = prunable_macs(transformers.T5EncoderModel(transformers.T5Config(**sizes)))
    whole = randomize(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    prune(whole, [HeadPruner(score="l1"), NeuronPruner(score="l1")], target=Target(macs=0.6))
    part = transformers.T5EncoderModel.from_pretrained(save_pruned(whole, tmp_path / "m"), dtype=torch.float32)
    report = prune(part, NeuronPruner(score="l1"), target=Target(macs=0.4))
    assert report.settings["macs_left"] == pytest.approx(prunable_macs(part) / dense, abs=1e-6)


@pytest.mark.parametrize(
    ("pruner", "target"), [(NeuronPruner(sparsity=0.5, score="l1"), None), (NeuronPruner(score="l1"), Target(macs=0.9))]
)
def test_a_request_that_was_met_before_is_said(pruner, target, caplog):
    model = build_bert()
    prune(model, NeuronPruner(sparsity=0.75, score="l1"))
    with caplog.at_level(logging.WARNING, "hf_prune"):
        prune(model, pruner, target=target)
    assert ["No unit was removed" in record.getMessage() for record in caplog.records] == [True]


NUMBERS = (float("inf"), float("nan"), 0, -5, 1e300)
NOTES = [{"parameters": 9, "prunable_macs": number, "size_mb": 1.0} for number in NUMBERS]


@pytest.mark.parametrize("note", [*NOTES, {"parameters": 9, "prunable_macs": 1, "size_mb": 1.0, "evil": 2}, {}])
def test_a_strangers_note_of_the_dense_model_breaks_nothing(note):
    model = build_bert()
    macs = prunable_macs(model)
    prune(model, NeuronPruner(sparsity=0.25, score="l1"))
    getattr(model.config, BLOCK)["dense"] = note
    report = prune(model, NeuronPruner(score="l1"), target=Target(macs=0.6))
    assert prunable_macs(model) <= (0.6 if not note.get("evil") else 1) * macs  # a note that can be one counts
    assert 0 < report.settings["macs_left"] <= 1
