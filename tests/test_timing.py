"""Targets of time, parameters and size: what is chosen, measured and said."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build_bert, build_llama, build_vit, draw_batch
from transformers import AlbertConfig, AlbertModel

from hf_prune import (
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningError,
    Schedule,
    Target,
    find_groups,
    prune,
)
from hf_prune.timing import LatencyTable, Option, choose_widths, stopwatch, table

BOTH = [HeadPruner(min_kept=0), NeuronPruner(min_kept=0)]
TORCH = {"runtime": "torch", "length": 16}


@pytest.fixture(autouse=True)
def _no_cache_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "CACHE", tmp_path)


@pytest.fixture
def by_width(monkeypatch):
    """Let a model's time be 1 ms and 1 more for each 1,000 entries of its matrices: machines are noisy."""

    def time(self, runs, seconds):
        return {name: 1 + entries / 1000 for name, entries in runs.items()}

    def prepare(self, model, dtype):
        return sum(one.numel() for one in model.parameters() if one.ndim > 1) * (0.6 if dtype == "int8" else 1)

    monkeypatch.setattr(stopwatch.Stopwatch, "_time", time)
    monkeypatch.setattr(stopwatch.Stopwatch, "_prepare", prepare)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 30),
)
def test_no_other_widths_lose_less_in_the_same_time(groups, time):
    offered = [[Option(loss, needed) for loss, needed in options] for options in groups]
    chosen = [options[i] for options, i in zip(offered, choose_widths(offered, time), strict=True)]
    every = [*itertools.product(*offered)]
    allowed = [sum(one.loss for one in some) for some in every if sum(one.time for one in some) <= time]
    if allowed:
        assert sum(one.time for one in chosen) <= time
        assert sum(one.loss for one in chosen) == min(allowed)
    else:
        assert sum(one.time for one in chosen) == min(sum(one.time for one in some) for some in every)


def test_a_table_reads_between_its_widths():
    times = LatencyTable({"a": "x", "b": "x"}, {"x": [0, 4, 8]}, {"x": [0.0, 0.1, 0.3]}, whole=1.0)
    assert times.of("a", 6) == pytest.approx(0.2)
    assert times.predict({"a": 8, "b": 8}) == 1
    assert times.predict({"a": 4}) == pytest.approx(1 - 0.2 - 0.3)
    assert LatencyTable({"a": "x"}, {"x": [0, 8]}, {"x": [0.0, 1.2]}, whole=1.0).predict({}) > 0


def test_times_have_a_step_and_a_line_whatever_the_clock_says():
    """A width that seems to be free would be taken in every layer."""
    widths, noise = [0, 48, 96, 192, 384, 768, 1536], [0.0, -3, 3, -2, 2, -1, 1]
    right = {width: 2 + width / 16 for width in widths if width} | {0: 0}
    exact = table._times(widths, [right[1536] - right[width] for width in widths[:-1]])
    assert exact == pytest.approx({**right, 1: 2 + 1 / 16})
    measured = table._times(widths, [right[1536] - right[width] - one for width, one in zip(widths[:-1], noise)])
    assert measured == pytest.approx(exact, abs=2)
    assert measured[96] - measured[48] == pytest.approx(3, abs=1)  # 9 by the clock
    launches = {0: 0, 8: 5, 16: 5, 32: 5, 64: 9}  # all that is small takes as long as what starts it
    assert table._times(list(launches), [9 - launches[one] for one in (0, 8, 16, 32)]) == pytest.approx(
        {**launches, 1: 5}
    )


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2])
def test_what_was_asked_for_is_measured(by_width, speedup):
    model = build_bert()
    dense = 1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000
    report = prune(model, BOTH, target=Target(speedup=speedup, **TORCH), data=[draw_batch(model)])
    left = 1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000
    assert report.settings["measured_ms"] == pytest.approx(left, rel=1e-3)
    assert report.settings["dense_ms"] == pytest.approx(dense, rel=1e-3)
    assert dense / left == pytest.approx(speedup, rel=0.05)


