"""Whole layers: masked = shrunk = reloaded, dense numbers in names, what the config says, and who loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from models import (
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    take_step,
    training_arguments,
    units_of,
)
from test_checkpoint import F32, run_python
from transformers import Trainer, TrainerCallback

from hf_prune import (
    CheckpointError,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    WeightPruner,
    find_groups,
    load_pruned,
    mask_units,
    prune,
    save_pruned,
    shrink,
)
from hf_prune.architectures import prunable_macs
from hf_prune.skipping import is_skipped

MODELS = {  # type -> task, and what stays of three layers each
    "bert": ("sequence_classification", {"layers": [0, 2]}),
    "gpt2": ("causal_lm", {"layers": [1]}),
    "llama": ("causal_lm", {"layers": [0, 2]}),
    "bart": ("seq2seq_lm", {"encoder.layers": [2], "decoder.layers": [0, 2]}),
    "whisper": ("speech_seq2seq", {"encoder.layers": [0, 1], "decoder.layers": [2]}),
    "vit": ("image_classification", {"layers": [1, 2]}),
    "mixtral": ("causal_lm", {"layers": [0, 2]}),
}


def build(name: str) -> Any:
    return zoo.build(name, MODELS[name][0], layers=3)


def assert_same(first: Any, second: Any, atol: float = 1e-5) -> None:
    """Check that two models give the same outputs."""
    batch = zoo.inputs(first)
    torch.testing.assert_close(zoo.outputs(second.eval(), batch), zoo.outputs(first.eval(), batch), atol=atol, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_shrunk_is_reloaded(name, tmp_path):
    plan = MODELS[name][1]
    masked, shrunk = mask_units(build(name), plan), shrink(build(name), plan)
    difference = (zoo.outputs(build(name), zoo.inputs(masked)) - zoo.outputs(masked, zoo.inputs(masked))).abs().max()
    assert difference > 1e-3, "the layers that left did nothing"
    assert_same(masked, shrunk)
    reloaded = load_pruned(save_pruned(shrunk, tmp_path, stock="require"), **F32)
    assert_same_weights(shrunk, reloaded)
    assert_same(masked, reloaded)
    assert units_of(reloaded, None) == units_of(shrunk, None)
    assert_same_weights(shrunk, shrink(masked))


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_all_that_a_config_says_of_the_encoders_depth_is_true(name):
    """Transformers 4 has a second number for it, which transformers 5 takes for the first."""
    config = shrink(build(name), {"encoder.layers": [2]}).config
    assert (config.encoder_layers, config.num_hidden_layers, config.decoder_layers) == (1, 1, 3)
    assert config.to_dict().get("num_hidden_layers", 1) == 1


def test_a_masked_layer_is_zero_everywhere_and_hands_its_input_on():
    model = mask_units(build_llama(), {"layers": [1]})
    first, second = model.model.layers
    assert is_skipped(first)
    assert not is_skipped(second)
    assert not any(parameter.any() for parameter in first.parameters())
    assert units_of(model, None) == units_of(build_llama(), None), "masking removes nothing"


def test_names_keep_dense_numbers():
    model = shrink(build_bert(num_hidden_layers=4), {"layers": [1, 3], "layers.3.mlp.neurons": [5, 7]})
    assert units_of(model) == {
        "layers.1.attention.heads": 4,
        "layers.1.mlp.neurons": 24,
        "layers.3.attention.heads": 4,
        "layers.3.mlp.neurons": 2,
    }
    assert model.config.pruning_config["kept"] == {"layers": "1,3 of 4", "layers.3.mlp.neurons": "5,7 of 24"}
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2


def test_what_was_cut_inside_a_layer_leaves_the_record_with_it():
    model = shrink(build_bert(num_hidden_layers=3), {"layers.1.mlp.neurons": [0], "layers.2.mlp.neurons": [3]})
    shrink(model, {"layers": [0, 2]})
    assert model.config.pruning_config["kept"] == {"layers": "0,2 of 3", "layers.2.mlp.neurons": "3 of 24"}


def test_two_cuts_compose_in_dense_numbering(tmp_path):
    first, second = {"layers": [0, 2, 4], "layers.2.attention.heads": [1, 3]}, {"layers": [2, 4]}
    inside = {"layers.4.mlp.neurons": range(8)}
    twice = shrink(shrink(build_bert(num_hidden_layers=5), first), {**second, **inside})
    once = shrink(build_bert(num_hidden_layers=5), {**first, **second, **inside})
    assert_same_weights(once, twice)
    assert once.config.pruning_config == twice.config.pruning_config
    again = shrink(load_pruned(save_pruned(twice, tmp_path), **F32), {"layers": [4]})
    assert_same_weights(shrink(build_bert(num_hidden_layers=5), {"layers": [4], **inside}), again)


def test_a_removed_layer_cannot_be_kept():
    model = shrink(build_bert(num_hidden_layers=3), {"layers": [0, 2]})
    with pytest.raises(PruningError, match=r"\(2 of 3 are\)\. Received: \[1\]"):
        shrink(model, {"layers": [0, 1]})
    with pytest.raises(PruningError, match="does not have. Received: 'layers.1.mlp.neurons'"):
        shrink(model, {"layers.1.mlp.neurons": [0]})


def test_lists_of_the_config_and_layer_numbers_follow():
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = zoo.build("gemma2", "causal_lm", layers=4, layer_types=types)
    shrink(model, {"layers": [0, 2, 3]})
    assert model.config.layer_types == [types[0], types[2], types[3]]
    assert model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_towers_are_counted_apart():
    model = shrink(zoo.build("bart", "seq2seq_lm", layers=3), {"decoder.layers": [2]})
    config = model.config
    assert (config.encoder_layers, config.decoder_layers, config.num_hidden_layers) == (3, 1, 3)


STOCK = """
import sys, torch, transformers
for name, head in (("bert", "SequenceClassification"), ("llama", "CausalLM"), ("bart", "Seq2SeqLM")):
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**torch.load(f"{name}.batch")).logits
    torch.testing.assert_close(logits, torch.load(f"{name}.logits"), atol=1e-5, rtol=0)
    print(name)
