"""ONNX export: what torch computes, at shapes other than the exported ones, for models that were cut unevenly."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_prune import PruningError, UnsupportedModelError, export, export_onnx, find_groups, save_pruned, shrink
from hf_prune.exporting import OnnxExport, onnx_session
from hf_prune.exporting.publishing import export_folder

pytest.importorskip("onnxruntime")
EXPORTER = "optimum" if transformers.__version__.startswith("4.") else "native"
TEXT = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def randomize(model: Any) -> Any:
    """Draw every tensor at random, norms and biases too: fresh ones hide wrong cuts."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return model


def build_bert(head: str = "ForSequenceClassification", **changes: Any) -> Any:
    config = transformers.BertConfig(**{**TEXT, **SIZES, **changes})
    return randomize(getattr(transformers, f"Bert{head}")(config))


def build_vit(layers: int = 2) -> Any:
    sizes = {**SIZES, "num_hidden_layers": layers}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_channels=1, num_labels=5)
    return randomize(transformers.ViTForImageClassification(config))


def build_llama() -> Any:
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2)))


BUILD: dict[str, Callable[[], Any]] = {"bert": build_bert, "vit": build_vit, "llama": build_llama}
UNEVEN = {
    "bert": {"layers.0.attention.heads": [0, 2, 3], "layers.1.attention.heads": [1]},
    "vit": {"layers.0.attention.heads": [3], "layers.1.attention.heads": [0, 1]},
    "llama": {"layers.0.attention.kv_groups": [1]},
}
NEURONS = {"layers.0.mlp.neurons": range(0, 24, 3), "layers.1.mlp.neurons": range(5, 18)}
ORT_CLASS = {
    "bert": "ORTModelForSequenceClassification",
    "vit": "ORTModelForImageClassification",
    "llama": "ORTModelForCausalLM",
}


def draw_inputs(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Draw inputs without the code under test; in each text but the first, three tokens are padding."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 1, 16, 16)}
    ids = torch.randint(1, 60, (batch, length))
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    if model.config.model_type == "llama":
        return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(length).repeat(batch, 1)}
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(2, ids.shape)}


def run_torch(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval().float()(**inputs).logits


def run_onnx(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    feed = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(onnx_session(folder).run(["logits"], feed)[0])


@pytest.fixture(scope="module", params=list(BUILD))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, OnnxExport]:
    """Return a family's name, its unevenly cut model, and what exporting that model gave."""
    model = shrink(BUILD[request.param](), {**UNEVEN[request.param], **NEURONS})
    assert len({group.units for group in find_groups(model) if group.kind == "head"}) == 2
    return request.param, model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "made" / "here")


@pytest.mark.parametrize("quantize", [None, "dynamic"])
def test_onnxruntime_does_not_fuse_sums_with_norms(tmp_path, quantize):
    import onnx
    import onnxruntime

    done = export(build_bert(), tmp_path / "onnx", quantize=quantize)
    (file,) = done.path.glob("*.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(str(tmp_path / "run.onnx"), load_external_data=False).graph.node]
    norms = 2 * SIZES["num_hidden_layers"] + 1  # and the embeddings'
    assert (run.count("LayerNormalization"), run.count("SkipLayerNormalization")) == (norms, 0)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (4, 31)])
def test_an_uneven_model_computes_the_same_at_any_shape(exported: Any, batch: int, length: int) -> None:
    _, model, result = exported
    inputs = draw_inputs(model, batch, length)
    assert result.inputs == tuple(inputs)
    torch.testing.assert_close(run_onnx(result.path, inputs), run_torch(model, inputs), atol=1e-5, rtol=0)


def test_the_result_says_what_was_written(exported: Any) -> None:
    family, _, result = exported
    task = {"bert": "text-classification", "vit": "image-classification", "llama": "text-generation"}[family]
    assert (result.lane, result.task, result.outputs, result.atol) == (EXPORTER, task, ("logits",), 1e-4)
    assert 0 < result.max_difference < 1e-5
    assert result.opset >= 14
    files = {file.name: file.stat().st_size for file in result.path.iterdir()}
    assert result.size_mb == sum(size for name, size in files.items() if name.startswith("model.onnx")) / 1e6
    assert "config.json" in files
    assert [file.name for file in result.path.parent.iterdir()] == ["here"]  # nothing temporary stays


