"""Grids of latency: what is timed, what scatters and is measured again, and what a forward needs of memory."""

from __future__ import annotations

import json
import time

import pytest
import torch
from models import build_bert, build_vit
from test_report import write_onnx
from transformers import Dinov2Config, Dinov2ForImageClassification
from typer.testing import CliRunner

from hf_prune import PruningError, cli, save_pruned, shrink
from hf_prune.inspecting import load
from hf_prune.measuring import find_models, measure_models
from hf_prune.report import Timing, measure_grid
from hf_prune.report.memory import peak_bytes
from hf_prune.report.timing import steadiest, times_in_turn, wall_clock

KEPT = {"layers.0.attention.heads": [0, 2], "layers.1.mlp.neurons": range(8)}


def cells(grid):
    return [(one.model, one.runtime, one.batch, one.length) for one in grid.timings]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as `hf-prune run` leaves it, with made-up ONNX files."""
    home = tmp_path_factory.mktemp("runs") / "run"
    model = build_bert()
    save_pruned(model, home / "dense")
    save_pruned(shrink(model, KEPT), home / "model")
    for name in ("onnx", "onnx-dense"):
        write_onnx(home / name)
    (home / "report.json").write_text("{}")
    return home


def test_every_model_over_every_input(tmp_path):
    models = {"dense": build_bert(), "pruned": shrink(build_bert(), KEPT), "file": write_onnx(tmp_path)}
    grid = measure_grid(models, batches=[1, 2], lengths=[4, 6], repeats=2)
    inputs = [(1, 4), (1, 6), (2, 4), (2, 6)]
    in_torch = [(name, "torch", *cell) for cell in inputs for name in ("dense", "pruned")]
    assert cells(grid) == [*in_torch, *(("file", "onnxruntime", *cell) for cell in inputs)]
    assert all(0 < one.median_ms <= one.p90_ms and one.threads == 1 and one.device == "cpu" for one in grid.timings)
    assert grid.counted["pruned"].macs < grid.counted["dense"].macs
    assert grid.counted["file"].latency_ms == {"onnxruntime": grid.timings[8].median_ms}


def test_images_have_no_length_and_are_timed_once_for_each_batch():
    grid = measure_grid({"vit": build_vit()}, batches=[1, 2], lengths=[4, 6], repeats=1)
    assert cells(grid) == [("vit", "torch", 1, None), ("vit", "torch", 2, None)]
    assert [one.shape for one in grid.timings] == ["batch of 1", "batch of 2"]


def test_images_are_as_large_as_is_asked():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    model = Dinov2ForImageClassification(Dinov2Config(**sizes))
    usual, large = (measure_grid({"it": model}, image_size=side, repeats=1).counted["it"].macs for side in (None, 64))
    assert large > 3.5 * usual  # 65 tokens instead of 17
    with pytest.raises(PruningError, match="image_size must be at least 1"):
        measure_grid({"it": model}, image_size=0)


def test_inputs_that_the_model_does_not_take_are_named():
    with pytest.raises(
        PruningError, match=r"vit: its input must be one .*Received: pixel_values \(1, \d, 48, 48\) \(Input"
    ):
        measure_grid({"vit": build_vit()}, image_size=48)
    with pytest.raises(
        PruningError, match=r"bert: its input must be one that the model reads.*Received: input_ids \(1, 999\)"
    ):
        measure_grid({"bert": build_bert()}, lengths=[999])


def test_figures_that_scatter_are_measured_again_and_marked():
    calls, told = [], []

    def disturbed(*ignored):
        calls.append(1)
        time.sleep(0.1 if len(calls) % 2 else 0)  # beside which a loaded machine is calm

    restless, calm = build_bert(), build_bert()
    restless.register_forward_pre_hook(disturbed)
    grid = measure_grid({"restless": restless, "calm": calm}, lengths=[4], repeats=4, tell=told.append)
    found = grid.timings[0]
    assert (found.steady, found.rounds) == (False, 3)
    assert found.p90_ms > 1.15 * found.median_ms
    assert found in grid.unsteady
    assert len(told) == 2
    assert all("unsteady" in line and "measuring again" in line for line in told)
    assert "unsteady" in next(grid.rows())[-1]


def test_the_round_counts_in_which_times_scatter_least():
    """A report said 0.04x of a model that was faster: another process had the processor in that one round."""
    disturbed = iter([*[9.0] * 3, 2.0, 2.0, 50.0, 50.0, *[9.0] * 3, 2.0, 2.0, 2.0, 2.0])
    told = []
    times, rounds = steadiest({"a": lambda: 1.0, "b": lambda: next(disturbed)}, repeats=4, again=told.append)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert (rounds, len(told)) == (2, 1)


def test_times_are_taken_in_turn_and_a_slow_warm_up_does_not_count():
    calls = []
    clocks = {name: wall_clock(lambda name=name: calls.append(name)) for name in "ab"}
    times = times_in_turn(clocks, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(one) for one in times.values()] == [3, 3]


def test_memory_by_hand():
    # weights 8 * 16 + 16 numbers; 4 rows of 16 from the matrix, and as many again while they are rectified
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()).eval()
    given = {"input": torch.ones(4, 8)}
    with torch.no_grad():
        assert peak_bytes(model, given, lambda: model(**given)) == 4 * (8 * 16 + 16 + 2 * 4 * 16)


def test_a_pruned_model_needs_less_memory_and_longer_rows_need_more():
    grid = measure_grid({"dense": build_bert(), "pruned": shrink(build_bert(), KEPT)}, lengths=[4, 32], repeats=1)
    short_dense, short_pruned, long_dense, _ = (one.peak_mb for one in grid.timings)
    assert short_pruned < short_dense < long_dense


def test_compiled_models_are_timed_beside_eager_ones():
    model = build_bert(num_hidden_layers=1)
    grid = measure_grid({"bert": model}, lengths=[4], repeats=1, compiled="aot_eager")  # inductor takes a minute
    assert cells(grid) == [("bert", "torch", 1, 4), ("bert", "torch compiled", 1, 4)]


def test_what_cannot_be_compiled_is_an_error():
    with pytest.raises(PruningError, match=r"torch\.compile needs a model and a C\+\+ compiler"):
        measure_grid({"bert": build_bert()}, lengths=[4], compiled="no_such_backend")


@pytest.mark.parametrize("wrong", [{"batches": [0]}, {"lengths": []}, {"threads": 0}, {"repeats": 0}])
def test_nothing_to_measure(wrong):
    with pytest.raises(PruningError, match="must be at least 1"):
        measure_grid({"bert": build_bert()}, **wrong)


def test_a_timing_survives_json_and_others_are_refused():
    row = json.loads(json.dumps(measure_grid({"bert": build_bert()}, lengths=[4], repeats=1).to_dict()))["timings"][0]
    assert Timing.from_dict({**row, "of_a_later_version": 1}).model == "bert"
    for wrong in ({**row, "median_ms": "1"}, {**row, "batch": None}, {**row, "p90_ms": float("nan")}, [], None):
        with pytest.raises(PruningError, match="as `hf-prune measure --json` writes it"):
            Timing.from_dict(wrong)


# --- the command ---


def ask(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_run_names_all_its_models_the_dense_ones_first(run):
    assert list(find_models([str(run)])) == ["dense", "model", "onnx-dense", "onnx"]
    twice = find_models([str(run / "model"), str(run / "dense"), str(run)])
    assert list(twice) == ["model", "dense", str(run / "dense"), str(run / "model"), "onnx-dense", "onnx"]


def test_json_of_a_run(run):
    told = json.loads(ask("measure", run, "--batch", "1,2", "--length", "4", "--repeats", 1, "--json"))
    assert {one["model"] for one in told["timings"]} == {"dense", "model", "onnx-dense", "onnx"}
    assert {one["batch"] for one in told["timings"]} == {1, 2}
    assert told["environment"]["cpu"]
    assert set(told["counted"]) == {"dense", "model", "onnx-dense", "onnx"}


def test_the_table_says_threads_and_speed(run):
    told = ask("measure", run / "dense", run / "model", "--batch", 2, "--length", 4, "--repeats", 1, "--threads", 2)
    assert "2 threads in every runtime" in told
    assert told.count("x speed") == 2  # counts above, the grid below
    assert "2 x 4 tokens" in told


def test_half_precision_that_is_measured_in_float32_is_told(tmp_path):
    model = build_vit()
    model.bfloat16().save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")
    told = []
    for name in ("half", "whole"):
        measure_models([str(tmp_path / name)], load, repeats=1, tell=told.append)
    assert [one for one in told if "saved in" in one] == [
        "'half' is saved in bfloat16, and measured in float32: its file is smaller than its size here"
    ]


def test_counts_stand_under_the_models_names(run):
    """A pruned model that is measured alone, or first, is no dense one."""
    told = ask("measure", run / "model", "--length", 4, "--repeats", 1)
    assert told.splitlines()[0].split() == ["|", "|", "model", "|"]
    told = ask("measure", run / "model", run / "dense", "--length", 4, "--repeats", 1)
    assert told.splitlines()[0].split() == ["|", "|", "model", "|", "dense", "|", "change", "|"]


@pytest.mark.parametrize("batch", ["0", "1,", "many", "-1"])
def test_a_batch_that_is_no_number_is_named(run, batch):
    with pytest.raises(PruningError, match="--batch must be numbers from 1 on"):
        ask("measure", run, f"--batch={batch}")


def test_a_run_without_models(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(PruningError, match="needs a folder with a model"):
        ask("measure", tmp_path)