def test_a_table_of_int8_is_of_models_in_int8(by_width):
    """What int8 brings to the whole model counts once, not once for each kind of block."""
    model = build_bert()
    target = Target(speedup=2.5, dtype="int8", length=16)
    numbers = prune(model, BOTH, target=target, data=[draw_batch(model)]).settings
    assert numbers["measured_ms"] == pytest.approx(numbers["dense_ms"] / 2.5, rel=0.05)
    assert numbers["predicted_ms"] == pytest.approx(numbers["measured_ms"], rel=0.05)


def test_blocks_that_take_more_than_their_model_are_measured_again(by_width, monkeypatch):
    """A table that other processes have spoiled would choose at random; and it would be kept."""
    ratio, asked = stopwatch.Stopwatch.ratio, []

    def spoiled(self, model, groups, kept, seconds=0.4):
        asked.append(kept)
        return ratio(self, model, groups, kept, seconds) * (0.1 if len(asked) <= until else 1)

    monkeypatch.setattr(stopwatch.Stopwatch, "ratio", spoiled)
    told = {"target": Target(speedup=1.2, **TORCH), "data": [draw_batch(build_bert())]}
    until = 9
    assert prune(build_bert(), BOTH, **told).settings["measured_ms"] > 0
    assert len(asked) > 2 * 9
    next(table.CACHE.glob("*.json")).unlink()
    until = 10**6
    with pytest.raises(PruningError, match=r"keeps its pace.*Received: blocks that seem to take \d+%"):
        prune(build_bert(), BOTH, **told)
    assert not list(table.CACHE.glob("*.json"))


def test_a_table_that_was_wrong_is_corrected(by_width, monkeypatch):
    """Nothing of a wrong table's scale reaches the model: what it would be is measured."""
    right = table.measured_table

    def wrong(*arguments):
        found = right(*arguments)
        return LatencyTable(
            found.blocks, found.widths, {name: [t * 0.8 for t in ts] for name, ts in found.times.items()}, found.whole
        )

    monkeypatch.setattr("hf_prune.session.time_budget.measured_table", wrong)
    report = prune(model := build_bert(), BOTH, target=Target(speedup=1.5, **TORCH), data=[draw_batch(model)])
    numbers = report.settings
    assert numbers["measured_ms"] == pytest.approx(numbers["asked_ms"], rel=0.05)
    assert numbers["predicted_ms"] != pytest.approx(numbers["measured_ms"], rel=0.05)


def test_a_table_that_was_wrong_is_corrected_on_the_way(by_width, monkeypatch):
    """What it got wrong does not all come due in the last change."""
    right = table.measured_table

    def wrong(*arguments):
        found = right(*arguments)
        times = {name: [t * (1 + 0.2 * (t < ts[-1])) for t in ts] for name, ts in found.times.items()}
        return LatencyTable(found.blocks, found.widths, times, found.whole)

    monkeypatch.setattr("hf_prune.session.time_budget.measured_table", wrong)
    model, lefts = build_bert(), []
    dense = 1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000
    schedule = Schedule("linear", begin=1, end=8, frequency=1)
    pruning = Pruning(
        model, BOTH, schedule, target=Target(speedup=1.8, **TORCH), total_steps=8, data=[draw_batch(model)],
        shrink_during_training=True,
    )  # fmt: skip
    for _ in range(8):
        pruning.step()
        lefts.append((1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000) / dense)
    assert lefts[-1] == pytest.approx(1 / 1.8, rel=0.05)
    drops = [before - after for before, after in itertools.pairwise(lefts)]
    assert drops[-1] < 2 * sum(drops) / len(drops)


@pytest.mark.parametrize("shrink_during_training", [True, False])
def test_a_time_that_cannot_be_met_takes_all_that_may_go(by_width, shrink_during_training, caplog):
    model = build_bert()
    schedule = Schedule("linear", begin=1, end=4, frequency=1)
    told = {"target": Target(speedup=50, **TORCH), "total_steps": 4, "data": [draw_batch(model)]}
    pruning = Pruning(model, BOTH, schedule, shrink_during_training=shrink_during_training, **told)
    for _ in range(4):
        pruning.step()
    report = pruning.finish()
    assert not any(report.kept.values())
    assert "target.speedup=50 was not reached, 0." in caplog.text
    assert " of the dense model's time is left" in caplog.text


