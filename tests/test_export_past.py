"""Generation with past: graphs that take a cache, of models whose layers have different numbers of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_export import SIZES, TEXT, randomize

from hf_prune import PruningError, UnsupportedModelError, export, find_groups, shrink

pytest.importorskip("onnxruntime")
OPTIMUM = transformers.__version__.startswith("4.")
PAST = "text-generation-with-past"


def build_llama() -> Any:
    config = transformers.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2, eos_token_id=2, bos_token_id=1)
    kept = {"layers.0.attention.kv_groups": [1], "layers.1.mlp.neurons": range(5, 18)}
    return shrink(randomize(transformers.LlamaForCausalLM(config)), kept)


def build_t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=60, **sizes, decoder_start_token_id=0, pad_token_id=0)
    model = randomize(transformers.T5ForConditionalGeneration(config))
    heads = [group.name for group in find_groups(model) if group.kind == "head"]
    return shrink(model, {name: [0, 3] if "cross" in name else [1] for name in heads})


@pytest.mark.parametrize("quantize", [None, "dynamic"])
def test_a_decoder_generates_with_past(tmp_path: Path, quantize: Any) -> None:
    model = build_llama()
    state = torch.get_rng_state()
    done = export(model, tmp_path / "onnx", task=PAST, quantize=quantize)
    assert OPTIMUM or torch.equal(torch.get_rng_state(), state)  # optimum draws its own inputs
    assert done.task == PAST
    assert {file.name for file in done.path.glob("*.onnx")} == (
        {"model.onnx"} if OPTIMUM else {"prefill.onnx", "decode.onnx"}
    )
    assert done.max_difference < (1e-5 if quantize is None else done.atol)
    assert done.size_mb > 0
    if OPTIMUM:
        import optimum.onnxruntime as ort

        ids = torch.tensor([[5, 9, 11]])
        told = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        loaded = ort.ORTModelForCausalLM.from_pretrained(done.path)
        if quantize is None:
            assert loaded.generate(input_ids=ids, **told).tolist() == model.generate(input_ids=ids, **told).tolist()
    again = export(model, done.path, task="text-generation")  # takes the place of the other
    assert [file.name for file in again.path.glob("*.onnx")] == ["model.onnx"]


def test_an_encoder_and_a_decoder_generate_with_past(tmp_path: Path) -> None:
    task = "text2text-generation-with-past"
    if OPTIMUM:
        assert export(build_t5(), tmp_path / "onnx", task=task).max_difference < 1e-5
        return
    with pytest.raises(UnsupportedModelError, match=r"lane 'optimum'; leave '-with-past' out .*Received: task='text2"):
        export(build_t5(), tmp_path / "onnx", task=task)


def test_wrong_numbers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_prune.exporting import verb

    def worse(file: Path) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load(str(file))
        last = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) * 1.01, last.name))
        onnx.save(model, str(file))

    monkeypatch.setattr(verb, "keep_sums_apart", worse)
    with pytest.raises(PruningError, match=r"must compute what torch computes.*2 prompts and 3 tokens after each"):
        export(build_llama(), tmp_path / "onnx", task=PAST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "settings", "rule"),
    [
        (PAST, {"format": "openvino"}, "Tasks with past are exported to ONNX"),
        ("text-classification-with-past", {}, "task must be one of .*text-generation-with-past"),
    ],
)
def test_what_has_no_past_is_refused(tmp_path: Path, task: str, settings: dict[str, Any], rule: str) -> None:
    if settings:
        pytest.importorskip("openvino")
    with pytest.raises(PruningError, match=rule):
        export(build_llama(), tmp_path / "onnx", task=task, **settings)


def test_data_that_would_not_be_read_are_refused(tmp_path: Path) -> None:
    data = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    with pytest.raises(UnsupportedModelError, match=r"data, .* goes with models of one graph.*Received: several"):
        export(build_llama(), tmp_path / "onnx", task=PAST, quantize="dynamic", data=data)


def test_a_classifier_has_no_past(tmp_path: Path) -> None:
    model = transformers.LlamaForSequenceClassification(build_llama().config)
    with pytest.raises(UnsupportedModelError, match="Past is for models that generate. Received: LlamaForSequenceCl"):
        export(model, tmp_path / "onnx", task=PAST)
