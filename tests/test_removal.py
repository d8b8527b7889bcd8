"""The invariant: masked = shrunk = saved and reloaded, in outputs, in training and in generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    BUILD,
    PLANS,
    UNEVEN,
    UNEVEN_LLAMA,
    UNITS,
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    logits_of,
    randomize,
    units_of,
)

from hf_prune import PruningError, load_pruned, mask_units, save_pruned, shrink
from hf_prune.structure import named_tensors

# what trains masked exactly as shrunk: not query heads whose KV group stays (q = 0 still reads the mean of v; see
# test_session.py for how a session holds these)
SEALED = {**PLANS, "llama": {name: kept for name, kept in UNEVEN_LLAMA.items() if not name.endswith("heads")}}
BOUNDED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def subsets(units: int) -> Any:
    """Draw units that stay, at least one."""
    return st.sets(st.integers(0, units - 1), min_size=1).map(sorted)


@st.composite
def plans(draw: Any, name: str) -> dict[str, list[int]]:
    """Draw a plan for some groups of a model; KV groups keep equally many heads."""
    kept = {}
    for group, units in UNITS[name].items():
        if draw(st.booleans()):
            kept[group] = draw(subsets(units))
    if name == "llama":
        for i in range(2):
            heads = draw(st.sampled_from([[0, 2], [0, 3], [1, 2], [1, 3], None]))
            kept.pop(f"layers.{i}.attention.heads", None)
            kept.update({f"layers.{i}.attention.heads": heads} if heads else {})
    return kept


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_masked_is_shrunk_is_reloaded(name, tmp_path):
    @BOUNDED
    @given(kept=plans(name))
    def check(kept):
        masked, shrunk = mask_units(BUILD[name](), kept), shrink(BUILD[name](), kept)
        assert_same_outputs(masked, shrunk)
        reloaded = load_pruned(save_pruned(shrunk, tmp_path), dtype=torch.float32)
        assert_same_weights(shrunk, reloaded)
        assert_same_outputs(masked, reloaded)

    check()


@pytest.mark.parametrize("name", ["bert", "llama_mha"])
def test_two_shrinks_compose_in_dense_numbering(name):
    @BOUNDED
    @given(first=plans(name), second=plans(name))
    def check(first, second):
        second = {group: sorted({*units} & {*first.get(group, units)}) for group, units in second.items()}
        second = {group: units for group, units in second.items() if units}
        twice, once = shrink(shrink(BUILD[name](), first), second), shrink(BUILD[name](), {**first, **second})
        assert_same_weights(once, twice)
        assert getattr(once.config, "pruning_config", {}) == getattr(twice.config, "pruning_config", {})

    check()


def test_kv_groups_then_heads_compose_in_dense_numbering():
    kept = {"layers.0.attention.kv_groups": [1], "layers.0.attention.heads": [3]}
    twice = build_llama()
    for name, units in kept.items():
        shrink(twice, {name: units})
    assert_same_weights(shrink(build_llama(), kept), twice)
    assert twice.config.pruning_config["kept"]["layers.0.attention.heads"] == "3 of 4"


def test_plan_is_written_as_runs():
    assert shrink(build_bert(), UNEVEN).config.pruning_config["kept"] == {
        "layers.0.attention.heads": "0,2-3 of 4",
        "layers.0.mlp.neurons": "0,3,6,9,12,15,18,21 of 24",
        "layers.1.attention.heads": "1 of 4",
        "layers.1.mlp.neurons": "5-17 of 24",
    }


def test_shapes_after_a_cut_by_hand():
    layer = shrink(build_bert(), UNEVEN).bert.encoder.layer[0]
    assert tuple(layer.attention.self.query.weight.shape) == (12, 16)
    assert tuple(layer.attention.self.value.bias.shape) == (12,)
    assert tuple(layer.attention.output.dense.weight.shape) == (16, 12)
    assert tuple(layer.output.dense.weight.shape) == (16, 8)
    assert (layer.output.dense.in_features, layer.intermediate.dense.out_features) == (8, 8)


def test_masking_zeroes_every_entry_of_a_unit_and_nothing_else():
    dense, masked = build_bert(), mask_units(build_bert(), {"layers.0.mlp.neurons": range(1, 24)})
    layer = masked.bert.encoder.layer[0]
    for entries in (
        layer.intermediate.dense.weight[0],
        layer.intermediate.dense.bias[0],
        layer.output.dense.weight[:, 0],
    ):
        assert not entries.any()
        entries.data.fill_(1.0)
    same = dense.bert.encoder.layer[0]
    for entries in (same.intermediate.dense.weight[0], same.intermediate.dense.bias[0], same.output.dense.weight[:, 0]):
        entries.data.fill_(1.0)
    assert_same_weights(dense, masked)


def test_removing_a_unit_changes_the_outputs():
    dense = build_bert()
    for name, units in UNITS["bert"].items():
        changed = mask_units(build_bert(), {name: range(1, units)})
        assert (logits_of(dense, draw_batch(dense)) - logits_of(changed, draw_batch(dense))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.7.mlp.neurons": [0]}, r"does not have\. Received: 'layers\.7\.mlp\.neurons'"),
        ({"layers.0.attention.heads": [4]}, r"each once \(4 of 4 are\)\. Received: \[4\]"),
        ({"layers.0.attention.heads": [-1]}, r"Received: \[-1\]"),
        ({"layers.0.attention.heads": [1, 1]}, r"Received: \[1, 1\]"),
        ({"layers": []}, "At least one unit of 'layers' must stay"),
    ],
)
@pytest.mark.parametrize("verb", [mask_units, shrink])
def test_a_plan_that_does_not_fit_changes_nothing(verb, kept, message):
    model = build_bert()
    with pytest.raises(PruningError, match=message):
        verb(model, {"layers.1.attention.heads": [0], **kept})
    assert_same_weights(build_bert(), model)


def test_unequal_heads_per_kv_group_are_refused():
    with pytest.raises(
        PruningError, match=r"layers.0.attention.heads' must keep equally many heads. Received: \[1, 2\]"
    ):
        shrink(build_llama(), {"layers.0.attention.heads": [0, 1, 2]})
    with pytest.raises(PruningError, match="equally many"):
        mask_units(build_llama(), {"layers.0.attention.heads": [0, 1]})
    shrink(build_llama(), {"layers.0.attention.kv_groups": [0], "layers.0.attention.heads": [0, 1]})


def test_heads_of_removed_kv_groups_alone_are_refused():
    with pytest.raises(PruningError, match="must stay"):
        shrink(build_llama(), {"layers.0.attention.kv_groups": [0], "layers.0.attention.heads": [2]})


def test_what_was_removed_cannot_be_kept():
    model = shrink(build_bert(), {"layers.0.attention.heads": [0, 2]})
    with pytest.raises(PruningError, match=r"\(2 of 4 are\)\. Received: \[1\]"):
        shrink(model, {"layers.0.attention.heads": [0, 1]})


@pytest.mark.parametrize("name", PLANS)
def test_shrink_alone_removes_what_is_masked(name):
    model = shrink(mask_units(BUILD[name](), PLANS[name]))
    assert_same_weights(shrink(BUILD[name](), PLANS[name]), model)
    assert model.config.pruning_config == shrink(BUILD[name](), PLANS[name]).config.pruning_config


def test_shrink_alone_leaves_a_dense_model_alone():
    model = shrink(build_bert())
    assert_same_weights(build_bert(), model)
    assert not hasattr(model.config, "pruning_config")


def test_shrink_alone_removes_all_of_a_group_that_is_all_zero():
    model = build_bert()
    vectors = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense
    vectors[0].weight.data.zero_()
    vectors[0].bias.data.zero_()
    vectors[1].weight.data.zero_()
    expected = copy.deepcopy(model)
    assert units_of(shrink(model))["layers.0.mlp.neurons"] == 0
    assert model.bert.encoder.layer[0].output.dense.bias.any(), "the constant output bias stays"
    assert_same_outputs(expected, model)


def test_shrink_alone_keeps_as_many_units_as_must_stay():
    """Each KV group that stays has a query head, also where the scores of all of its queries are zero."""
    model = build_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data.zero_()
    attention.o_proj.weight.data.zero_()
    expected = copy.deepcopy(model)
    units = units_of(shrink(model))
    assert (units["layers.0.attention.kv_groups"], units["layers.0.attention.heads"]) == (2, 2)
    assert_same_outputs(expected, model)


def train(model: Any, steps: int, optimizer: Any = None, clip: float = 0.05) -> Any:
    """Train in double precision: AdamW blows noise in gradients that are zero by symmetry up to whole steps."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        batch = draw_batch(model, seed=step)
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        model(**batch).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert norm > clip, "nothing was clipped: the test would miss a wrong norm"
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", SEALED)
def test_gradients_of_masked_units_are_exactly_zero(name):
    model = mask_units(BUILD[name](), SEALED[name])
    model(**draw_batch(model)).loss.backward()
    gradients = BUILD[name]()
    for parameter, twin in zip(model.parameters(), gradients.parameters()):
        twin.data.copy_(torch.ones_like(twin) if parameter.grad is None else parameter.grad)
    expected = mask_units(copy.deepcopy(gradients), SEALED[name])
    assert_same_weights(expected, gradients)
    assert sum(parameter.grad.abs().sum() for parameter in model.parameters() if parameter.grad is not None) > 1