def test_milliseconds_are_asked_for(by_width):
    model = build_bert()
    dense = 1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000
    report = prune(model, BOTH, target=Target(latency_ms=dense * 0.7, **TORCH), data=[draw_batch(model)])
    assert report.settings["measured_ms"] == pytest.approx(dense * 0.7, rel=0.05)


def test_more_milliseconds_than_the_dense_model_takes_are_told_as_asked(by_width):
    numbers = prune(
        model := build_bert(), BOTH, target=Target(latency_ms=500, **TORCH), data=[draw_batch(model)]
    ).settings
    assert numbers["asked_ms"] == pytest.approx(500)
    assert numbers["dense_ms"] < 100
    assert numbers["sparsity"] == 0  # a grid of times rounds up, and some neurons left for it


@pytest.mark.parametrize("asked", ["speedup", "latency_ms"])
@pytest.mark.parametrize("uneven", [True, False])
def test_a_model_that_was_pruned_before_is_compared_with_its_dense_one(by_width, asked, uneven):
    """Trials of a search go on from smaller models: twice as fast as one of them would be four times as fast."""
    model = build_bert()
    dense = 1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000
    if uneven:
        prune(model, BOTH, target=Target(speedup=1.3, **TORCH), data=[draw_batch(model)])
    else:
        prune(model, [NeuronPruner(sparsity=0.5, allocation="uniform")], data=[draw_batch(model)])
    told = {"speedup": 1.7} if asked == "speedup" else {"latency_ms": dense / 1.7}
    numbers = prune(model, BOTH, target=Target(**told, **TORCH), data=[draw_batch(model)]).settings
    left = 1 + sum(one.numel() for one in model.parameters() if one.ndim > 1) / 1000
    assert dense / left == pytest.approx(1.7, rel=0.05)
    assert numbers["dense_ms"] == pytest.approx(dense, rel=1e-3)
    assert numbers["measured_ms"] == pytest.approx(left, rel=1e-2)


def test_layers_that_share_their_weights_have_a_table_for_each_depth(by_width):
    for depth in (1, 2):
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
        model = AlbertModel(AlbertConfig(**sizes, num_hidden_layers=depth, num_attention_heads=4))
        batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
        target = Target(speedup=1.1, **TORCH)
        prune(model, BOTH, target=target, data=[batch], loss=lambda model, batch: model(**batch)[0].square().sum())
    assert len(list(table.CACHE.glob("*.json"))) == 2


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("build", [build_bert, build_llama])
def test_a_real_clock_is_read(build, runtime, lane):  # `lane`: torch's tracer needs other masks on 4.57
    model = build()
    batch = draw_batch(model)
    batch = {**batch, "labels": batch["input_ids"]} if model.config.model_type == "llama" else batch
    target = Target(speedup=1.1, runtime=runtime, length=16)
    report = prune(model, [HeadPruner(), NeuronPruner()], target=target, data=[batch])
    assert report.settings["measured_ms"] > 0
    assert len(list(table.CACHE.glob("*.json"))) == 1  # measured once, then read
    assert model(**batch).loss.isfinite()


def test_a_resumed_run_has_the_same_table_and_choice(by_width):
    def begin():
        model = build_bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        told = {"target": Target(speedup=1.5, **TORCH), "schedule": Schedule(begin=1, end=6, frequency=2)}
        return model, optimizer, Pruning(model, BOTH, total_steps=8, optimizer=optimizer, **told)

    def step(model, optimizer, pruning, number):
        model(**draw_batch(model, seed=number)).loss.backward()
        pruning.after_backward()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()

    whole, first, second = begin(), begin(), begin()
    for number in range(8):
        step(*whole, number)
        if number < 4:
            step(*first, number)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    for number in range(4, 8):
        step(*second, number)
    assert {n: m.tolist() for n, m in second[2].alive.items()} == {n: m.tolist() for n, m in whole[2].alive.items()}
    assert second[2].finish().settings == whole[2].finish().settings


