"""`Pruning` in a loop of one's own, and `prune` at once."""

from __future__ import annotations

import copy
import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import (
    BUILD,
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    build_llama,
    build_vit,
    draw_batch,
    take_step,
    units_of,
)

from hf_prune import (
    HeadPruner,
    NeuronPruner,
    Pruner,
    Pruning,
    PruningError,
    PruningSettings,
    Regularisation,
    Schedule,
    Target,
    UnsupportedModelError,
    WeightPruner,
    find_groups,
    load_pruned,
    prune,
    register_pattern,
    register_schedule,
    save_pruned,
    shrink,
)
from hf_prune.architectures import prunable_macs
from hf_prune.evidence import EVIDENCE
from hf_prune.patterns import PATTERNS
from hf_prune.schedules import SCHEDULES

BOTH = [HeadPruner(), NeuronPruner()]
EARLY = Schedule("cubic", begin=1, end=7, frequency=2)


def run_loop(
    model: Any,
    pruners: Any,
    schedule: Schedule | None = EARLY,
    steps: int = 10,
    clip: float | None = 0.05,
    double: bool = False,
    learning_rate: float = 1e-3,
    **settings: Any,
) -> tuple[Pruning, list[dict[str, float]]]:
    """Train with pruning; return the session and what it would log after each step."""
    model = model.double() if double else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    pruning = Pruning(model, pruners, schedule, total_steps=steps, optimizer=optimizer, **settings)
    logs = []
    for step in range(steps):
        batch = draw_batch(model, seed=step)
        batch = {key: value.double() if double and value.is_floating_point() else value for key, value in batch.items()}
        take_step(model(**batch).loss, optimizer, pruning, clip)
        logs.append(pruning.logs())
    return pruning, logs


@pytest.mark.parametrize("name", BUILD)
def test_target_is_reached_by_less_than_one_neuron(name):
    model = BUILD[name]()
    dense, kind = prunable_macs(model), "kv_group" if name == "llama" else "head"
    pruning, logs = run_loop(model, BOTH, target=Target(macs=0.7))
    report = pruning.finish()
    neuron = 3 * 16 if "llama" in name else 2 * 16
    assert 0.7 - neuron / dense < prunable_macs(model) / dense <= 0.7
    assert logs[-1]["macs_left"] == pytest.approx(prunable_macs(model) / dense, abs=1e-6)
    assert set(logs[-1]) == {"sparsity", f"sparsity_{kind}", "sparsity_neuron", "macs_left"}
    assert {name: len(units) for name, units in report.kept.items()} == units_of(model)


def test_sparsity_follows_the_schedule_by_hand():
    """8 heads, half of them to go, linearly in changes at steps 2, 4, 6: 0, 2, 4 heads."""
    schedule = Schedule("linear", begin=2, end=6, frequency=2)
    _, logs = run_loop(build_bert(), HeadPruner(sparsity=0.5), schedule, steps=7)
    assert [entry["sparsity_head"] for entry in logs] == [0, 0, 0, 0.25, 0.25, 0.5, 0.5]


def test_each_pruner_may_have_its_own_schedule():
    own = Schedule("oneshot", begin=2, end=2)
    pruners = [HeadPruner(sparsity=0.5, schedule=own), NeuronPruner(sparsity=0.25)]
    _, logs = run_loop(build_bert(), pruners, Schedule("oneshot", begin=4, end=4), steps=5)
    assert [entry["sparsity_head"] for entry in logs] == [0, 0.5, 0.5, 0.5, 0.5]
    assert [entry["sparsity_neuron"] for entry in logs] == [0, 0, 0, 0.25, 0.25]


def test_what_is_pruned_stays_pruned_and_zero():
    model, alive = build_bert(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = Pruning(model, BOTH, EARLY, target=Target(macs=0.4), total_steps=10, optimizer=optimizer)
    for step in range(10):
        take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)
        alive.append({name: mask.clone() for name, mask in pruning.alive.items()})
        assert pruning.macs_left() == pytest.approx(prunable_macs(shrink(copy.deepcopy(model))) / prunable_macs(model))
    for earlier, later in pairwise(alive):
        assert all((later[name] <= earlier[name]).all() for name in later)
    assert any((alive[-1][name] != alive[0][name]).any() for name in alive[0])