@pytest.mark.parametrize("name", SEALED)
def test_masked_run_is_the_shrunk_run(name):
    masked, shrunk = mask_units(BUILD[name](), SEALED[name]).double(), shrink(BUILD[name](), SEALED[name]).double()
    train(masked, 20)
    train(shrunk, 20)
    assert_same_weights(shrunk, shrink(masked, SEALED[name]), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_moments_are_cut_along(name):
    model = mask_units(BUILD[name](), SEALED[name]).double()
    optimizer, before = train(model, 3), dict(model.named_parameters())
    full = copy.deepcopy(optimizer.state_dict()["state"])
    shrink(model, SEALED[name], optimizer=optimizer)
    twin = randomize(BUILD[name]()).double()
    for i, parameter in enumerate(twin.parameters()):
        parameter.data.copy_(full[i]["exp_avg"] if i in full else parameter)
    shrink(twin, SEALED[name])
    for (key, parameter), moment in zip(model.named_parameters(), twin.parameters()):
        assert parameter is before[key], "an optimizer holds the old parameter"
        if parameter in optimizer.state:
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], moment.data)
            assert optimizer.state[parameter]["exp_avg_sq"].shape == parameter.shape
    train(model, 2, optimizer)


def test_a_run_that_shrinks_in_the_middle_is_the_masked_run():
    masked, shrunk = (mask_units(build_bert(), UNEVEN).double() for _ in range(2))
    optimizer = train(shrunk, 5)
    train(shrink(shrunk, optimizer=optimizer), 5, optimizer)
    optimizer = train(masked, 5)
    train(masked, 5, optimizer)
    assert_same_weights(shrunk, shrink(masked), atol=1e-5)