def test_the_graph_holds_no_paths_of_this_machine(exported: Any) -> None:
    _, _, result = exported
    for file in result.path.iterdir():
        assert b"site-packages" not in file.read_bytes()
        assert str(result.path.parent).encode() not in file.read_bytes()


def test_the_folder_loads_where_users_expect_it(exported: Any) -> None:
    family, model, result = exported
    inputs = draw_inputs(model, 3, 7)
    if EXPORTER == "optimum":
        import optimum.onnxruntime as ort

        settings = {"use_cache": False} if family == "llama" else {}
        loaded = getattr(ort, ORT_CLASS[family]).from_pretrained(result.path, **settings)
    else:
        from transformers.exporters.base import ExportedModel

        loaded = ExportedModel.from_pretrained(result.path)
    torch.testing.assert_close(loaded(**inputs).logits, run_torch(model, inputs), atol=1e-5, rtol=0)


def test_a_pruned_folder_is_exported_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "film": 2}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    model = build_bert(num_hidden_layers=1)
    shrink(model, {"layers.0.mlp.neurons": [0, 5, 7], "layers.0.attention.heads": [2]})
    save_pruned(model, tmp_path / "small", tokenizer=tokenizer)
    result = export_onnx(str(tmp_path / "small"), tmp_path / "onnx")
    inputs = draw_inputs(model, 2, 9)
    torch.testing.assert_close(run_onnx(result.path, inputs), run_torch(model, inputs), atol=1e-5, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "onnx")("good film")["input_ids"] == [1, 2]
    assert "ONNX parity: largest difference" in capsys.readouterr().out


def test_the_callers_model_stays_as_it_was(tmp_path: Path) -> None:
    model = build_vit(layers=1).to(torch.bfloat16).train()
    model.config.output_hidden_states = True
    config, weights = model.config.to_dict(), copy.deepcopy(model.state_dict())
    result = export_onnx(model, tmp_path / "onnx", tokenizer=transformers.ViTImageProcessor())
    assert model.training
    assert model.config.to_dict() == config
    torch.testing.assert_close(model.state_dict(), weights, atol=0, rtol=0)
    assert result.outputs == ("logits",)
    assert transformers.AutoConfig.from_pretrained(result.path).architectures == ["ViTForImageClassification"]
    assert (result.path / "preprocessor_config.json").exists()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one mixed precision for a process: neither take it from another test nor leave it to one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_prepared_by_accelerate_is_exported_in_full_precision(tmp_path: Path) -> None:
    import accelerate

    model = build_vit(layers=1)
    inputs = draw_inputs(model, 2, 0)
    expected = run_torch(model, inputs)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    prepared = accelerate.dispatch_model(prepared, {"": "cpu"}, force_hooks=True)
    result = export_onnx(prepared, tmp_path / "onnx")
    torch.testing.assert_close(run_onnx(result.path, inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("head", "task", "outputs"),
    [
        ("ForQuestionAnswering", "question-answering", ("start_logits", "end_logits")),
        ("Model", "feature-extraction", ("last_hidden_state",)),
    ],
)
def test_the_task_comes_from_the_model_class(tmp_path: Path, head: str, task: str, outputs: tuple[str, ...]) -> None:
    result = export_onnx(build_bert(head, num_hidden_layers=1), tmp_path / "onnx")
    assert result.task == task
    assert result.outputs[: len(outputs)] == outputs


def test_a_model_that_optimum_looks_for_a_processor_of_needs_none(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 8, "image_size": 16}
    done = export_onnx(
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes, num_channels=1)), tmp_path / "onnx"
    )
    assert done.max_difference < 1e-4


