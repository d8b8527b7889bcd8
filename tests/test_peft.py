"""Models with LoRA adapters: units leave weights and adapters alike, and merging keeps zeros."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BUILD,
    PLANS,
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    logits_of,
    randomize,
    training_arguments,
    units_of,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_prune import (
    HeadPruner,
    NeuronPruner,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    UnsupportedModelError,
    WeightPruner,
    find_groups,
    load_pruned,
    mask_units,
    merge_adapters,
    prune,
    save_pruned,
    shrink,
)
from hf_prune.architectures import prunable_macs

peft = pytest.importorskip("peft")
EARLY = Schedule("cubic", begin=1, end=7, frequency=2)
BOTH = [HeadPruner(), NeuronPruner()]
PLACES = {
    "bert": ["query", "value", "dense"],
    "vit": ["query", "value", "q_proj", "v_proj", "dense", "fc1", "fc2"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
}


def adapt(model: Any, places: list[str], **settings: Any) -> Any:
    """Put adapters around projections, every tensor of them at random."""
    task = {"modules_to_save": ["classifier"]} if hasattr(model, "classifier") else {}
    config = peft.LoraConfig(target_modules=places, r=2, lora_dropout=0.0, **{**task, **settings})
    return randomize(peft.get_peft_model(model, config), seed=3)


def make_trainer(folder: Path, callback: PruningCallback, model: Any, **changes: Any) -> Trainer:
    arguments = training_arguments(folder, **{"max_steps": 8, **changes})
    return callback.attach(Trainer(model, arguments, train_dataset=draw_rows(model, 24)))


@pytest.mark.parametrize("name", PLACES)
def test_masked_is_shrunk_is_merged_is_reloaded(name, tmp_path):
    model = adapt(BUILD[name](), PLACES[name])
    before = {group.name: group.units for group in find_groups(BUILD[name]()) if group.kind != "layer"}
    assert units_of(model, None) == before
    masked, small = mask_units(copy.deepcopy(model), PLANS[name]), shrink(copy.deepcopy(model), PLANS[name])
    assert not torch.allclose(logits_of(model, batch := draw_batch(model)), logits_of(masked, batch), atol=1e-3)
    assert_same_outputs(masked, small)
    assert units_of(shrink(copy.deepcopy(masked)), None) == units_of(small, None)
    merged = merge_adapters(small)
    assert_same_outputs(masked, merged, atol=1e-4)
    assert not any("lora" in key for key in merged.state_dict())
    save_pruned(merged, tmp_path)
    assert_same_outputs(merged, load_pruned(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("plan", [{"attention.branch": []}, {"mlp.branch": []}, {"mlp.neurons": []}, "heads"])
def test_branches_leave_with_their_adapters(plan):
    kept = {f"layers.0.{key}": units for key, units in ({"attention.heads": []} if plan == "heads" else plan).items()}
    model = adapt(build_bert(), PLACES["bert"])
    masked, small = mask_units(copy.deepcopy(model), kept), shrink(copy.deepcopy(model), kept)
    assert_same_outputs(masked, small)
    assert_same_outputs(masked, merge_adapters(small), atol=1e-4)


def test_transposed_projections_and_numbers_of_the_adapters_layer():
    config = GPT2Config(vocab_size=60, n_positions=40, n_embd=16, n_layer=1, n_head=4, n_inner=24, pad_token_id=0)
    model = adapt(GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    kept = {"layers.0.attention.heads": [1, 2], "layers.0.mlp.neurons": [0, 5, 7]}
    masked, small = mask_units(copy.deepcopy(model), kept), shrink(model, kept)
    assert_same_outputs(masked, small)
    layer = small.base_model.model.transformer.h[0].mlp.c_proj
    assert (layer.in_features, layer.out_features) == (3, 16)
    assert layer.lora_A["default"].in_features == 3


def test_costs_leave_adapters_out():
    assert prunable_macs(adapt(build_bert(), PLACES["bert"])) == prunable_macs(build_bert())


@pytest.mark.parametrize("places", [["query", "value"], ["layer.1.output.dense"]])
def test_a_target_is_reached_although_no_weight_has_a_gradient(places, tmp_path):
    """Adapters behind a place give it no gradient of its own: its units still get scores."""
    model = adapt(build_bert(), places)
    base = {name: one.clone() for name, one in model.named_parameters() if ".key." in name}
    trainer = make_trainer(tmp_path, callback := PruningCallback(BOTH, EARLY, target=Target(macs=0.5)), model)
    trainer.train()
    assert 0.4 < prunable_macs(model) / prunable_macs(build_bert()) <= 0.5
    assert all((scores > 0).all() for scores in callback.pruning.evidence["gate"].means["gate_square"].values())
    assert any(one.shape != base[name].shape for name, one in model.named_parameters() if name in base)
    merged = merge_adapters(copy.deepcopy(model))
    assert_same_outputs(model, merged, atol=1e-4)
    save_pruned(merged, tmp_path / "final")
    assert_same_outputs(merged, load_pruned(tmp_path / "final", dtype=torch.float32))


@pytest.mark.parametrize("live", [False, True])
def test_resume_with_adapters_changes_no_bit(live, tmp_path):
    """A checkpoint holds adapters alone: what is masked of the base is masked again."""

    def run(**given: Any) -> tuple[Any, PruningCallback]:
        callback = PruningCallback(BOTH, EARLY, target=Target(macs=0.5), shrink_during_training=live)
        trainer = make_trainer(
            tmp_path, callback, adapt(build_bert(), ["query", "value"]), save_strategy="steps", save_steps=4
        )
        trainer.train(**given)
        return trainer.model, callback

    whole, first = run()
    resumed, second = run(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert first.report.kept == second.report.kept
    assert_same_weights(whole, resumed)


def test_merging_keeps_zeros_of_single_weights(tmp_path):
    model = adapt(build_bert(), PLACES["bert"])
    trainer = make_trainer(tmp_path, callback := PruningCallback(WeightPruner(sparsity=0.5, score="l1"), EARLY), model)
    trainer.train()
    assert not any("lora" in name for name in callback.pruning.masks)
    dense = copy.deepcopy(model).merge_and_unload()
    merged = merge_adapters(model)
    total = zeros = filled = 0
    for name, mask in callback.pruning.masks.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        weight = merged.get_parameter(plain)
        assert not weight[~mask].any()
        torch.testing.assert_close(weight[mask], dense.get_parameter(plain)[mask])
        total, zeros = total + mask.numel(), zeros + int((weight == 0).sum())
        filled += int(dense.get_parameter(plain)[~mask].count_nonzero())
    assert zeros == total // 2
    assert filled > 0  # PEFT's own merging would have filled them


def test_a_pruned_model_learns_with_adapters_and_comes_back_whole(tmp_path):
    model = build_bert()
    prune(model, [HeadPruner(score="l1"), NeuronPruner(score="l1")], target=Target(macs=0.5))
    save_pruned(model, tmp_path / "base")
    config = peft.LoraConfig(target_modules=PLACES["bert"], r=2, modules_to_save=["classifier"])
    tuned = peft.get_peft_model(load_pruned(tmp_path / "base", dtype=torch.float32), config)
    arguments = training_arguments(tmp_path / "run", max_steps=3)
    Trainer(tuned, arguments, train_dataset=draw_rows(tuned, 12)).train()
    tuned.save_pretrained(tmp_path / "adapter")
    base = load_pruned(tmp_path / "base", dtype=torch.float32)
    assert_same_outputs(tuned, peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merged = merge_adapters(tuned)
    assert units_of(merged) == units_of(model)
    save_pruned(merged, tmp_path / "merged")
    assert_same_outputs(merged, load_pruned(tmp_path / "merged", dtype=torch.float32))


def test_pruned_adapters_and_their_base_are_saved_in_two_parts(tmp_path):
    model = shrink(adapt(build_bert(), PLACES["bert"]), PLANS["bert"])
    model.save_pretrained(tmp_path / "adapter")
    save_pruned(copy.deepcopy(model).unload(), tmp_path / "base")
    base = load_pruned(tmp_path / "base", dtype=torch.float32)
    assert_same_outputs(model, peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    with pytest.raises(PruningError, match="pruned base beside them"):  # the dense base is not theirs
        peft.PeftModel.from_pretrained(build_bert(), tmp_path / "adapter")


def test_a_whole_model_is_not_saved_under_adapters(tmp_path):
    """Transformers puts the adapters of a folder on top of its model: what was merged would be so twice."""
    model = adapt(build_llama(), PLACES["llama"])
    model.save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PruningError, match=r"path must not hold adapters.* Take another folder. Received"):
        save_pruned(merge_adapters(model), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_is_refused(tmp_path):
    model = adapt(build_bert(), ["query"])
    with pytest.raises(PruningError, match=r"merge_adapters\(model\).*Received: PeftModel"):
        save_pruned(model, tmp_path)
    with pytest.raises(PruningError, match="needs a PeftModel.*Received: BertForSequenceClassification"):
        merge_adapters(build_bert())
    with pytest.raises(UnsupportedModelError, match="lora_magnitude_vector"):
        find_groups(adapt(build_bert(), ["query"], use_dora=True))
    with pytest.raises(UnsupportedModelError, match="layers has none, because adapters lie inside"):
        find_groups(model, kinds=["layer"])
    other = peft.get_peft_model(build_bert(), peft.IA3Config(target_modules=["key"], feedforward_modules=[]))
    with pytest.raises(UnsupportedModelError, match="ia3"):
        find_groups(other)


def test_adapters_inside_a_transformers_model():
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=PLACES["bert"], r=2), build_bert())
    randomize(model, seed=3)
    assert units_of(model) == units_of(build_bert())
    masked, small = mask_units(copy.deepcopy(model), PLANS["bert"]), shrink(model, PLANS["bert"])
    assert_same_outputs(masked, small)


def train_llama(folder: Path, wrap: Any, pruners: Any = BOTH, **given: Any) -> tuple[Any, Any]:
    """Fine-tune a dense base with adapters while it is pruned; return the Trainer and the base's folder."""
    BUILD["llama"]().save_pretrained(folder / "dense")
    model = wrap(AutoModelForCausalLM.from_pretrained(folder / "dense"))
    trainer = make_trainer(folder / "out", callback := PruningCallback(pruners, EARLY, **given), model, max_steps=8)
    trainer.train()
    return trainer, callback