@pytest.mark.parametrize(("budget", "share"), [("parameters", 0.8), ("size_mb", None)])
def test_parameters_and_bytes_are_counted(budget, share):
    model = build_bert()
    dense = sum(one.numel() for one in model.parameters())
    wanted = share or 0.8 * dense * 4 / 1e6
    prune(model, BOTH, target=Target(**{budget: wanted}), data=[draw_batch(model)])
    left = sum(one.numel() for one in model.parameters())
    assert 0.7 * dense < left <= 0.8 * dense


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        ({}, "exactly one of macs, parameters, size_mb, speedup, latency_ms. Received: none of them"),
        ({"macs": 0.5, "speedup": 2}, "exactly one of .* Received: macs, speedup"),
        ({"speedup": 0.5}, "speedup: .*greater than or equal to 1. Received: 0.5"),
        ({"speedup": 2, "dtype": "int8", "runtime": "torch"}, "dtype 'int8' needs runtime='onnxruntime'"),
        ({"speedup": 2, "device": "cuda"}, "device 'cuda' needs runtime='torch'. Received: runtime='onnxruntime'"),
        ({"parameters": 50}, r"parameters must be in \(0, 1\].* Did you mean 0.5"),
    ],
)
def test_targets_that_mean_nothing_are_refused(told, rule):
    with pytest.raises(PruningError, match=rule):
        Target(**told)


def test_layers_have_a_sparsity_of_their_own(by_width):
    model = build_bert()
    with pytest.raises(PruningError, match=r"A target of time chooses heads.* Received: a pruner for 'layers'"):
        prune(model, LayerPruner(), target=Target(speedup=2, **TORCH), data=[draw_batch(model)])


def test_ranks_inside_groups_mean_nothing_to_a_time():
    with pytest.raises(PruningError, match="allocation='global'. Received: 'uniform'"):
        prune(build_bert(), HeadPruner(allocation="uniform"), target=Target(speedup=2, **TORCH))


def test_int8_is_timed_as_it_is_exported():
    model, conditions = build_bert(), stopwatch.Conditions(length=16, dtype="int8")
    assert stopwatch.Stopwatch(model, conditions).ratio(model, [], {}) > 0


def test_images_are_timed_at_the_size_that_is_asked_for():
    model = build_vit()
    watched = stopwatch.Stopwatch(model, stopwatch.Conditions(runtime="torch", image_size=model.config.image_size))
    assert watched.dense_ms > 0
    with pytest.raises(PruningError, match="Input image size"):  # this model reads no other: it was asked for it
        stopwatch.Stopwatch(model, stopwatch.Conditions(runtime="torch", image_size=2 * model.config.image_size))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_without_one_feed_forward_is_timed(family):
    """Torch's tracer divided by 0 on GPT-2's empty projection, and the whole process ended."""
    model = zoo.build(family, "causal_lm")
    groups = find_groups(model)
    name = next(group.name for group in groups if group.kind == "neuron")
    assert stopwatch.Stopwatch(model, stopwatch.Conditions(length=8)).ratio(model, groups, {name: []}, 0.05) > 0


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_length_beyond_the_positions_is_not_blamed_on_a_runtime(runtime):
    told = f"does not on 1 x 4096, in {runtime} on cpu. Received: "
    with pytest.raises(PruningError, match=told) as caught:
        stopwatch.Stopwatch(build_bert(), stopwatch.Conditions(runtime=runtime, length=4096))
    assert "say runtime" not in str(caught.value)


@pytest.mark.parametrize("name", ["speedup", "latency_ms", "size_mb"])
def test_no_target_is_infinite(name):
    with pytest.raises(PruningError, match=f"{name}: Input should be a finite number. Received: inf"):
        Target(**{name: float("inf")})


def test_what_cannot_run_says_so():
    with pytest.raises(PruningError, match="BertForSequenceClassification .* 1 x 4096, in torch on cpu"):
        stopwatch.Stopwatch(build_bert(), stopwatch.Conditions(runtime="torch", length=4096))