def test_padding_tokens_behind_the_table_of_positions(tmp_path: Path) -> None:
    """GPT-2 pads with its last token, 50256, and its positions count from 0: RoBERTa's count from behind padding."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=39)
    assert export_onnx(GPT2ForSequenceClassification(config).eval(), tmp_path / "onnx").max_difference < 1e-5


def test_only_an_export_that_passed_replaces_what_was_there(tmp_path: Path) -> None:
    model, output = build_vit(layers=1), tmp_path / "onnx"
    with pytest.raises(PruningError, match=r"largest difference .* \(atol 0\), 2 shapes"):
        export_onnx(model, output, atol=0.0)
    assert list(tmp_path.iterdir()) == []

    export_onnx(model, output)
    (output / "NOTES.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(PruningError, match="largest difference nan"):
        export_onnx(model, output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before

    model.classifier.bias.data[0] = 3.0
    result = export_onnx(model, output, opset=18)
    inputs = draw_inputs(model, 2, 0)
    torch.testing.assert_close(run_onnx(output, inputs), run_torch(model, inputs), atol=1e-5, rtol=0)
    assert result.opset == 18
    assert {file.name for file in output.iterdir()} == set(before)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PruningError, match=r"folder that can be written\. Received: .*here"):
        export_onnx(build_bert(), tmp_path / "file" / "deep" / "here")
    with pytest.raises(PruningError, match="folder that can be written"):
        export_onnx(build_bert(), tmp_path / "file")


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_pruned(build_bert(), tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PruningError, match=r"earlier export.*Did you mean"):
        export_onnx(str(tmp_path), tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "int8"}, "dtype must be 'fp32'.* Received: 'int8'"),
        ({"lane": "optimun"}, "lane must be .* Received: 'optimun'. Did you mean 'optimum'?"),
        ({"task": "text-clasification"}, "Did you mean 'text-classification'?"),
        ({"opset": 3}, "opset"),
        ({"opset": "18"}, "opset must be a whole number or None. Received: '18'"),
        ({"atol": "small"}, "atol must be a number of at least 0. Received: 'small'"),
        ({"atol": float("nan")}, "atol must be a number of at least 0. Received: nan"),
        ({"tokenizer": 3}, "tokenizer must be a tokenizer or a processor. Received: 3"),
        ({"task": None}, "task must be a name. Received: None"),
        ({"lane": 5}, "lane must be a name. Received: 5"),
    ],
)
def test_unknown_settings_are_named(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        export_onnx(build_vit(layers=1), tmp_path / "onnx", **setting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["nowhere", Path("nowhere"), "no/where", "", None, 3, transformers.BertModel])
def test_what_is_no_model_is_named(tmp_path: Path, model: Any) -> None:
    with pytest.raises(PruningError, match=r"model_or_path must be a model.*Received: |nowhere"):
        export_onnx(model, tmp_path / "deep" / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [None, 3, "", ["onnx"]])
def test_what_is_no_folder_is_named(output: Any) -> None:
    with pytest.raises(PruningError, match=r"output must be the name of a folder\. Received: "):
        export_onnx(build_bert(), output)


def texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def write_half(output: Path) -> None:
    before = texts(output)
    with export_folder(output.absolute()) as folder:
        (folder / "model.onnx").write_text("half")
        assert texts(output) == before
        raise KeyboardInterrupt


def test_an_export_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier export of other graphs leaves as the new one comes; in the current folder and under it alike."""
    monkeypatch.chdir(tmp_path)
    for output in (Path("onnx"), Path()):
        with export_folder(output.absolute()) as folder:
            for name in ("encoder_model.onnx", "decoder_model.onnx", "decoder_model.onnx.data", "config.json"):
                (folder / name).write_text("old")
        (output / "NOTES.md").write_text("mine")
        before = texts(output)
        with pytest.raises(KeyboardInterrupt):
            write_half(output)
        assert texts(output) == before
        with export_folder(output.absolute()) as folder:
            (folder / "model.onnx").write_text("new")
            (folder / "config.json").write_text("new")
        assert texts(output) == {"model.onnx": "new", "config.json": "new", "NOTES.md": "mine"}
        if output != Path():
            shutil.rmtree(output)


@pytest.mark.parametrize("lane", ["auto", "optimum", "native"])
def test_without_an_exporter_the_extras_are_named(tmp_path: Path, monkeypatch: Any, lane: Any) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx.convert", None)
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_onnx", None)
    with pytest.raises(PruningError, match=r"hf_prune\[onnx\].*hf_prune\[optimum\]"):
        export_onnx(build_vit(), tmp_path / "onnx", lane=lane)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    t5 = transformers.T5Model(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    for model in (t5, torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match=r"Received: (T5Model|Linear)"):
            export_onnx(model, tmp_path / "onnx")
    with pytest.raises(PruningError, match="Received: auto, for BertForPreTraining"):
        export_onnx(build_bert("ForPreTraining"), tmp_path / "onnx")
    with pytest.raises(UnsupportedModelError, match="Received: BertModel for text2text-generation"):
        export_onnx(build_bert("Model"), tmp_path / "onnx", task="text2text-generation")
    assert list(tmp_path.iterdir()) == []
