"""The whole way at once, small; and bad input, which must fail before any training and leave nothing behind."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import TINY_RECIPE, build_bert
from transformers import (
    AutoModelForImageClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

import hf_prune
from hf_prune import CheckpointError, PruningError, RecipeError, workflow
from hf_prune.job import Job, NoDropout
from hf_prune.plan import annotate
from hf_prune.run_folder import RUN, check_run_folder

TINY = [
    *TINY_RECIPE,
    "dense.epochs=2",
    "train.epochs=3",
    "schedule.frequency=4",
    "measure.repeats=3",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "tiny"
    report = hf_prune.run("quickstart", [*TINY, "export.quantize=static", f"output={output}"])
    return output, report


def test_a_recipe_gives_a_small_model_its_onnx_file_its_card_and_its_numbers(finished):
    output, report = finished
    assert report.pruned.prunable_macs <= 0.36 * report.dense.prunable_macs
    assert {"torch", "onnxruntime"} == set(report.pruned.latency_ms)
    model = AutoModelForImageClassification.from_pretrained(output / "model")
    assert sum(p.numel() for p in model.parameters()) == report.pruned.parameters
    assert model.config.pruning_config["recipe"] == "quickstart"
    model_files = ("model/README.md", "model/kept.png", "model/recipe.yaml")
    for name in (*model_files, "onnx/model.onnx", "onnx-dense/model.onnx", "report.json"):
        assert (output / name).stat().st_size > 0
    assert workflow.load_recipe(output / "model" / "recipe.yaml").name == "quickstart"
    card = (output / "model" / "README.md").read_text()
    assert "import hf_prune" in card
    assert str(output) not in card


def test_every_exported_file_stands_beside_torch(finished):
    output, report = finished
    torch_row, fp32, int8 = report.exports
    assert [row["runtime"] for row in report.exports] == ["torch", "onnxruntime", "onnxruntime"]
    assert torch_row["metrics"] == {"accuracy": report.metrics["accuracy"]["pruned"]} == fp32["metrics"]
    assert (int8["folder"], int8["quantize"], int8["dtype"]) == ("onnx-int8-static", "static", "int8")
    assert fp32["max_difference"] < 1e-4 < int8["max_difference"] <= int8["atol"]
    assert abs(int8["metrics"]["accuracy"] - fp32["metrics"]["accuracy"]) < 0.05
    assert all(row["latency_ms"] > 0 and row["size_mb"] > 0 for row in report.exports)
    card = (output / "model" / "README.md").read_text()
    for text in (report.table(), card):
        assert "ONNX Runtime, int8 static |" in text


def test_the_report_on_disk_is_the_report(finished):
    output, report = finished
    written = hf_prune.Report.from_dict(json.loads((output / "report.json").read_text()))
    assert written.kept == report.kept
    assert written.exports == report.exports
    assert written.metrics["accuracy"] == report.metrics["accuracy"]


def test_a_model_that_reloads_differently_is_an_error(finished, monkeypatch, tmp_path):
    output, _ = finished
    job = workflow.prepare(workflow.load_recipe("quickstart", [*TINY, f"output={tmp_path / 'other'}"]))
    job.pruned = AutoModelForImageClassification.from_pretrained(output / "model")

    def damaged(folder, **settings):
        model = AutoModelForImageClassification.from_pretrained(folder)
        model.classifier.bias.data += 1
        return model

    monkeypatch.setattr(workflow, "load_pruned", damaged)
    with pytest.raises(CheckpointError, match="reloaded model"):
        workflow.save_and_compare(job)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("data.label=lable", PruningError, "Did you mean 'label'?"),
        ("schedule.end=5000", PruningError, "schedule.end"),
        ("metrics=[acuracy]", PruningError, "Did you mean 'accuracy'?"),
        ("pruners.heads.include=[nowhere.*]", PruningError, "nowhere"),
        ("pruners.heads.score=tailor", PruningError, "Did you mean 'taylor'?"),
        ("pruners.heads.sparsity=0.5", PruningError, "target"),
        ("model.config.model_type=resnet", PruningError, "HeadPruner finds no groups of kind head"),
        ("model.config={hidden_size: 32}", RecipeError, "model_type"),
    ],
)
def test_bad_input_fails_before_training_and_leaves_nothing(override, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "train_dense", lambda job: pytest.fail("training began"))
    tiny = [] if override.startswith("model.config") else TINY[:4]
    if override == "model.config.model_type=resnet":
        tiny = ["model.config={}"]
    with pytest.raises(error, match=words.replace("?", r"\?")):
        hf_prune.run("quickstart", [*tiny, override, f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_or_holds_other_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "out", tmp_path):
        with pytest.raises(PruningError, match="output must be"):
            hf_prune.run("quickstart", [*TINY, f"output={output}"])
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "names", [["checkpoints"], ["dense"], ["report.json"], ["checkpoints", "dense", "report.json"]]
)
def test_a_folder_is_not_a_runs_for_the_names_in_it(names, tmp_path, monkeypatch):
    for name in names:
        (tmp_path / name).write_text('{"kept": {}, "settings": {}}') if "." in name else (tmp_path / name).mkdir()
    with pytest.raises(PruningError, match="output must be a new folder or that of an earlier run"):
        check_run_folder(tmp_path)
    (tmp_path / RUN).touch()
    check_run_folder(tmp_path)


def test_a_report_of_an_older_version_is_a_runs(tmp_path):
    (tmp_path / "report.json").write_text('{"kept": {}, "settings": {"recipe_yaml": "name: x"}}')
    check_run_folder(tmp_path)


def test_a_run_that_fails_leaves_no_figures_of_an_earlier_one(tmp_path, monkeypatch):
    """`hf-prune report` would show them beside the new log and the new models."""

    def diverged(job):
        raise PruningError("training has diverged")

    for name in ("report.json", "latency.json", "report.html"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(workflow, "prune_and_distil", diverged)
    with pytest.raises(PruningError, match="diverged"):
        workflow.make_small(SimpleNamespace(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_dropout_a_run_is_that_of_a_model_that_has_none(tmp_path):
    both = ["dense.disable_dropout=true", "train.disable_dropout=true"]
    ended = []
    for rate in (0.0, 0.4):
        drops = [f"model.config.{part}_dropout_prob={rate}" for part in ("hidden", "attention_probs")]
        quick = ["onnx=false", "measure.repeats=1", f"output={tmp_path / str(rate)}"]
        ended.append(hf_prune.run("quickstart", [*TINY, *both, *drops, *quick]))
    assert ended[0].metrics == ended[1].metrics
    assert ended[0].kept == ended[1].kept


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_dropout_is_back_behind_a_training(kind):
    rates = {"dropout": 0.4, "attention_dropout": 0.4, "activation_dropout": 0.4}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    if kind == "bert":
        model = build_bert(hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4)
    else:
        model = BartModel(BartConfig(vocab_size=60, d_model=16, pad_token_id=0, **sizes, **rates))
    words = torch.arange(3, 19).view(2, 8)

    def differ() -> bool:
        first, second = (model.train()(input_ids=words)[0] for _ in range(2))
        return not torch.equal(first, second)

    quiet = NoDropout()
    assert differ()
    quiet.on_train_begin(None, None, None, model=model)
    assert not differ()
    quiet.on_train_end()
    assert differ()


def test_the_command_ends_with_one_line_and_a_status(tmp_path):
    command = [sys.executable, "-m", "hf_prune.cli", "run", "quickstart", "pruners.heads.sparsity=50"]
    ended = subprocess.run([*command, f"output={tmp_path / 'out'}"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    *before, last = ended.stderr.strip().splitlines()  # libraries may warn when they are imported
    assert last.startswith("Error: Recipe 'quickstart': pruners.heads.sparsity")
    assert not any("Traceback" in line or "hf_prune" in line for line in before)


def test_text_from_a_local_folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    rows = [{"sentence": f"very {word} film", "label": label} for word, label in (("good", 1), ("bad", 0))] * 32
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    file = str(tmp_path / "rows.json")
    report = hf_prune.run(
        "minilm_sst2",
        [
            f"model.name={tmp_path / 'bert'}",
            "data.name=null",
            f"data.files={{train: {file}, validation: {file}}}",
            "dense={epochs: 12, batch_size: 8, learning_rate: 0.003}",
            "train={epochs: 12, batch_size: 8, learning_rate: 0.003}",
            "schedule.frequency=8",
            "measure.length=16",
            "measure.repeats=2",
            "onnx=false",
            f"output={tmp_path / 'out'}",
        ],
    )
    assert report.metrics["accuracy"]["pruned"] == 1.0
    assert torch.isclose(torch.tensor(report.settings["macs_left"]), torch.tensor(1 / 3), atol=0.05)


@pytest.mark.parametrize(
    ("name", "recorded", "base"),
    [
        ("me/own-bert", None, "me/own-bert"),
        ("local", "me/origin", "me/origin"),  # it was pruned before, and says of what
        ("local", None, "old/base"),
        (None, None, None),
    ],
)
def test_the_base_is_the_models_and_not_that_of_a_recipe_used_again(name, recorded, base, tmp_path):
    folder = tmp_path / "local"
    folder.mkdir()
    place = str(folder) if name == "local" else name
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=4, num_attention_heads=1))
    annotate(model, base_model=recorded)
    recipe = workflow.load_recipe("minilm_sst2", ["card.base_model=old/base", f"output={tmp_path / 'run'}"])
    source = {"name": place} if place else {"config": {"model_type": "bert"}}
    recipe = workflow.load_recipe(recipe, [f"model={json.dumps(source)}"])
    rows = Dataset.from_dict({})
    told = workflow._told(Job(recipe, model, None, rows, rows, None))
    assert told["base_model"] == base