assert "hf_prune" not in sys.modules
"""


def test_stock_transformers_loads_a_model_that_lost_layers(tmp_path):
    names = ["bert", "llama", "bart"]
    for name in names:
        model = shrink(build(name), MODELS[name][1])
        save_pruned(model, tmp_path / name, stock="require")
        torch.save(zoo.inputs(model), tmp_path / f"{name}.batch")
        torch.save(zoo.outputs(model, zoo.inputs(model)), tmp_path / f"{name}.logits")
    assert run_python(STOCK, tmp_path).split() == names


def test_depth_and_uneven_widths_together(tmp_path):
    plan = {"layers": [0, 2], "layers.0.mlp.neurons": range(5), "layers.2.attention.heads": [3]}
    model = shrink(build_bert(num_hidden_layers=3), plan)
    reloaded = load_pruned(save_pruned(model, tmp_path), **F32)
    assert (reloaded.config.num_hidden_layers, reloaded.config.pruning_config["stock"]) == (2, False)
    assert_same_weights(model, reloaded)
    assert units_of(reloaded, None) == units_of(model, None)


@pytest.mark.parametrize(
    ("name", "task", "kept"),
    [("modernbert", "masked_lm", {"layers": [1, 2, 3]}), ("t5", "seq2seq_lm", {"encoder.layers": [1, 2]})],
)
def test_layers_that_depend_on_their_number_are_refused_and_nothing_changes(name, task, kept):
    """ModernBERT's layer 0 has no norm before its attention, T5's holds the position bias of all layers."""
    model, twin = (zoo.build(name, task, layers=4) for _ in range(2))
    config = copy.deepcopy(model.config.to_dict())
    with pytest.raises(PruningError, match=f"A config of {type(model).__name__} cannot say that only these of '"):
        shrink(model, kept)
    assert_same_weights(twin, model)
    assert model.config.to_dict() == config
    assert units_of(model, None) == units_of(twin, None)


def test_gpt2_that_scales_by_layer_number_keeps_its_numbers():
    model = zoo.build("gpt2", "causal_lm", layers=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PruningError, match="layer 2 would become another one at place 1"):
        shrink(copy.deepcopy(model), {"layers": [0, 2]})
    plan = {"layers": [0, 1]}
    assert_same(mask_units(copy.deepcopy(model), plan), shrink(model, plan))


def test_gradient_checkpointing_is_no_property_of_a_layer():
    model = build_bert(num_hidden_layers=3)
    model.gradient_checkpointing_enable()
    assert len(shrink(model, {"layers": [0, 2]}).bert.encoder.layer) == 2


def train(model: Any, steps: int = 20) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(**draw_batch(model, seed=step)).loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("build_one", [build_bert, build_llama])
def test_a_masked_layers_training_is_the_shrunk_models(build_one):
    plan = {"layers": [0, 2]}
    masked, shrunk = (verb(build_one(num_hidden_layers=3), plan).double() for verb in (mask_units, shrink))
    train(masked)
    train(shrunk)
    assert_same_weights(shrunk, shrink(masked, plan), atol=1e-5)


def test_a_removed_layer_leaves_the_optimizer():
    model = build_bert(num_hidden_layers=3)
    optimizer = train(model, 2)
    shrink(model, {"layers": [0, 2]}, optimizer=optimizer)
    fresh = torch.optim.AdamW(model.parameters())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in fresh.param_groups[0]["params"]]
    assert set(optimizer.state) <= set(model.parameters())
    fresh.load_state_dict(optimizer.state_dict())


EARLY = Schedule("cubic", begin=1, end=7, frequency=2)


@pytest.mark.parametrize("score", ["taylor", "l1", "random"])
def test_prune_at_once(score):
    """Three of four layers stay; masked and shrunk agree on which."""
    models = [build_bert(num_hidden_layers=4) for _ in range(2)]
    pruner, data = LayerPruner(sparsity=0.25, score=score), [draw_batch(models[0])]
    reports = [prune(model, pruner, data=data, shrink=cut) for model, cut in zip(models, (True, False))]
    assert len(models[0].bert.encoder.layer) == len(reports[0].kept["layers"]) == 3
    assert reports[0].kept["layers"] == reports[1].kept["layers"]
    assert_same(models[1], models[0])


def test_l1_of_a_layer_sums_all_that_is_in_it():
    model = build_bert(num_hidden_layers=3)
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.data.mul_(0.5)
    assert prune(model, LayerPruner(sparsity=0.34, score="l1")).kept["layers"] == [0, 2]


def run_session(model: Any, pruners: Any, **settings: Any) -> tuple[Pruning, list[dict[str, float]]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruning = Pruning(model, pruners, EARLY, total_steps=8, optimizer=optimizer, **settings)
    logs = []
    for step in range(8):
        take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)
        logs.append(pruning.logs())
    return pruning, logs


@pytest.mark.parametrize("unit", ["layer", "branch", "any"])
def test_target_over_layers_heads_and_neurons(unit):
    model = build_llama(num_hidden_layers=4)
    dense = prunable_macs(model)
    pruning, logs = run_session(
        model, [LayerPruner(unit=unit), HeadPruner(), NeuronPruner(min_kept=0)], target=Target(macs=0.4)
    )
    report = pruning.finish()
    assert prunable_macs(model) / dense <= 0.4
    assert logs[-1]["macs_left"] == pytest.approx(prunable_macs(model) / dense, abs=1e-6)
    assert {name: len(units) for name, units in report.kept.items()} == {
        name: units for name, units in units_of(model, None).items() if name in report.kept
    }


@pytest.mark.parametrize("unit", ["layer", "any"])
def test_shrinking_live_is_the_masked_run(unit):
    models, kept, logs = [], [], []
    for live in (False, True):
        model = build_llama(num_hidden_layers=4).double()
        pruners = [LayerPruner(unit=unit, include=["layers", "*.branch"]), NeuronPruner()]
        pruning, log = run_session(model, pruners, target=Target(macs=0.4), shrink_during_training=live)
        kept.append({name: units for name, units in pruning.finish().kept.items() if units})
        models.append(model)
        logs.append(log)
    assert kept[0] == kept[1]
    assert logs[0] == logs[1]
    assert_same_weights(*models, atol=1e-5)


@pytest.mark.parametrize("live", [False, True])
def test_layers_and_weights_together(live):
    """Masks follow parameters whose names have changed."""
    model = build_bert(num_hidden_layers=3)
    pruning, log = run_session(
        model, [LayerPruner(sparsity=0.34), WeightPruner(sparsity=0.5)], shrink_during_training=live
    )
    assert log[-1]["sparsity"] > 0.5
    pruning.finish()
    assert len(model.bert.encoder.layer) == 2
    assert pruning.masks
    for name, mask in pruning.masks.items():
        assert not model.get_parameter(name)[~mask].any()


def make_trainer(folder: Path, callback: PruningCallback, model: Any, **changes: Any) -> Trainer:
    trainer = Trainer(
        model, training_arguments(folder, **changes), train_dataset=draw_rows(model, 24), callbacks=[callback]
    )
    return callback.attach(trainer)


RESUMES = {
    "layers masked": ([LayerPruner(sparsity=0.5)], None, False),
    "layers live": ([LayerPruner(sparsity=0.5)], None, True),
    "all masked": ([LayerPruner(unit="any"), HeadPruner(), NeuronPruner(min_kept=0)], Target(macs=0.3), False),
    "all live": ([LayerPruner(unit="any"), HeadPruner(), NeuronPruner(min_kept=0)], Target(macs=0.3), True),
}


@pytest.mark.parametrize("case", RESUMES)
def test_resume_in_mid_schedule_changes_no_bit(case, tmp_path):
    pruners, target, live = RESUMES[case]
    saving = {"save_strategy": "steps", "save_steps": 6}
    callbacks = [
        PruningCallback(pruners, Schedule("cubic", begin=1, end=9, frequency=2), target=target,
                        shrink_during_training=live)
        for _ in range(2)
    ]  # fmt: skip
    whole = make_trainer(tmp_path, callbacks[0], build_bert(num_hidden_layers=4), **saving)
    whole.train()
    resumed = make_trainer(tmp_path, callbacks[1], build_bert(seed=1, num_hidden_layers=4), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    places = ["layer", "branch"]
    assert units_of(whole.model, places) != units_of(build_bert(num_hidden_layers=4), places)
    assert callbacks[1].report.to_dict() == callbacks[0].report.to_dict()
    assert_same_weights(whole.model, resumed.model)
    assert whole.model.config.to_dict() == resumed.model.config.to_dict()
    logged = [[e for e in one.state.log_history if "macs_left" in e and e["step"] > 6] for one in (whole, resumed)]
    assert logged[0] == logged[1]
    reloaded = load_pruned(save_pruned(resumed.model, tmp_path / "final"), **F32)
    assert_same_weights(whole.model, reloaded)


def test_layers_masked_at_a_checkpoint_are_skipped_after_a_resume(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append((state.global_step, sum(is_skipped(layer) for layer in model.bert.encoder.layer)))

    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    once = Schedule("oneshot", begin=2, end=2)
    make_trainer(tmp_path, PruningCallback(LayerPruner(sparsity=0.5), once), build_bert(), **saving).train()
    resumed = make_trainer(tmp_path, PruningCallback(LayerPruner(sparsity=0.5), once), build_bert(seed=1), **saving)
    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == [(4, 1), (5, 1)]


def test_a_strangers_depth_that_does_not_fit_is_refused(tmp_path):
    save_pruned(shrink(build_bert(num_hidden_layers=4), {"layers": [0, 3], "layers.3.mlp.neurons": [0]}), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"kept\['layers'\] is for 4 units, .* has 3"):
        load_pruned(tmp_path)


def test_kinds_choose_layers():
    assert [(group.name, group.units, group.least) for group in find_groups(build_bert(), kinds=["layer"])] == [
        ("layers", 2, 1)
    ]


T5_PLAN = {
    "decoder.attention.heads": [0, 2],
    "decoder.layers.1.cross_attention.heads": [1],
    "encoder.layers.2.mlp.neurons": [0, 3, 5],
    "decoder.layers.2.mlp.branch": [],
}


@pytest.mark.parametrize("beams", [1, 3])
def test_t5_generates_the_same_after_shrinking_and_reloading(beams, tmp_path):
    def generate(model: Any) -> list[list[int]]:
        ids = zoo.inputs(model)["input_ids"]
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=beams
        ).tolist()

    masked = mask_units(zoo.build("t5", "seq2seq_lm", layers=4), T5_PLAN)
    shrunk = shrink(zoo.build("t5", "seq2seq_lm", layers=4), T5_PLAN)
    texts = [generate(masked), generate(shrunk)]
    texts.append(generate(load_pruned(save_pruned(shrunk, tmp_path), dtype=torch.float32)))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("heads", [[1], [0, 2, 3], []])
def test_t5_with_fewer_heads_in_one_cross_attention_hands_its_bias_to_no_other(heads, tmp_path):
    model, plan = zoo.build("t5", "seq2seq_lm", layers=4), {"decoder.layers.1.cross_attention.heads": heads}
    batch = zoo.inputs(model)
    masked, shrunk = mask_units(copy.deepcopy(model), plan), shrink(copy.deepcopy(model), plan)
    torch.testing.assert_close(zoo.outputs(masked, batch), zoo.outputs(shrunk, batch), atol=1e-5, rtol=1e-5)
    again = load_pruned(save_pruned(shrunk, tmp_path), dtype=torch.float32)
    assert torch.equal(zoo.outputs(again, batch), zoo.outputs(shrunk, batch))


@pytest.mark.parametrize("kept", [{"decoder.layers": [0, 2, 3]}, {"encoder.layers": [0, 3]}])
def test_a_skipped_layer_of_t5_hands_on_the_position_bias(kept):
    model = zoo.build("t5", "seq2seq_lm", layers=4)
    batch = zoo.inputs(model)
    masked, shrunk = mask_units(copy.deepcopy(model), kept), shrink(copy.deepcopy(model), kept)
    torch.testing.assert_close(zoo.outputs(masked, batch), zoo.outputs(shrunk, batch), atol=1e-5, rtol=1e-5)