def with_lora(model: Any) -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])  # PEFT's own for Llama
    return randomize_adapters(peft.get_peft_model(model, config))


def with_native_lora(model: Any) -> Any:
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    except ValueError as error:  # transformers 5 asks for a newer PEFT than the one that runs on Python 3.9 too
        pytest.skip(str(error))
    return randomize_adapters(model)


def randomize_adapters(model: Any) -> Any:
    for name, one in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(one, std=0.3)
    return model


LOAD_ANEW = """
import sys, torch, hf_prune
from {module} import {loader}
model = {loader}.from_pretrained(sys.argv[1]).eval()
batch = torch.load(sys.argv[2])
torch.save(model(**batch).logits.detach(), sys.argv[3])
"""


def logits_in_a_new_process(folder: Path, batch: Any, work: Path, module: str, loader: str) -> torch.Tensor:
    torch.save(batch, work / "batch.pt")
    code = LOAD_ANEW.format(module=module, loader=loader)
    told = [str(folder), str(work / "batch.pt"), str(work / "logits.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *told], check=True, cwd=work)
    return torch.load(work / "logits.pt")


@pytest.mark.parametrize(
    ("wrap", "module", "loader"),
    [
        (with_lora, "peft", "AutoPeftModelForCausalLM"),
        (with_native_lora, "transformers", "AutoModelForCausalLM"),
    ],
)
def test_what_a_trainer_saves_loads_in_a_new_process_to_what_was_trained(wrap, module, loader, tmp_path):
    trainer, _ = train_llama(tmp_path, wrap, target=Target(macs=0.5))
    trainer.save_model(tmp_path / "final")
    batch = {key: value for key, value in draw_batch(build_llama()).items() if key != "labels"}
    expected = logits_of(trainer.model, batch)
    if module == "peft":  # moved; transformers' own loading of adapters reads the path that was saved
        (tmp_path / "final").rename(tmp_path / "moved")
    folder = tmp_path / ("moved" if module == "peft" else "final")
    found = logits_in_a_new_process(folder, batch, tmp_path, module, loader)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert (logits_of(dense, batch) - expected).abs().max() > 0.1
    assert sum(one.numel() for one in load_pruned(folder / "pruned_base").parameters()) < dense.num_parameters()


def test_the_live_model_is_untouched_by_saving_its_base(tmp_path):
    trainer, _ = train_llama(tmp_path, with_lora, target=Target(macs=0.5))
    before = {name: id(module) for name, module in trainer.model.named_modules()}
    expected = logits_of(trainer.model, draw_batch(build_llama()))
    trainer.save_model(tmp_path / "final")
    assert {name: id(module) for name, module in trainer.model.named_modules()} == before
    torch.testing.assert_close(logits_of(trainer.model, draw_batch(build_llama())), expected)


def test_single_weights_too_and_a_base_by_hand_must_be_the_pruned_one(tmp_path):
    trainer, callback = train_llama(tmp_path, with_lora, WeightPruner(sparsity=0.5, score="l1"))
    trainer.save_model(tmp_path / "final")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final")
    assert_same_outputs(trainer.model, again)
    zeros = sum(int((again.get_parameter(name) == 0).sum()) for name in callback.pruning.masks)
    assert zeros * 2 == sum(mask.numel() for mask in callback.pruning.masks.values())
    with pytest.raises(PruningError, match=r"load_pruned\('.*pruned_base'\).*Received: LlamaForCausalLM of another"):
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path / "final")
    base = load_pruned(tmp_path / "final" / "pruned_base", dtype=torch.float32)
    assert_same_outputs(trainer.model, peft.PeftModel.from_pretrained(base, tmp_path / "final"))


def test_a_checkpoint_of_masks_loads_to_what_it_was(tmp_path):
    """Between two changes the base is dense in shape and zero in part."""
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(logits_of(kwargs["model"], draw_batch(build_llama())))

    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path / "out", PruningCallback(BOTH, EARLY, target=Target(macs=0.5)), model, **arguments)
    trainer.add_callback(Look())
    trainer.train()
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    torch.testing.assert_close(logits_of(again, draw_batch(build_llama())), seen[0], atol=1e-5, rtol=0)


def test_adapters_of_a_base_that_nobody_pruned_are_saved_as_ever(tmp_path):
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    model.save_pretrained(tmp_path / "final")
    assert not (tmp_path / "final" / "pruned_base").exists()
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "dense")


def test_what_was_pruned_before_it_got_adapters_is_saved_with_them(tmp_path):
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    prune(base, [HeadPruner(score="l1"), NeuronPruner(score="l1")], target=Target(macs=0.5))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]))
    model = randomize_adapters(model)
    model.save_pretrained(tmp_path / "final")
    assert_same_outputs(model, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final"))


def test_adapters_that_began_as_a_part_of_the_base_are_loaded_as_they_were_trained(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_pruned(shrink(build_llama(), PLANS["llama"]), tmp_path / "small"))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="pissa"))
    prune(base, NeuronPruner(sparsity=0.7, score="l1"))
    randomize_adapters(model).save_pretrained(tmp_path / "final")
    assert_same_outputs(model, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final"))
