"""Whole branches, and branches whose heads or neurons run out: masked = shrunk = reloaded, in text generation too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from models import (
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    training_arguments,
    units_of,
)
from test_checkpoint import F32, run_python
from test_depth import MODELS, assert_same, build
from torch import nn

from hf_prune import (
    Group,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Slice,
    Target,
    find_groups,
    load_pruned,
    mask_units,
    prune,
    register_architecture,
    save_pruned,
    shrink,
    verify,
)
from hf_prune.architectures import ARCHITECTURES, prunable_macs
from hf_prune.exporting.preparing import private_copy
from hf_prune.skipping import is_skipped


def gone(model: Any, kind: str, *words: str) -> dict[str, list[int]]:
    """Return a plan that keeps nothing of those groups of a kind that can do without, where a word is in the name."""
    groups = [group for group in find_groups(model, kinds=[kind]) if group.least == 0]
    return {group.name: [] for group in groups if not words or any(word in group.name for word in words)}


def plans(model: Any) -> dict[str, dict[str, list[int]]]:
    """Return what to try on a model of three layers: every sort of branch, in the first and in the last layer."""
    kinds = {group.kind for group in find_groups(model)}
    heads = "kv_group" if "kv_group" in kinds else "head"
    return {
        "attention": gone(model, "branch", "layers.0.attention", "layers.2.attention"),
        "feed-forward": gone(model, "branch", "layers.1.mlp", "layers.2.mlp"),
        "cross-attention": gone(model, "branch", "layers.1.cross_attention"),
        "all": gone(model, "branch", "attention", "mlp"),
        "heads run out": gone(model, heads, "layers.0.", "layers.2."),
        "neurons run out": gone(model, "neuron", "layers.0.", "layers.2."),
    }


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_shrunk_is_reloaded(name, tmp_path):
    dense = build(name)
    expected = zoo.outputs(dense, zoo.inputs(dense))
    for what, plan in plans(dense).items():
        if not plan:
            assert what in ("cross-attention", "neurons run out", "feed-forward"), what
            continue
        masked, shrunk = mask_units(copy.deepcopy(dense), plan), shrink(copy.deepcopy(dense), plan)
        changed = zoo.outputs(masked, zoo.inputs(dense)) - expected
        assert changed.abs().max() > 1e-3, what
        assert_same(masked, shrunk)
        reloaded = load_pruned(save_pruned(shrunk, tmp_path / what), **F32)
        assert_same_weights(shrunk, reloaded)
        assert_same(masked, reloaded)
        assert units_of(reloaded, None) == units_of(shrunk, None)
        assert_same_weights(shrunk, shrink(masked, plan))


def test_what_stays_of_a_branch_that_ran_out_is_its_constant():
    """The projection's bias comes out for every token; a removed branch gives nothing."""
    model = shrink(build_bert(), {"layers.0.attention.heads": [], "layers.1.mlp.neurons": []})
    attention, feed_forward = model.bert.encoder.layer[0].attention, model.bert.encoder.layer[1].output
    assert is_skipped(attention.self)
    assert tuple(attention.output.dense.weight.shape) == (16, 0)
    bias = attention.output.dense.bias
    assert torch.equal(attention.output.dense(torch.zeros(2, 3, 0)), bias.expand(2, 3, 16))
    assert tuple(feed_forward.dense.weight.shape) == (16, 0)
    model = shrink(model, {"layers.0.attention.branch": []})
    assert not model.bert.encoder.layer[0].attention.output.dense(torch.zeros(2, 3, 0)).any()
    assert model.config.pruning_config["kept"] == {
        "layers.0.attention.branch": " of 1",
        "layers.0.attention.heads": " of 4",
        "layers.1.mlp.neurons": " of 24",
    }


def test_a_removed_branch_owns_no_number():
    """An attention of 4 x (16 x 16 + 16) numbers and a feed-forward block of 2 x 16 x 24 + 24 + 16 leave."""
    model, dense = build_bert(), build_bert()
    shrink(model, {"layers.0.attention.branch": [], "layers.1.mlp.branch": []})
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (dense, model)]
    assert counts[0] - counts[1] == 4 * (16 * 16 + 16) + 2 * 16 * 24 + 24 + 16
    assert prunable_macs(dense) - prunable_macs(model) == 4 * 16 * 16 + 2 * 16 * 24
    assert dict(model.named_parameters()).keys() == dict(dense.named_parameters()).keys()


