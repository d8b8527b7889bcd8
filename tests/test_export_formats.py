"""Exports in smaller numbers: how far they may be from torch, and what is refused before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import randomize

from hf_prune import Exported, PruningError, UnsupportedModelError, export, shrink
from hf_prune.exporting import check_wanted, feed, onnx_session, open_exported
from hf_prune.exporting.parity import Bound, check_parity, open_onnx
from hf_prune.exporting.parts import split

pytest.importorskip("onnxruntime")
OPTIMUM = transformers.__version__.startswith("4.")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
CUT = {"layers.0.attention.heads": [0, 2, 3], "layers.0.mlp.neurons": range(0, 64, 3)}


def build_bert() -> Any:
    config = transformers.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=40, pad_token_id=0, num_labels=3)
    return shrink(randomize(transformers.BertForSequenceClassification(config)), CUT).eval()


def build_t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 2}
    return randomize(transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=60, **sizes))).eval()


def batches(rows: int = 4, number: int = 3) -> list[dict[str, torch.Tensor]]:
    """Draw texts as a Trainer's collator gives them, with labels, which no graph reads."""
    draw = torch.Generator().manual_seed(7)
    ids = [torch.randint(1, 60, (rows, 9 + n), generator=draw) for n in range(number)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": torch.zeros(rows)} for one in ids]


def logits(folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnx_session(folder)
    full = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    fed = {one.name: full[one.name].numpy() for one in session.get_inputs()}
    return torch.from_numpy(session.run(["logits"], fed)[0])


def operators(folder: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]


DATA = batches()
NUMBERS = {
    "fp16": ({"dtype": "fp16"}, 0.02),
    "dynamic": ({"quantize": "dynamic"}, 0.25),
    "static": ({"quantize": "static", "data": DATA}, 0.25),
}


@pytest.fixture(scope="module", params=list(NUMBERS))
def smaller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Exported]:
    model = build_bert()
    settings, _ = NUMBERS[request.param]
    done = export(model, tmp_path_factory.mktemp("smaller") / "here", **settings)
    assert all(torch.equal(now[name], then[name]) for now, then in zip(DATA, batches()) for name in then)
    return request.param, model, done


def test_smaller_numbers_stay_within_the_bound_that_is_told(smaller: Any) -> None:
    name, model, done = smaller
    share = NUMBERS[name][1]
    for batch in batches(rows=2):
        with torch.no_grad():
            expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        difference = float((logits(done.path, batch) - expected).abs().max())
        assert 0 < difference <= share * float(expected.abs().max())
    assert 1e-7 < done.max_difference <= done.atol


def test_the_numbers_are_what_was_asked_for(smaller: Any) -> None:
    import onnx

    name, _, done = smaller
    assert (done.format, done.quantize) == ("onnx", None if name == "fp16" else name)
    assert done.dtype == ("fp16" if name == "fp16" else "int8")
    found = operators(done.path)
    assert ("MatMulInteger" in found) == (name == "dynamic")
    assert ("QuantizeLinear" in found) == (name == "static")
    stored = onnx.load(done.path / "model.onnx").graph.initializer
    kinds = {one.data_type for one in stored if len(one.dims) == 2 and min(one.dims) > 3}
    numbers = onnx.TensorProto
    assert (
        kinds
        == {
            "fp16": {numbers.FLOAT16},
            "dynamic": {numbers.INT8, numbers.UINT8},  # embeddings, which nothing multiplies, are unsigned
            "static": {numbers.INT8, numbers.FLOAT},  # embeddings
        }[name]
    )


def test_a_folder_in_smaller_numbers_loads_where_users_expect_it(smaller: Any) -> None:
    _, _, done = smaller
    batch = batches()[0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if OPTIMUM:
        from optimum.onnxruntime import ORTModelForSequenceClassification as Loader
    else:
        from transformers.exporters.base import ExportedModel as Loader
    torch.testing.assert_close(Loader.from_pretrained(done.path)(**inputs).logits, logits(done.path, batch))
    assert not [one for one in done.path.iterdir() if one.is_dir()]  # nothing temporary stays


@pytest.mark.skipif(not OPTIMUM, reason="the same tools on files; transformers' own exporter takes a minute for T5")
def test_both_graphs_of_an_encoder_decoder_become_int8(tmp_path: Path) -> None:
    done = export(build_t5(), tmp_path / "t5", quantize="dynamic")
    assert {one.name for one in done.path.glob("*.onnx")} == {"encoder_model.onnx", "decoder_model.onnx"}
    assert 0 < done.max_difference <= done.atol


def test_numbers_that_are_too_far_off_are_refused(smaller: Any) -> None:
    _, model, done = smaller
    graphs = [(part, open_onnx(done.path / "model.onnx")) for part in split(model, done.task)]
    batch = {name: value for name, value in batches(number=1)[0].items() if name != "labels"}
    with pytest.raises(PruningError, match=r"The int8 ONNX graph must compute .*\(atol 1e-07\), 1 batches of data"):
        check_parity(model, graphs, done.task, Bound("int8 ONNX", 1e-7), [batch])
    share = 1.01 * done.max_difference / done.atol * NUMBERS[done.quantize or done.dtype][1]
    data = NUMBERS[done.quantize or done.dtype][0].get("data", [])
    assert check_parity(model, graphs, done.task, Bound("x", None, share), data)[0] == pytest.approx(
        done.max_difference
    )
    with pytest.raises(PruningError, match="must compute what torch computes"):
        check_parity(model, graphs, done.task, Bound("x", None, share * 0.9), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onxx"}, r"format must be .*Received: 'onxx'\. Did you mean 'onnx'\?"),
        ({"format": "executorch", "quantize": "dynamic"}, r"ExecuTorch is exported in fp32.*Received: 'dynamic'"),
        ({"format": "executorch", "opset": 18}, r"no operator set\. Received: lane='auto', opset=18"),
        ({"quantize": "dynamik"}, r"quantize must be None, 'dynamic' or 'static'\. Received: 'dynamik'\. Did you mean"),
        ({"dtype": "bf16"}, r"dtype must be 'fp32' or 'fp16'\. Received: 'bf16'"),
        ({"quantize": "static"}, r"quantize='static' calibrates on data.*Received: data=None"),
        ({"quantize": "static", "data": []}, r"data must give batches.*Received: none"),
        ({"quantize": "static", "data": "train"}, r"data must give batches.*Received: 'train'"),
        ({"quantize": "dynamic", "data": [torch.zeros(2)]}, r"data must give batches"),
        ({"quantize": "dynamic", "dtype": "fp16"}, r"Either quantize or dtype.*Received: 'dynamic' and 'fp16'"),
        ({"data": batches()}, r"data is what quantize=.*Received: data, quantize=None"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(PruningError, match=message):
        export(build_bert(), tmp_path / "onnx", **settings)
    assert list(tmp_path.iterdir()) == []


def test_data_that_lacks_an_input_is_named(tmp_path: Path) -> None:
    bare = [{"attention_mask": torch.ones(2, 5, dtype=torch.long)}]
    with pytest.raises(PruningError, match=r"Each batch of data needs input_ids.*Received: attention_mask"):
        export(build_bert(), tmp_path / "onnx", quantize="static", data=bare)
    with pytest.raises(UnsupportedModelError, match=r"goes with models of one graph.*Received: 2 graphs"):
        export(build_t5(), tmp_path / "onnx", quantize="static", data=batches())
    assert list(tmp_path.iterdir()) == []


OPENVINO = {
    "fp32": ({}, 1e-5),
    "fp16": ({"dtype": "fp16"}, 0.02),
    "dynamic": ({"quantize": "dynamic"}, 0.1),
    "static": ({"quantize": "static", "data": batches(number=8)}, 0.1),
}


@pytest.mark.parametrize("name", list(OPENVINO) if OPTIMUM else ["dynamic"])  # the lanes differ in the ONNX file alone
def test_openvino_computes_what_torch_does(tmp_path: Path, name: str) -> None:
    openvino = pytest.importorskip("openvino")
    settings, share = OPENVINO[name]
    if "quantize" in settings:
        pytest.importorskip("nncf")
    model = build_bert()
    done = export(model, tmp_path / "ir", format="openvino", **settings)
    names = {one.name for one in done.path.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json"} <= names
    assert not [one for one in names if "onnx" in one or one == "export.json"]
    assert done.size_mb == sum((done.path / f"openvino_model.{end}").stat().st_size for end in ("xml", "bin")) / 1e6
    compiled = openvino.Core().compile_model(
        done.path / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for batch in batches(rows=2):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        with torch.no_grad():
            expected = model(**inputs).logits
        computed = torch.from_numpy(compiled({key: value.numpy() for key, value in inputs.items()})["logits"])
        assert float((computed - expected).abs().max()) <= share * float(expected.abs().max())
    again = export(model, done.path)  # an export in another format replaces it
    assert not [*again.path.glob("openvino*")]
    assert (again.path / "model.onnx").is_file()


@pytest.mark.skipif(OPTIMUM, reason="transformers 5 exports to ExecuTorch")
def test_executorch_computes_what_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("executorch.exir")
    model = build_bert()
    done = export(model, tmp_path / "pte", format="executorch")
    assert {one.name for one in done.path.iterdir()} == {"model.pte", "config.json", "export.json"}
    assert (done.opset, done.outputs, done.dtype) == (0, ("logits",), "fp32")
    assert done.max_difference < 1e-5
    batch = batches()[0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    computed = open_exported(done).run(feed(inputs, done.inputs))["logits"]
    with torch.no_grad():
        torch.testing.assert_close(computed, model(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "missing", "extra"),
    [
        ({"format": "openvino"}, "openvino", r"hf_prune\[openvino\]"),
        ({"format": "openvino", "quantize": "dynamic"}, "nncf", r"hf_prune\[openvino\]"),
        ({"format": "executorch"}, "executorch", r"hf_prune\[executorch\]'` with transformers 5"),
    ],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, missing: str, extra: str
) -> None:
    if missing == "nncf":
        pytest.importorskip("openvino")
    for name in [one for one in sys.modules if one.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(PruningError, match=extra):
        export(build_bert(), tmp_path / "here", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("build", "told", "words"),
    [
        (build_t5, ("onnx", "static"), "for models of one graph"),
        (build_bert, ("openvino", None), r"format='openvino' needs `pip install 'hf_prune\[openvino\]'`"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(
    build: Any, told: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PruningError, match=words):
        check_wanted(build(), *told)