def test_finish_without_shrinking_leaves_zeros():
    model, twin = build_bert(), build_bert()
    report = run_loop(model, BOTH, target=Target(macs=0.5))[0].finish(shrink=False)
    small = run_loop(twin, BOTH, target=Target(macs=0.5))[0].finish()
    assert report.kept == small.kept
    assert not hasattr(model.config, "pruning_config")
    assert units_of(model, None) == units_of(build_bert(), None)
    assert_same_outputs(model, twin)
    assert_same_weights(twin, shrink(model))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_shrinking_live_is_the_masked_run(name, clip):
    """Gelu and silu are 0 at 0, so that clipped gradients are the same too."""
    kept, models = [], []
    for live in (False, True):
        model = BUILD[name]()
        pruning, _ = run_loop(model, BOTH, target=Target(macs=0.5), shrink_during_training=live, clip=clip, double=True)
        assert not pruning.masking.leaking
        kept.append(pruning.finish().kept)
        models.append(model)
    assert kept[0] == kept[1]
    assert_same_weights(models[0], models[1], atol=1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_twenty_steps_after_the_cut_a_masked_run_is_the_shrunk_one(name):
    """AdamW with weight decay, clipped gradients, no dropout: zeros and their moments stay zeros.

    In double precision: the gradient of a key's bias is 0, of which Adam makes steps as long as any by rounding.
    """
    kept, models, schedule = [], [], Schedule("oneshot", begin=2, end=2)
    for live in (False, True):
        model = BUILD[name]()
        settings = {"shrink_during_training": live, "clip": 0.05, "double": True}
        pruning, logs = run_loop(model, BOTH, schedule, steps=22, target=Target(macs=0.5), **settings)
        assert [entry["macs_left"] <= 0.5 for entry in logs] == [False] + [True] * 21
        kept.append(pruning.finish().kept)
        models.append(model)
    assert kept[0] == kept[1]
    assert_same_weights(models[0], models[1], atol=1e-5)


@pytest.mark.parametrize(
    ("build", "pruners"),
    [
        (lambda: build_bert(hidden_act="sigmoid"), NeuronPruner(sparsity=0.5)),
        (build_llama, HeadPruner(sparsity=0.5, unit="head")),
    ],
    ids=["act(0) = 1/2", "query heads whose KV group stays"],
)
def test_masks_are_held_where_masked_units_get_gradients(build, pruners):
    kept, models = [], []
    for live in (False, True):
        model = build()
        pruning, _ = run_loop(model, pruners, shrink_during_training=live, clip=None, double=True)
        assert bool(pruning.masking.leaking) != live, "held while masked, and not once nothing is masked"
        if not live:
            assert_same_outputs(model, shrink(copy.deepcopy(model)))
            assert min(len(units) for units in kept_units(shrink(copy.deepcopy(model)))) < 24
        kept.append(pruning.finish().kept)
        models.append(model)
    assert kept[0] == kept[1]
    assert_same_weights(models[0], models[1], atol=1e-5)


def kept_units(model: Any) -> list[range]:
    return [range(group.units) for group in find_groups(model)]


def test_weight_sparsity_is_exact_after_each_step():
    model = build_bert()
    pruner = WeightPruner(sparsity=0.6, score="l1")
    pruning, logs = run_loop(model, pruner, Schedule("linear", begin=1, end=5, frequency=2), steps=8, learning_rate=0.1)
    weights = [parameter for name, parameter in model.named_parameters() if name in pruning.masks]
    total = sum(weight.numel() for weight in weights)
    assert len(weights) == 12
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.6 * total)
    assert [entry["sparsity_weight"] for entry in logs] == pytest.approx([0, 0, 0.3, 0.3, 0.6, 0.6, 0.6, 0.6], abs=1e-3)
    assert pruning.finish().settings["sparsity_weight"] == pytest.approx(0.6, abs=1e-3)
    assert model.config.pruning_config["weights"] == {"sparsity": pytest.approx(0.6, abs=1e-3), "parameters": 12}


