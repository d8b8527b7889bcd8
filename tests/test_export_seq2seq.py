"""ONNX of models with an encoder and a decoder: two graphs that compute together what torch computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import randomize

from hf_prune import PruningError, UnsupportedModelError, export_onnx, find_groups, save_pruned, shrink
from hf_prune.exporting import OnnxExport, onnx_session

pytest.importorskip("onnxruntime")
OPTIMUM = transformers.__version__.startswith("4.")
TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}


def build_t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return randomize(transformers.T5ForConditionalGeneration(transformers.T5Config(**TOKENS, **sizes)))


def build_bart() -> Any:
    config = transformers.BartConfig(**TOKENS, **LAYERS, **WIDTHS, max_position_embeddings=40)
    return randomize(transformers.BartForConditionalGeneration(config))


def build_whisper() -> Any:
    speech = {"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 40}
    config = transformers.WhisperConfig(**TOKENS, **LAYERS, **WIDTHS, **speech)
    return randomize(transformers.WhisperForConditionalGeneration(config))


BUILD = {"t5": build_t5, "bart": build_bart, "whisper": build_whisper}


def cut_unevenly(model: Any) -> Any:
    """Leave each attention another number of heads, and each feed-forward block another width."""
    heads, neurons = find_groups(model, kinds=["head"]), find_groups(model, kinds=["neuron"])
    assert len(heads) > 1
    plan = {group.name: range(1 + i % 3) for i, group in enumerate(heads)}
    return shrink(model, {**plan, **{group.name: range(5 + i) for i, group in enumerate(neurons)}})


@pytest.fixture(scope="module", params=list(BUILD))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, OnnxExport]:
    model = cut_unevenly(BUILD[request.param]())
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "here")


def run(result: OnnxExport, name: str, **inputs: torch.Tensor) -> torch.Tensor:
    session = onnx_session(result.path / f"{name}.onnx")
    fed = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
    return torch.from_numpy(session.run(None, fed)[0])


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length", "written"), [(1, 5, 1), (4, 31, 7)])
def test_both_graphs_compute_what_the_model_does(exported: Any, batch: int, length: int, written: int) -> None:
    model, result = exported
    ids, mask = torch.randint(3, 60, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[1:, -3:] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    speech = {"input_features": torch.randn(batch, 8, 60)}
    read = speech if model.main_input_name == "input_features" else text
    begun = torch.randint(3, 60, (batch, written))
    expected = model(**read, decoder_input_ids=begun).logits
    hidden = run(result, "encoder_model", **read)
    given = {"input_ids": begun, "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    torch.testing.assert_close(run(result, "decoder_model", **given), expected, atol=1e-5, rtol=0)


def test_the_result_says_what_was_written(exported: Any) -> None:
    model, result = exported
    speech = model.main_input_name == "input_features"
    assert result.task == ("automatic-speech-recognition" if speech else "text2text-generation")
    assert {"input_ids", "encoder_hidden_states", model.main_input_name} <= {*result.inputs}
    assert result.outputs == ("last_hidden_state", "logits")
    assert 0 < result.max_difference < 1e-5
    assert result.size_mb == sum(file.stat().st_size for file in result.path.glob("*.onnx*")) / 1e6
    assert {file.name for file in result.path.glob("*.onnx")} == {"encoder_model.onnx", "decoder_model.onnx"}
    for file in result.path.iterdir():
        assert b"site-packages" not in file.read_bytes()
        assert str(result.path.parent).encode() not in file.read_bytes()


def test_the_folder_loads_where_users_expect_it(exported: Any) -> None:
    model, result = exported
    if not OPTIMUM:
        from transformers.exporters.base import ExportedModel

        assert [*ExportedModel.from_pretrained(result.path).components] == ["encoder_model", "decoder_model"]
        return
    if model.main_input_name == "input_features":
        return  # its generation wants a feature extractor
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    loaded = ORTModelForSeq2SeqLM.from_pretrained(result.path, use_cache=False)
    ids = torch.randint(3, 60, (2, 9))
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **asked), model.generate(ids, **asked))


@pytest.mark.skipif(not OPTIMUM, reason="optimum needs transformers 4")
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_optimum_exports_a_pruned_folder_itself_with_past(name: str, tmp_path: Path) -> None:
    """Each layer's cache has the heads that its layer has left."""
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    model = cut_unevenly(BUILD[name]())
    save_pruned(model, tmp_path / "m")
    loaded = ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "m", export=True)
    assert loaded.can_use_cache
    ids = torch.randint(3, 60, (2, 9))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **asked), model.generate(ids, **asked))


def test_only_what_both_graphs_pass_is_written(tmp_path: Path) -> None:
    model = build_bart()
    with pytest.raises(PruningError, match="Whisper"):
        export_onnx(model, tmp_path / "onnx", task="automatic-speech-recognition")
    with pytest.raises(UnsupportedModelError, match="Received: BartForConditionalGeneration for text-classification"):
        export_onnx(model, tmp_path / "onnx", task="text-classification")
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(PruningError, match="largest difference nan"):
        export_onnx(model, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