def test_a_branch_takes_its_units_along():
    model = shrink(build_llama(), {"layers.0.attention.branch": []})
    units = units_of(model, None)
    assert [units[f"layers.0.attention.{what}"] for what in ("branch", "kv_groups", "heads")] == [0, 0, 0]
    assert units["layers.1.attention.heads"] == 4


def test_two_cuts_compose(tmp_path):
    first, second = {"layers.0.mlp.neurons": [3, 5]}, {"layers.0.mlp.neurons": [], "layers.1.attention.branch": []}
    twice, once = shrink(shrink(build_bert(), first), second), shrink(build_bert(), second)
    assert_same_weights(once, twice)
    assert once.config.pruning_config == twice.config.pruning_config
    further = {"layers.0.attention.heads": [1], "layers": [0]}
    again = shrink(load_pruned(save_pruned(twice, tmp_path), **F32), further)
    assert_same_weights(shrink(build_bert(), {**second, **further}), again)
    assert again.config.pruning_config["kept"] == {
        "layers": "0 of 2",
        "layers.0.attention.heads": "1 of 4",
        "layers.0.mlp.neurons": " of 24",
    }


REFUSED = """
import transformers
for name in ("branch", "heads", "neurons"):
    try:
        transformers.AutoModelForSequenceClassification.from_pretrained(name)
    except Exception as error:
        print(name, "refused")
"""


def test_stock_transformers_refuses_what_it_cannot_say(tmp_path):
    branch, heads, neurons = "layers.0.attention.branch", "layers.1.attention.heads", "layers.0.mlp.neurons"
    for name, group in (("branch", branch), ("heads", heads), ("neurons", neurons)):
        save_pruned(shrink(build_bert(), {group: []}), tmp_path / name)
    assert run_python(REFUSED, tmp_path).splitlines() == ["branch refused", "heads refused", "neurons refused"]