def test_uniform_weights_give_every_matrix_the_same_share():
    model = build_bert()
    pruning, _ = run_loop(model, WeightPruner(sparsity=0.5, score="l1", allocation="uniform"))
    assert {round(float(mask.float().mean()), 2) for mask in pruning.masks.values()} == {0.5}


def test_masked_weights_stay_masked_even_when_a_schedule_turns_back():
    @register_schedule("there_and_back")
    def there_and_back(progress: float) -> float:
        return 1 - progress

    try:
        schedule = Schedule("there_and_back", begin=1, end=5, frequency=2)
        _, logs = run_loop(build_bert(), [WeightPruner(sparsity=0.5, score="l1"), HeadPruner(sparsity=0.5)], schedule)
    finally:
        del SCHEDULES._entries["there_and_back"]
    assert {round(entry["sparsity_weight"], 3) for entry in logs} == {0.5}
    assert {entry["sparsity_head"] for entry in logs} == {0.5}


def test_two_weight_pruners_on_calibration_data():
    """Each takes its own share; together they see one calibration."""
    model, alone = build_bert(), build_bert()
    data = [draw_batch(model, seed=seed) for seed in range(2)]
    pruners = [WeightPruner(sparsity=sparsity, include=[f"*layer.{i}.*"]) for i, sparsity in enumerate((0.25, 0.75))]
    prune(model, pruners, data=data)
    prune(alone, pruners[1], data=data)
    for i, name in enumerate(("first", "second")):
        weight = model.bert.encoder.layer[i].output.dense.weight
        assert 0 < float((weight == 0).float().mean()) < 1, name
    assert torch.equal(weight, alone.bert.encoder.layer[1].output.dense.weight)


def test_units_and_weights_together():
    model = build_bert()
    pruners = [NeuronPruner(sparsity=0.5), WeightPruner(sparsity=0.5)]
    pruning, _ = run_loop(model, pruners)
    pruning.finish()
    assert sum(group.units for group in find_groups(model, kinds=["neuron"])) == 24
    for name, mask in pruning.masks.items():
        weight = dict(model.named_parameters())[name]
        assert weight.shape == mask.shape
        assert not weight[~mask].any()


