"""Counts that can be worked out by hand, fair timing, and reports as text, JSON and picture."""

from __future__ import annotations

import json
import struct
import time
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from hf_prune.errors import PruningError
from hf_prune.report import (
    Measurement,
    Report,
    compare_latency,
    environment,
    measure,
    measure_pair,
    random_inputs,
    thread_clock,
)
from hf_prune.report.display import layer_panels
from hf_prune.report.machine import command_line

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def draw_all(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def tiny_bert(**changes):
    return draw_all(BertModel(BertConfig(vocab_size=20, **{**SMALL, **changes}), add_pooling_layer=False))


def bytes_of_tensors(folder):
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - struct.unpack("<Q", data[:8])[0]


# --- a model in torch ---


def test_macs_by_hand():
    # a token: q, k, v, o 4 * 8 * 8, feed-forward 2 * 8 * 12, and 5 tokens to look at: scores 5 * 8, values 5 * 8
    measured = measure(tiny_bert(), batch=3, length=5, repeats=1)
    assert measured.prunable_macs == 4 * 64 + 2 * 96
    assert measured.macs == 3 * 5 * (4 * 64 + 2 * 96 + 2 * 40)
    assert (measured.batch, measured.length, measured.threads) == (3, 5, 1)
    assert measured.latency_ms["torch"] > 0


def test_grouped_queries_count_every_query_head():
    config = LlamaConfig(vocab_size=20, num_key_value_heads=1, **SMALL)
    measured = measure(draw_all(LlamaForCausalLM(config)), batch=2, length=4, repeats=1)
    # q and o 8 * 8, k and v 8 * 4, three matrices 8 * 12; attention over 4 tokens with all query heads; the words
    a_token = 2 * 64 + 2 * 32 + 3 * 96 + 2 * 4 * 8 + 8 * 20
    rotary = 2 * 4 * 2  # positions times frequencies; once for all heads, and not for every version a product
    assert measured.prunable_macs == 2 * 64 + 2 * 32 + 3 * 96
    assert 8 * a_token <= measured.macs <= 8 * a_token + rotary


def test_parameters_zeros_and_size(tmp_path):
    model = tiny_bert()
    model.encoder.layer[0].intermediate.dense.weight.data[:3] = 0  # 3 rows of 8
    measured = measure(model, length=4, repeats=1)
    assert measured.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert measured.nonzero == measured.parameters - 24
    model.save_pretrained(tmp_path)
    assert measured.size_mb == pytest.approx(bytes_of_tensors(tmp_path) / 1e6)


def test_tied_weights_count_once(tmp_path):
    config = LlamaConfig(vocab_size=20, num_key_value_heads=1, tie_word_embeddings=True, **SMALL)
    model = draw_all(LlamaForCausalLM(config)).to(torch.bfloat16)
    measured = measure(model, length=4, repeats=1)
    model.save_pretrained(tmp_path)
    assert measured.size_mb == pytest.approx(bytes_of_tensors(tmp_path) / 1e6)
    assert measured.size_mb == pytest.approx(measured.parameters * 2 / 1e6)


def test_measuring_leaves_no_trace():
    model = tiny_bert().train()
    model.embeddings.eval()  # a frozen part
    before, threads = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_num_threads()
    measure(model, length=4, repeats=1, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert (model.training, model.encoder.training, model.embeddings.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_of_ones_own_give_batch_and_length():
    inputs = {"input_ids": torch.ones(4, 7, dtype=torch.long)}
    measured = measure(tiny_bert(), inputs, repeats=1)
    assert (measured.batch, measured.length) == (4, 7)


def test_unknown_architecture_still_gets_measured():
    from test_structure import OwnConfig, OwnModel

    measured = measure(draw_all(OwnModel(OwnConfig())), {"inputs": torch.randn(2, 3)}, repeats=1)
    assert (measured.prunable_macs, measured.length) == (None, None)
    assert measured.macs > 0


@pytest.mark.parametrize(
    ("model", "runtime", "message"),
    [("x.onnx", "torch", "Received: 'x.onnx' for 'torch'"), (None, "onnxruntime", "None for 'onnxruntime'")],
)
def test_runtime_and_model_must_fit(model, runtime, message):
    with pytest.raises(PruningError, match=message):
        measure(model, runtime=runtime)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": 0}, {"threads": 0}, {"repeats": 0}])
def test_nothing_to_measure(wrong):
    with pytest.raises(PruningError, match="must be at least 1"):
        measure(tiny_bert(), **{"length": 4, **wrong})


# --- timing ---


def test_latencies_are_taken_in_turn():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    compare_latency(runs, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4


def test_latency_is_a_median_in_milliseconds():
    waits = iter([0.05, 0.001, 0.2, 0.001, 0.001])  # a slow warm-up and one outlier
    median = compare_latency({"wait": lambda: time.sleep(next(waits))}, repeats=4, warmup=1)["wait"]
    assert 1 <= median < 40


def test_a_clock_of_threads_does_not_count_what_others_take():
    times = compare_latency({"wait": lambda: time.sleep(0.05)}, repeats=3, warmup=1, clock=thread_clock)
    assert times["wait"] < 10 or time.get_clock_info("thread_time").resolution > 1e-4  # Windows


def test_a_pair_is_measured_in_one_go(tmp_path):
    files = [write_onnx(tmp_path / name) for name in ("dense", "pruned")]
    dense, pruned = measure_pair(tiny_bert(), tiny_bert(intermediate_size=6), onnx=files, batch=2, length=6, repeats=2)
    assert dense.prunable_macs - pruned.prunable_macs == 2 * 6 * 8
    assert set(dense.latency_ms) == set(pruned.latency_ms) == {"torch", "onnxruntime"}


# --- made-up inputs ---


def test_random_inputs_for_text_images_and_both():
    text = random_inputs(BertConfig(vocab_size=20, **SMALL), batch=2, length=5)
    assert {name: tuple(value.shape) for name, value in text.items()} == {"input_ids": (2, 5), "attention_mask": (2, 5)}
    assert text["input_ids"].max() < 20
    images = random_inputs(ViTConfig(image_size=(8, 4), num_channels=1, **SMALL), batch=3)
    assert {name: tuple(value.shape) for name, value in images.items()} == {"pixel_values": (3, 1, 8, 4)}
    assert set(random_inputs(CLIPConfig())) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(random_inputs(T5Config())) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_random_inputs_follow_the_seed():
    config = BertConfig(vocab_size=1000)
    first, same, other = (random_inputs(config, 2, 8, seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_random_inputs_for_sound_are_not_guessed():
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 8,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
    }
    config = WhisperConfig(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, **layers)
    with pytest.raises(PruningError, match=r"pass inputs\. Received: WhisperConfig"):
        random_inputs(AutoModel.from_config(config))


# --- an ONNX file ---


def write_onnx(folder, *, asks=("input_ids",), external=False):
    """Embedding 20 x 4 (one row zero) times a matrix 4 x 3; other inputs are added to the ids' vectors."""
    folder.mkdir(exist_ok=True)
    numbers = np.arange(1, 93, dtype=np.float32)
    table, matrix = numbers[:80].reshape(20, 4).copy(), numbers[80:].reshape(4, 3)
    table[0] = 0
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in asks]
    nodes = [helper.make_node("Sum", [f"{name}_vector" for name in asks], ["vectors"])]
    nodes = [helper.make_node("Gather", ["table", name], [f"{name}_vector"]) for name in asks] + nodes
    nodes.append(helper.make_node("MatMul", ["vectors", "matrix"], ["output"]))
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(matrix, "matrix")]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "length", 3])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file = folder / "model.onnx"
    onnx.save(model, file, save_as_external_data=external, location="weights.data", size_threshold=0)
    BertConfig(vocab_size=20, **SMALL).save_pretrained(folder)
    return file


@pytest.mark.parametrize("external", [False, True])
def test_an_onnx_file_or_its_folder(tmp_path, external):
    file = write_onnx(tmp_path, external=external)
    for path in (file, str(tmp_path)):
        measured = measure(path, runtime="onnxruntime", batch=2, length=6, repeats=2)
        assert (measured.parameters, measured.nonzero) == (92, 88)
        assert (measured.macs, measured.prunable_macs) == (None, None)
        assert (measured.batch, measured.length) == (2, 6)
        assert measured.latency_ms["onnxruntime"] > 0
    written = sum(one.stat().st_size for one in tmp_path.iterdir() if one.suffix in (".onnx", ".data"))
    assert measured.size_mb == pytest.approx(written / 1e6)
    assert not external or (tmp_path / "weights.data").stat().st_size >= 92 * 4


def test_token_types_and_positions_are_made_from_the_ids(tmp_path):
    file = write_onnx(tmp_path, asks=("input_ids", "token_type_ids", "position_ids"))
    assert measure(file, runtime="onnxruntime", length=6, repeats=1).length == 6


def test_an_onnx_file_that_asks_for_more(tmp_path):
    file = write_onnx(tmp_path, asks=("input_ids", "boxes"))
    with pytest.raises(PruningError, match="asks for boxes: pass inputs"):
        measure(file, runtime="onnxruntime", repeats=1)
    (tmp_path / "config.json").unlink()
    with pytest.raises(PruningError, match=r"No config\.json"):
        measure(file, runtime="onnxruntime", repeats=1)
    inputs = {name: np.ones((3, 2), dtype=np.int64) for name in ("input_ids", "boxes")}
    assert measure(file, inputs, runtime="onnxruntime", repeats=1).batch == 3


def test_a_missing_onnx_file(tmp_path):
    with pytest.raises(PruningError, match="No such ONNX file"):
        measure(tmp_path, runtime="onnxruntime")


# --- the report ---


def measurement(factor, **changes):
    figures = {
        "parameters": int(2_000_000 * factor),
        "nonzero": int(2_000_000 * factor),
        "prunable_macs": int(1_000_000 * factor),
        "size_mb": 8 * factor,
        "macs": int(5_000_000_000 * factor),
        "latency_ms": {"torch": 20 * factor, "onnxruntime": 10 * factor},
        "batch": 8,
        "length": 128,
        "threads": 1,
    }
    return Measurement(**{**figures, **changes})


def a_report():
    return Report(
        kept={"layers.0.attention.heads": [0, 2], "layers.1.mlp.neurons": [5]},
        units={"layers.0.attention.heads": 4, "layers.0.mlp.neurons": 16, "layers.1.mlp.neurons": 16},
        dense=measurement(1),
        pruned=measurement(0.5),
        metrics={"accuracy": {"dense": 0.8824, "pruned": 0.8771}},
    )


def cells(table):
    lines = [line for line in table.splitlines() if not line.startswith("|--")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_table():
    table = a_report().table()
    assert cells(table) == {
        "": ["dense", "pruned", "change"],
        "accuracy": ["0.8824", "0.8771", "-0.0053"],
        "heads": ["4", "2", "50.0% left"],
        "neurons": ["32", "17", "53.1% left"],
        "parameters": ["2.000 M", "1.000 M", "50.0% left"],
        "prunable MACs per token": ["1.000 M", "500.0 k", "50.0% left"],
        "MACs (8 x 128 tokens)": ["5.000 G", "2.500 G", "50.0% left"],
        "size, MB": ["8.00", "4.00", "50.0% left"],
        "latency in torch, ms (8 x 128 tokens, 1 thread)": ["20", "10", "2.00x speed"],
        "latency in onnxruntime, ms (8 x 128 tokens, 1 thread)": ["10", "5", "2.00x speed"],
    }


def test_a_report_of_nothing_says_so():
    assert str(Report()) == "Report: nothing was pruned, counted or scored yet."


def test_table_is_aligned_and_narrow():
    lines = a_report().table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 100
    assert len({tuple(at for at, char in enumerate(line) if char == "|") for line in lines}) == 1


def test_table_shows_zeros_only_where_there_are_some_and_gaps_as_gaps():
    report = Report(dense=measurement(1, length=None), pruned=measurement(1, nonzero=200_000, prunable_macs=None))
    found = cells(report.table())
    assert found["parameters that are not 0"] == ["2.000 M", "200.0 k", "10.0% left"]
    assert found["prunable MACs per patch"] == ["1.000 M", "-", ""]
    assert "heads" not in found
    assert cells(Report(pruned=measurement(1)).table())["size, MB"] == ["-", "8.00", ""]


def test_a_report_survives_json():
    report = a_report()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_settings_become_json(tmp_path):
    kept = {"layers.0.mlp.neurons": torch.tensor([1, 3]).tolist()}
    settings = {"folder": tmp_path, "loss": np.float32(0.5), "masks": torch.tensor([True]), "names": {"b", "a"}}
    written = Report(kept=kept, settings=settings).to_dict()
    assert written["settings"] == {"folder": str(tmp_path), "loss": 0.5, "masks": [True], "names": ["a", "b"]}
    assert Report.from_dict({**written, "new_in_later_versions": 1}).kept == {"layers.0.mlp.neurons": [1, 3]}


def test_panels_gather_layers_stages_towers_and_experts():
    units = {f"vision.stages.{stage}.layers.{layer}.mlp.neurons": 8 for stage in (1, 0) for layer in range(2)}
    units |= {f"text.layers.0.experts.{expert}.neurons": 4 for expert in range(3)}
    units |= {"decoder.attention.heads": 6}  # one group that spans layers
    kept = {"vision.stages.1.layers.0.mlp.neurons": [0], "text.layers.0.experts.2.neurons": [], "unknown.heads": [1]}
    assert layer_panels(Report(kept=kept, units=units)) == {
        "vision.mlp.neurons": {(0, 0): (8, 8), (0, 1): (8, 8), (1, 0): (1, 8), (1, 1): (8, 8)},
        "text.experts.neurons": {(0,): (8, 12)},
        "decoder.attention.heads": {(): (6, 6)},
    }


@pytest.mark.parametrize("layers", [2, 80])
def test_plot_writes_a_picture(tmp_path, layers):
    from matplotlib.image import imread

    report = a_report()
    for layer in range(layers):
        report.units[f"layers.{layer}.attention.heads"] = 4
    path = report.plot(tmp_path / "new" / "kept.png")
    picture = imread(path)
    assert path == tmp_path / "new" / "kept.png" == report.plot(tmp_path / "new" / "kept")
    assert picture.shape[:2] == (795, 1275 if layers == 2 else 2100)
    assert len(np.unique(picture[::5, ::5, :3].reshape(-1, 3), axis=0)) > 3  # more than an empty frame


def test_plot_without_groups(tmp_path):
    with pytest.raises(PruningError, match=r"Received: units=\{\}"):
        Report().plot(tmp_path / "nothing.png")
    for name, rule in (("kept.foo", "format that matplotlib writes: .*png"), ("", "must be a picture's file")):
        with pytest.raises(PruningError, match=rf"path .*{rule}.*Received"):
            Report().plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_environment_says_on_what():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert all(found[key] for key in ("cpu", "python", "transformers", "hf_prune", "date"))
    json.dumps(found)


@pytest.mark.parametrize("shell", ["ZMQInteractiveShell", "TerminalInteractiveShell"])
def test_a_table_in_a_notebook_is_that_of_a_script(shell, monkeypatch):
    """Under Jupyter rich would display the table, and leave the text empty."""
    report = Report(metrics={"accuracy [b]": {"dense": 0.5, "pruned": 0.25}})
    expected = report.table()
    monkeypatch.setattr("builtins.get_ipython", lambda: type(shell, (), {})(), raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert report.table() == str(report) == expected  # of units nothing is known, and so nothing is said
    assert "| accuracy [b] | 0.5000 | 0.2500 | -0.2500 |" in expected


def test_a_notebook_shows_the_same_table_as_html():
    report = a_report()
    report.metrics["<b>"] = {"dense": 1.0}
    shown = ElementTree.fromstring(report._repr_html_())
    rows = [["".join(cell.itertext()) for cell in row] for row in shown.iter("tr")]
    assert {row[0]: row[1:] for row in rows} == cells(report.table())


def test_a_line_says_what_was_pruned_and_warnings_stand_below():
    units = {"layers.0.attention.heads": 4, "layers.1.attention.heads": 4, "layers.0.mlp.neurons": 4096}
    both = [Measurement(2, 2, macs, 1.0, 1, {}, 1, None, 1) for macs in (300, 100)]
    kept = {"layers.0.attention.heads": [1], "layers.0.mlp.neurons": list(range(1024))}
    report = Report(kept, units, *both, settings={"warnings": ["target <missed>"]})
    assert report.summary() == "pruned 3 of 8 heads, 3,072 of 4,096 neurons: 33.3% of the prunable MACs left"
    assert str(report).splitlines()[0] == report.summary()
    assert str(report).splitlines()[-1] == "Warning: target <missed>"
    (caption,) = ElementTree.fromstring(report._repr_html_()).iter("caption")
    assert "".join(caption.itertext()).endswith(f"{report.summary()}Warning: target <missed>")
    assert Report(units=units).summary() == "pruned nothing"
    masked = Report(masked={"a": 0.5, "b": 0.25}, settings={"sparsity_weight": 0.4})
    assert masked.summary() == "pruned 40.0% of single weights in 2 matrices"


def test_plot_without_a_path_is_a_figure_that_a_notebook_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = a_report().plot()
    assert [ax.get_title(loc="left").split(":")[0] for ax in figure.axes] == ["attention.heads", "mlp.neurons"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not list(tmp_path.iterdir())


def test_a_time_that_was_aimed_at_has_a_row():
    """Without it a run with a target of time shows times of other runtimes only."""
    told = {"dense_ms": 9.0, "asked_ms": 4.5, "predicted_ms": 4.321, "measured_ms": 4.4321}
    table = Report(metrics={"accuracy": {"dense": 0.9}}, settings=told).table()
    row = next(line for line in table.splitlines() if "aimed at" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "time that was aimed at, ms (asked for 4.5)", "9", "4.432", "2.03x speed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "shown"), [("/x/hf_prune/__main__.py", "python -m hf_prune"), ("/x/hf-prune", "hf-prune")]
)
def test_a_command_is_told_as_it_can_be_typed(typed, shown, monkeypatch):
    monkeypatch.setattr("sys.argv", [typed, "run", "a b"])
    assert command_line() == f"{shown} run 'a b'"