GENERATING = {  # type -> (task, plans)
    "llama": "causal_lm",
    "gpt2": "causal_lm",
    "mistral": "causal_lm",
    "gemma2": "causal_lm",
    "bart": "seq2seq_lm",
}


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in GENERATING for kind in ("eager", "sdpa") if (name, kind) != ("gemma2", "sdpa")],
)
def test_generation_with_cache_is_the_same_token_for_token(name, attention, tmp_path):
    """Caches stay in step although the layer that tells their length runs no attention; more tokens than a window."""
    dense = zoo.build(name, GENERATING[name], layers=3, attn_implementation=attention)
    decoder = "decoder." if name == "bart" else ""
    cases = {
        "first attention": {f"{decoder}layers.0.attention.branch": []},
        "every attention": gone(dense, "branch", f"{decoder}layers.", "attention"),
        "first layer": {f"{decoder}layers": [1, 2]},
        "last layer and a feed-forward": {f"{decoder}layers": [0, 1], f"{decoder}layers.0.mlp.branch": []},
    }
    if name == "gemma2":  # a local and a global layer stay
        cases["first layer"] = {"layers": [1, 2]}
    ids = torch.randint(50, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    for what, plan in cases.items():
        masked, shrunk = mask_units(copy.deepcopy(dense), plan), shrink(copy.deepcopy(dense), plan)
        models = [
            masked,
            shrunk,
            load_pruned(save_pruned(shrunk, tmp_path / what), attn_implementation=attention, **F32),
        ]
        for beams in (1, 2):
            asked = {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": beams, "do_sample": False}
            texts = [one.generate(ids, attention_mask=torch.ones_like(ids), **asked).tolist() for one in models]
            assert texts[0] == texts[1] == texts[2], (what, beams)
            slow = shrunk.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **asked).tolist()
            assert texts[1] == slow, (what, beams, "the cache changes the text")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_a_cache_tells_its_length_although_no_attention_runs(name):
    model = zoo.build(name, GENERATING[name], layers=3)
    batch = zoo.inputs(model)
    length = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
    model = shrink(model, gone(model, "branch", "attention"))
    with torch.no_grad():
        assert model(**batch, use_cache=True).past_key_values.get_seq_length() == length


def test_every_branch_is_verified():
    model = build_bert()
    report = verify(model, {key: value for key, value in draw_batch(model).items() if key != "labels"})
    assert report.passed
    assert set(report.differences) == {"layer", "branch", "head", "neuron", "all"}
    assert_same_weights(build_bert(), model)


class Odd(nn.Module):
    """Two matrices; the function below forgets the bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(inputs).exp())


def test_a_wrong_architecture_does_not_pass():
    @register_architecture("Odd")
    def groups_of_odd(model: Any) -> list[Group]:
        return [Group("units", "neuron", len(model.up.bias), (Slice("up.weight", 0, 1), Slice("down.weight", 1, 1)))]

    try:
        report = verify(Odd(), {"inputs": torch.randn(5, 4)})
    finally:
        del ARCHITECTURES._entries["Odd"]
    assert not report.passed
    assert report.failures.keys() == {"neuron", "all"}


def test_a_skipped_forward_survives_the_copy_that_is_exported():
    model = shrink(build_bert(), {"layers.0.attention.branch": [], "layers.1.mlp.neurons": []})
    model.forward = model.forward  # what mixed precision leaves behind
    copied = private_copy(model)
    assert "forward" not in vars(copied)
    assert [is_skipped(module) for module in copied.modules()] == [is_skipped(module) for module in model.modules()]
    assert_same_outputs(model, copied)
    copied.bert.encoder.layer[1].output.dense.bias.data.zero_()
    assert not torch.equal(copied(**draw_batch(model)).logits, model(**draw_batch(model)).logits)


def train(model: Any, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(**draw_batch(model, seed=step)).loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "plan",
    [{"layers.0.attention.heads": [], "layers.1.mlp.neurons": []}, {"layers.1.attention.branch": []}],
    ids=["run out", "branch"],
)
def test_training_masked_is_training_shrunk(plan):
    masked, shrunk = (verb(build_bert(), plan).double() for verb in (mask_units, shrink))
    train(masked)
    train(shrunk)
    assert_same_weights(shrunk, shrink(masked, plan), atol=1e-5)


def test_a_model_without_branches_trains_in_a_trainer_and_saves(tmp_path):
    from models import draw_rows
    from transformers import Trainer

    model = shrink(build_bert(), {"layers.0.attention.branch": [], "layers.1.mlp.neurons": []})
    before = copy.deepcopy(model)
    arguments = training_arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    Trainer(model, arguments, train_dataset=draw_rows(model, 12)).train()
    assert not torch.equal(before.classifier.weight, model.classifier.weight)
    assert_same_weights(model, load_pruned(tmp_path / "checkpoint-3", **F32))


def test_heads_and_neurons_may_run_out():
    """A tenth of the MACs: with `min_kept=0` whole branches run out of units; by default one stays in each."""
    data = [draw_batch(build_bert())]
    for least in (0, 1):
        model = build_bert(num_hidden_layers=4)
        prune(model, [HeadPruner(min_kept=least), NeuronPruner(min_kept=least)], target=Target(macs=0.1), data=data)
        assert prunable_macs(model) / prunable_macs(build_bert(num_hidden_layers=4)) <= 0.1 + 0.15 * least
        assert min(units_of(model).values()) == least


def test_branch_pruner_removes_the_share_it_is_told():
    model = build_bert()
    report = prune(model, LayerPruner(sparsity=0.5, unit="branch"), data=[draw_batch(model)])
    assert sum(units_of(model, ["branch"]).values()) == 2
    assert sum(len(units) for name, units in report.kept.items() if name.endswith("branch")) == 2


def test_branches_by_pattern():
    model = build_bert()
    prune(model, LayerPruner(sparsity=0.5, unit="branch", include=["*.attention.branch"], score="l1"))
    units = units_of(model, ["branch"])
    assert [units[f"layers.{i}.mlp.branch"] for i in range(2)] == [1, 1]
    assert sorted(units[f"layers.{i}.attention.branch"] for i in range(2)) == [0, 1]