def test_query_heads_leave_evenly_from_kv_groups():
    model = build_llama()
    report = run_loop(model, HeadPruner(sparsity=0.5, unit="head"))[0].finish()
    for i in range(2):
        assert [unit // 2 for unit in report.kept[f"layers.{i}.attention.heads"]] == [0, 1]
        assert len(report.kept[f"layers.{i}.attention.kv_groups"]) == 2


def test_kv_groups_and_query_heads_by_two_pruners():
    model = build_llama()
    pruners = [HeadPruner(sparsity=0.25, unit="kv_group"), HeadPruner(sparsity=0.5, unit="head")]
    report = run_loop(model, pruners)[0].finish()
    assert sorted(len(units) for name, units in report.kept.items() if name.endswith("kv_groups")) == [1, 2]
    assert sum(len(units) for name, units in report.kept.items() if name.endswith("heads")) <= 4
    assert_same_outputs(model, copy.deepcopy(model))


def test_multiple_of_and_min_kept():
    model = build_bert()
    pruners = [NeuronPruner(multiple_of=8), HeadPruner(min_kept=3)]
    run_loop(model, pruners, target=Target(macs=0.6))[0].finish()
    assert all(group.units % 8 == 0 for group in find_groups(model, kinds=["neuron"]))
    assert all(group.units >= 3 for group in find_groups(model, kinds=["head"]))


def test_include_and_exclude():
    report = run_loop(build_bert(), NeuronPruner(sparsity=0.5, include=["layers.1.*"]))[0].finish()
    assert [len(report.kept[f"layers.{i}.mlp.neurons"]) for i in range(2)] == [24, 12]
    report = run_loop(build_bert(), NeuronPruner(sparsity=0.5, exclude=["layers.1.*"]))[0].finish()
    assert [len(report.kept[f"layers.{i}.mlp.neurons"]) for i in range(2)] == [12, 24]


def test_a_shrunk_model_goes_on_in_dense_numbering():
    model = build_bert()
    first = run_loop(model, NeuronPruner(sparsity=0.5))[0].finish()
    again = run_loop(model, NeuronPruner(sparsity=0.5))[0].finish()
    assert again.kept == first.kept  # half of the dense model's are gone already
    second = run_loop(model, NeuronPruner(sparsity=0.75))[0].finish()
    for name, units in second.kept.items():
        assert set(units) <= set(first.kept[name])
    assert sum(len(second.kept[f"layers.{i}.mlp.neurons"]) for i in range(2)) == 12
    assert second.units == first.units == units_of(build_bert())


@pytest.mark.parametrize("live", [False, True])
def test_a_restored_session_goes_on_bitwise(live):
    def build(seed: int = 0) -> tuple[Any, Any, Pruning]:
        model = build_bert(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        pruners = [*BOTH, WeightPruner(sparsity=0.5)]
        settings = {
            "target": Target(macs=0.4),
            "total_steps": 8,
            "optimizer": optimizer,
            "shrink_during_training": live,
        }
        return model, optimizer, Pruning(model, pruners, EARLY, **settings)

    def advance(model: Any, optimizer: Any, pruning: Pruning, steps: range) -> None:
        for step in steps:
            take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)

    model, optimizer, pruning = build()
    advance(model, optimizer, pruning, range(4))
    weights, moments, state = (copy.deepcopy(one.state_dict()) for one in (model, optimizer, pruning))
    small = copy.deepcopy(model.config)
    advance(model, optimizer, pruning, range(4, 8))

    resumed, optimizer, session = build(seed=1)
    if live:
        from hf_prune.plan import read_record

        shrink(resumed, {name: kept for name, (kept, _) in read_record(type(model)(small)).items()})
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    session.load_state_dict(state)
    advance(resumed, optimizer, session, range(4, 8))
    assert pruning.finish().kept == session.finish().kept
    assert_same_weights(model, resumed)
    assert pruning.numbers.dense == session.numbers.dense


def test_state_of_another_model_is_refused():
    state = run_loop(build_bert(), NeuronPruner(sparsity=0.5))[0].state_dict()
    other = Pruning(build_llama(), NeuronPruner(sparsity=0.5), total_steps=10)
    with pytest.raises(PruningError, match="must be of this model and these pruners"):
        other.load_state_dict(state)
    of_magnitudes = Pruning(build_bert(), NeuronPruner(sparsity=0.5, score="l1"), total_steps=10).state_dict()
    with pytest.raises(PruningError, match="must be of this model and these pruners"):
        Pruning(build_bert(), NeuronPruner(sparsity=0.5), total_steps=10).load_state_dict(of_magnitudes)
    small = shrink(build_bert(), {"layers.0.mlp.neurons": range(8)})
    with pytest.raises(PruningError, match="'layers.0.mlp.neurons' must have the model's 8 units. Received: 24"):
        Pruning(small, NeuronPruner(sparsity=0.5), total_steps=10).load_state_dict(state)


def test_calibration_data_decide_instead_of_training_batches():
    data = [draw_batch(build_vit(), seed=seed) for seed in (100, 101)]
    pruner, schedule = NeuronPruner(sparsity=0.5), Schedule("oneshot", begin=1, end=1)
    model = build_vit()
    report = run_loop(model, pruner, schedule, steps=1, learning_rate=0.0, data=data)[0].finish()
    assert report.kept == prune(build_vit(), pruner, data=data).kept
    assert report.kept != run_loop(build_vit(), pruner, schedule, steps=1, learning_rate=0.0)[0].finish().kept


def test_taylor_of_weights_without_gradients_says_what_to_call():
    pruning = Pruning(build_bert(), WeightPruner(sparsity=0.5), Schedule(begin=1, end=1), total_steps=1)
    with pytest.raises(PruningError, match="which is None: call after_backward.. between backward"):
        pruning.step()


def test_ending_early_is_remarked(caplog):
    pruning = Pruning(build_bert(), NeuronPruner(sparsity=0.5, score="l1"), Schedule(begin=1, end=9), total_steps=9)
    pruning.step()
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        pruning.finish()
    assert "ended at step 1, before the schedule did at 9" in caplog.text


def test_a_target_out_of_reach_is_remarked(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        prune(build_bert(), NeuronPruner(score="l1", min_kept=20), target=Target(macs=0.5))
    assert "target.macs=0.5 was not reached, 0.929 is left: min_kept" in caplog.text


def test_what_was_missed_stands_in_the_report():
    missed = prune(build_bert(), NeuronPruner(sparsity=0.9, score="l1", min_kept=20))
    assert ["sparsity=0.9 of NeuronPruner was not reached" in one for one in missed.settings["warnings"]] == [True]
    assert "warnings" not in prune(build_bert(), NeuronPruner(sparsity=0.5, score="l1")).settings


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (PruningSettings(NeuronPruner(sparsity=0.5, score="l0"), Schedule(begin=0)), "later than the first.*at step 1"),
        (
            PruningSettings(WeightPruner(sparsity=0.5, score="movement_adam"), Schedule(begin=2), data=[]),
            r"without data=.*Received: data=",
        ),
        (  # what is refused last
            PruningSettings(
                [NeuronPruner(sparsity=0.5, score="taylor", reversible=True)],
                regularisation=Regularisation("group_lasso"),
            ),
            "optimizer=. Received: none",
        ),
    ],
)
def test_what_is_refused_in_setup_leaves_nothing_behind(told, message):
    model = build_bert()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    optimizer = None if told.regularisation else torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PruningError, match=message):
        Pruning(model, told, total_steps=8, optimizer=optimizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not model._state_dict_pre_hooks
    assert optimizer is None or not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_hooks_go_where_evidence_cannot_begin(monkeypatch):
    model = build_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(EVIDENCE["gate"], "prepare", lambda *told: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Pruning(model, NeuronPruner(sparsity=0.5), total_steps=8, optimizer=optimizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_report_counts_the_models_themselves():
    model = build_bert()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = prune(model, NeuronPruner(sparsity=0.5, score="l1"))
    assert report.dense.parameters == parameters
    assert report.pruned.parameters == parameters - 24 * (16 + 1 + 16) == sum(p.numel() for p in model.parameters())


def test_prune_at_once():
    model, masked = build_bert(), build_bert()
    data = [draw_batch(model)]
    report = prune(model, BOTH, target=Target(macs=0.5), data=data)
    assert prune(masked, BOTH, target=Target(macs=0.5), data=data, shrink=False).kept == report.kept
    assert_same_outputs(masked, model)
    assert prunable_macs(model) <= prunable_macs(masked) / 2


def test_nothing_to_do_changes_nothing():
    model = build_bert()
    prune(model, [HeadPruner(sparsity=0.0, score="l1"), WeightPruner(sparsity=0.0, score="l1")])
    assert_same_weights(build_bert(), model)


@pytest.mark.parametrize(
    ("pruners", "target", "message"),
    [
        ([], None, "pruners must name at least one. Received: none"),
        ([HeadPruner()], None, r"needs a sparsity in \[0, 1\) or a threshold, or a target. Received: None"),
        ([WeightPruner()], None, r"WeightPruner needs a sparsity in \[0, 1\) or a threshold. Received: None"),
        ([HeadPruner(sparsity=0.5)], Target(macs=0.5), "leaves sparsity and schedule to it. Received: sparsity=0.5"),
        ([WeightPruner(sparsity=0.5)], Target(macs=0.5), "target is for structured pruners"),
        (
            [HeadPruner(sparsity=0.1), HeadPruner(sparsity=0.2)],
            None,
            "Received: two of 'layers.0.attention.heads'",
        ),
        (
            [HeadPruner(sparsity=0.1, include=["blocks.*"])],
            None,
            "HeadPruner finds no groups of kind head or kv_group under include",
        ),
        ([HeadPruner(sparsity=0.1, unit="kv_group")], None, "finds no groups of kind kv_group"),
        ([WeightPruner(sparsity=0.1, include=["nothing"])], None, "WeightPruner finds no weights under include"),
    ],
)
def test_settings_that_contradict_each_other(pruners, target, message):
    model = build_bert()
    with pytest.raises(PruningError, match=message):
        prune(model, pruners, target=target, data=[draw_batch(model)])
    assert_same_weights(build_bert(), model)


def test_a_target_takes_kv_groups_or_heads():
    pruners = [HeadPruner(unit="kv_group"), HeadPruner(unit="head")]
    with pytest.raises(PruningError, match="takes KV groups or the heads inside them, not both"):
        Pruning(build_llama(), pruners, target=Target(macs=0.5), total_steps=10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadPruner(sparsity=50), r"sparsity must be in \[0, 1\). Received: 50. Did you mean 0.5\?"),
        (lambda: HeadPruner(sparsity=-0.1), "Received: -0.1"),
        (lambda: HeadPruner(sparsity=1.0), "Received: 1"),
        (lambda: HeadPruner(sparsty=0.5), "unknown key 'sparsty'. Did you mean 'sparsity'"),
        (lambda: HeadPruner(unit="group"), "HeadPruner: unit: .*Received: 'group'"),
        (lambda: NeuronPruner(multiple_of=0), "NeuronPruner: multiple_of: .*Received: 0"),
        (lambda: NeuronPruner(min_kept=-1), "NeuronPruner: min_kept: .*Received: -1"),
        (lambda: WeightPruner(pattern="3:4"), "No pattern is named '3:4'. .*Known: .*unstructured. Received: '3:4'"),
        (lambda: Target(macs=50), r"macs must be in \(0, 1\]: the share that remains. Received: 50. Did you mean 0.5"),
        (lambda: Target(macs=0), "Received: 0"),
    ],
)
def test_settings_check_themselves(make, message):
    with pytest.raises(PruningError, match=message):
        make()


def test_settings_are_plain_and_reusable():
    pruner = NeuronPruner(sparsity=0.5, score="l1")
    assert pruner == NeuronPruner(sparsity=0.5, score="l1")
    before = repr(pruner)
    assert prune(build_bert(), pruner).kept == prune(build_bert(), pruner).kept
    assert repr(pruner) == before
    assert isinstance(pruner, Pruner)


def test_a_model_without_groups_is_refused_before_anything():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        Pruning(torch.nn.Linear(3, 3), NeuronPruner(sparsity=0.5), total_steps=1)


def test_scores_are_read_from_one_step_in_four_and_right_before_a_change():
    model = build_bert()
    pruning = Pruning(model, BOTH, Schedule(begin=22, end=41, frequency=10), target=Target(macs=0.5), total_steps=60)
    read = []
    for step in range(1, 61):
        before = [mean.clone() for mean in pruning.evidence["gate"].means["gate_square"].values()]
        model(**draw_batch(model, seed=step)).loss.backward()
        pruning.evidence["gate"].commit()
        after = pruning.evidence["gate"].means["gate_square"].values()
        if not all(torch.equal(mine, theirs) for mine, theirs in zip(before, after, strict=True)):
            read.append(step)
        pruning.step()
    assert read == [*range(1, 17), 18, 22, 24, 28, 32, 33, 37, 41]  # changes after 22, 32 and 41


def test_a_model_that_another_session_has_cut_is_not_cut_again(tmp_path):
    model = build_bert()
    sessions = [
        Pruning(model, one(sparsity=0.5, score="l1"), Schedule("oneshot", begin=1, end=1), total_steps=2)
        for one in (HeadPruner, NeuronPruner)
    ]
    for pruning in sessions:
        pruning.step()
    sessions[0].finish()
    with pytest.raises(PruningError, match=r"Only one session may cut.*another size of 'layers.0.attention.heads'"):
        sessions[1].finish()
    assert_same_outputs(model, load_pruned(save_pruned(shrink(model), tmp_path), dtype=torch.float32))


def test_who_calls_may_have_switched_gradients_off(tmp_path):
    kept = []
    for gradients in (torch.enable_grad(), torch.no_grad()):
        model = build_bert()
        with gradients:
            report = prune(model, BOTH, target=Target(macs=0.5), data=[draw_batch(model)])
        kept.append(report.kept)
    assert kept[0] == kept[1]
    with torch.inference_mode(), pytest.raises(PruningError, match=r"inference_mode forbids.*a call inside of it"):
        prune(model, BOTH, target=Target(macs=0.4), data=[draw_batch(model)])
    with torch.inference_mode():
        made_inside = build_bert()
    with pytest.raises(PruningError, match=r"inference_mode forbids.*a model that was made inside of it"):
        prune(made_inside, HeadPruner(sparsity=0.5, score="l1"))


def _share_of_zeros(model, names) -> tuple[int, int]:
    tensors = [model.get_parameter(name) for name in names]
    return sum(int((one == 0).sum()) for one in tensors), sum(one.numel() for one in tensors)


def _halves_of_rows(values: dict[str, torch.Tensor], keep: int) -> dict[str, torch.Tensor]:
    """Of each row the better half stays: what removed columns hold must not decide."""
    return {name: value > value.median(1, keepdim=True).values for name, value in values.items()}


@pytest.mark.parametrize(
    "how",
    [
        {"score": "l1"},
        {"score": "taylor"},
        {"score": "l1", "allocation": "uniform"},
        {"score": "l1", "pattern": "halves_of_rows"},
    ],
    ids=lambda how: " ".join(how.values()),
)
def test_a_sparsity_of_weights_is_of_the_units_that_are_left(how, monkeypatch):
    """Masked or removed at once, units take their weights out of the reckoning: both ways end with the same model."""
    monkeypatch.setattr(PATTERNS, "_entries", {**PATTERNS._entries})
    register_pattern("halves_of_rows")(_halves_of_rows)
    ended, units = [], [HeadPruner(sparsity=0.5), NeuronPruner(sparsity=0.5)]
    for shrinks in (False, True):
        model = build_bert()
        weights = WeightPruner(sparsity=0.5, **how)
        pruning, logs = run_loop(model, [*units, weights], clip=None, double=True, shrink_during_training=shrinks)
        report = pruning.finish()
        zeros, entries = _share_of_zeros(model, weights.choose_weights(model))
        assert zeros == pytest.approx(0.5 * entries, rel=0.05 if "pattern" in how else 1e-9)
        assert logs[-1]["sparsity_weight"] == pytest.approx(zeros / entries, abs=1e-6)
        ended.append((model, report.kept, report.masked))
    (masked, *told), (shrunk, *told_too) = ended
    assert told == told_too
    for name, tensor in masked.named_parameters():
        assert torch.allclose(tensor, shrunk.get_parameter(name), atol=1e-9), name


@pytest.mark.parametrize(("rule", "of_units"), [("rigl", "final"), ("anew", "anew")])
def test_weights_that_come_back_are_of_the_units_that_are_left(rule, of_units):
    model, weights = build_bert(), WeightPruner(sparsity=0.5, score="l1", rule=rule, allocation="uniform")
    pruning, logs = run_loop(model, [NeuronPruner(sparsity=0.5, rule=of_units), weights])
    assert logs[-1]["sparsity_weight"] == pytest.approx(0.5, abs=1e-3)
    pruning.finish()
    zeros, entries = _share_of_zeros(model, weights.choose_weights(model))
    assert zeros == pytest.approx(0.5 * entries, abs=len(pruning.masks))  # each matrix rounds