def test_gradients_are_cut_along():
    model = build_bert()
    model(**draw_batch(model)).loss.backward()
    expected = model.bert.encoder.layer[1].output.dense.weight.grad[:, 5:18].clone()
    shrink(model, UNEVEN)
    torch.testing.assert_close(model.bert.encoder.layer[1].output.dense.weight.grad, expected)


def test_tied_embeddings_stay_tied(tmp_path):
    model = shrink(build_llama(tie_word_embeddings=True), UNEVEN_LLAMA)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reloaded = load_pruned(save_pruned(model, tmp_path), dtype=torch.float32)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert_same_outputs(model, reloaded)


def test_tensors_that_two_layers_share_are_cut_once():
    def build() -> Any:
        model = build_bert()
        first, second = model.bert.encoder.layer
        second.intermediate.dense.weight = first.intermediate.dense.weight
        return model

    kept = {f"layers.{i}.mlp.neurons": [1, 2, 5] for i in range(2)}
    model = shrink(build(), kept)
    tensors = named_tensors(model)
    shared = [tensors[f"bert.encoder.layer.{i}.intermediate.dense.weight"] for i in range(2)]
    assert shared[0] is shared[1]
    assert tuple(shared[0].shape) == (3, 16)
    assert_same_outputs(mask_units(build(), kept), model)


@pytest.mark.parametrize("name", ["llama", "llama_mha"])
def test_generation_with_cache_is_the_same_token_for_token(name, tmp_path):
    def generate(model: Any) -> list[list[int]]:
        ids = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(0))
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False).tolist()

    shrunk = shrink(BUILD[name](), PLANS[name])
    texts = [generate(mask_units(BUILD[name](), PLANS[name])), generate(shrunk)]
    texts.append(generate(load_pruned(save_pruned(shrunk, tmp_path), dtype=torch.float32)))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != generate(BUILD[name]())
