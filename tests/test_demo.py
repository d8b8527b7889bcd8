"""The page in the browser: which two models a folder means, what they answer, and that a page asks nobody else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_guessing import WORDS, save, tokenizer
from test_report_page import browser
from typer.testing import CliRunner

from hf_prune import PruningError, cli, load_pruned, save_pruned, shrink
from hf_prune.demo import load_pair, serve
from hf_prune.plan import annotate
from hf_prune.run_folder import RUN

PLAN = {"layers.0.attention.heads": [0, 3], "layers.1.mlp.neurons": [*range(8)]}
LABELS = {"id2label": {0: "neg", 1: "pos", 2: "so-so"}, "label2id": {"neg": 0, "pos": 1, "so-so": 2}}


def a_run(home: Path, made: str, config: str = "BertConfig", plan=PLAN, **settings) -> Path:
    """Write what a run leaves: a dense model and a pruned one, whose weights say something."""
    torch.manual_seed(0)
    save(home / "dense", made, config, initializer_range=0.5, **settings)
    model = shrink(load_pruned(home / "dense"), plan)
    processor = None if config == "ViTConfig" else tokenizer()
    save_pruned(model, home / "model", tokenizer=processor)
    (home / RUN).touch()
    return home


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("runs") / "reviews", "BertForSequenceClassification", **LABELS)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, **LABELS}
    return a_run(tmp_path_factory.mktemp("runs") / "digits", "ViTForImageClassification", "ViTConfig", **sizes)


# which two models
def test_a_run_holds_both_and_its_model_finds_the_run(classifier):
    for folder in (classifier, classifier / "model"):
        pair = load_pair(folder)
        assert [*pair.models] == ["dense", "pruned"]
        assert Path(pair.dense) == classifier / "dense"
        assert pair.notes == []
        assert pair.report.kept["layers.0.attention.heads"] == [0, 3]
        assert pair.report.units["layers.1.attention.heads"] == 4
        assert pair.report.pruned.parameters < pair.report.dense.parameters


def test_the_checkpoint_names_its_base(classifier, tmp_path):
    model = load_pruned(classifier / "model")
    annotate(model, base_model=str(classifier / "dense"))
    save_pruned(model, tmp_path / "alone", tokenizer=tokenizer())
    assert load_pair(tmp_path / "alone").dense == str(classifier / "dense")


def test_the_recipe_names_the_model_it_began_with_unless_it_trained_that_first(classifier, tmp_path):
    shutil.copytree(classifier / "model", tmp_path / "model")
    recipe = {"model": {"name": str(classifier / "dense")}}
    (tmp_path / RUN).touch()
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert load_pair(tmp_path).dense == str(classifier / "dense")
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "dense": {"epochs": 1}}))
    assert load_pair(tmp_path).dense is None


def test_without_its_dense_model_the_pruned_one_stands_alone(classifier, tmp_path):
    model = load_pruned(classifier / "model")
    annotate(model, base_model="nobody/nothing")
    save_pruned(model, tmp_path / "alone", tokenizer=tokenizer())
    pair = load_pair(tmp_path / "alone")
    assert [*pair.models] == ["pruned"]
    (note,) = pair.notes
    assert "was not found, so the pruned one is shown alone" in note
    assert "--dense nobody/nothing asks the Hub for it" in note
    found = pair.compare("good film", "")
    assert [*found.rows[0].cells] == ["pruned"]
    assert "-" in found.report.table()
    assert [*load_pair(tmp_path / "alone", str(classifier / "dense")).models] == ["dense", "pruned"]


@pytest.mark.parametrize(
    ("made", "settings", "reason"),
    [
        ("BertForSequenceClassification", {"num_labels": 2}, "not what this model was before"),
        ("BertModel", LABELS, "before it is fine-tuned"),
        ("BertForSequenceClassification", {**LABELS, "intermediate_size": 4}, "fewer parameters"),
    ],
)
def test_another_model_is_no_dense_one(classifier, tmp_path, made, settings, reason):
    other = save(tmp_path / "other", made, **settings)
    with pytest.raises(PruningError, match=reason):
        load_pair(classifier, other)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(PruningError, match="no folder"):
        load_pair(tmp_path / "nowhere")
    with pytest.raises(PruningError, match="without one"):
        load_pair(tmp_path)
    (tmp_path / RUN).touch()
    with pytest.raises(PruningError, match="no model yet"):
        load_pair(tmp_path)
    save(tmp_path / "t5", "T5ForConditionalGeneration", "T5Config")
    with pytest.raises(PruningError, match="Received: T5ForConditionalGeneration"):
        load_pair(tmp_path / "t5")
    save_pruned(load_pruned(save(tmp_path / "bert", "BertForMaskedLM")), tmp_path / "bare")
    with pytest.raises(PruningError, match="A tokenizer must lie beside"):
        load_pair(tmp_path / "bare")


# what they answer: as transformers' own pipelines do
def piped(pair, name: str, task: str, given, **how):
    """Return what the pipeline of transformers says, with the model of a pair."""
    part = {"image_processor" if "image" in task else "tokenizer": pair.processor}
    return transformers.pipeline(task, model=pair.models[name], device="cpu", **part)(given, **how)


@pytest.mark.parametrize(
    ("second", "given"), [("", "good film"), ("bad play", {"text": "good film", "text_pair": "bad play"})]
)
def test_texts_and_pairs(classifier, second, given):
    pair = load_pair(classifier)
    rows = pair.compare("good film", second).rows
    for name in ("dense", "pruned"):
        said = {row.what: row.cells[name].share for row in rows}
        expected = piped(pair, name, "text-classification", given, top_k=None)
        assert said == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-5)
    assert rows[0].cells["dense"].share == max(row.cells["dense"].share for row in rows)


@pytest.mark.parametrize(
    ("settings", "function"),
    [({"problem_type": "multi_label_classification", **LABELS}, "sigmoid"), ({"num_labels": 1}, "none")],
)
def test_several_classes_and_numbers(tmp_path, settings, function):
    pair = load_pair(a_run(tmp_path, "BertForSequenceClassification", **settings))
    rows = pair.compare("good film", "").rows
    how = {"top_k": None, "function_to_apply": function}
    expected = [one["score"] for one in piped(pair, "pruned", "text-classification", "good film", **how)]
    said = [row.cells["pruned"].share or float(row.cells["pruned"].said) for row in rows]
    assert sorted(said) == pytest.approx(sorted(expected), abs=1e-4)


def test_words(tmp_path):
    pair = load_pair(a_run(tmp_path, "BertForTokenClassification", **LABELS))
    rows = pair.compare("Ada in Rome").rows
    assert [row.what for row in rows] == ["Ada", "in", "Rome"]
    expected = piped(pair, "pruned", "token-classification", "Ada in Rome", ignore_labels=[])
    expected = [one for one in expected if one["word"] not in ("[CLS]", "[SEP]")]
    assert [row.cells["pruned"].said for row in rows] == [one["entity"] for one in expected]
    assert [row.cells["pruned"].share for row in rows] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert [row.differs for row in rows] == [row.cells["dense"].said != row.cells["pruned"].said for row in rows]


def test_masks(tmp_path):
    pair = load_pair(a_run(tmp_path, "BertForMaskedLM"))
    with pytest.raises(PruningError, match=re.escape("must have [MASK]")):
        pair.compare("good film")
    rows = pair.compare("good [MASK] in Rome").rows
    expected = {one["token_str"]: one["score"] for one in piped(pair, "dense", "fill-mask", "good [MASK] in Rome")}
    said = {row.what: row.cells["dense"].share for row in rows}
    assert {what: said[what] for what in expected} == pytest.approx(expected, abs=1e-5)
    assert any(row.what.endswith(", word 2") for row in pair.compare("[MASK] in [MASK]").rows)


def test_language(tmp_path):
    pair = load_pair(a_run(tmp_path, "LlamaForCausalLM", "LlamaConfig", plan={"layers.0.mlp.neurons": [1, 2]}))
    first, *rest = pair.compare("good film").rows
    how = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    for name in ("dense", "pruned"):
        (expected,) = piped(pair, name, "text-generation", "good film", **how)
        assert first.cells[name].said.strip() == expected["generated_text"].strip()  # 4.57 leaves the space before
    assert {row.what for row in rest} <= {f"next: {word!r}" for word in WORDS}
    assert 0 < sum(row.cells["dense"].share for row in rest) <= 1.0001


def test_grey_images_of_a_model_without_a_processor(vit):
    pair = load_pair(vit)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    rows = pair.compare(Image.fromarray(pixels).convert("RGB")).rows
    with torch.no_grad():
        logits = pair.models["pruned"](torch.tensor(pixels / 127.5 - 1, dtype=torch.float32)[None, None]).logits
    expected = dict(zip(LABELS["id2label"].values(), logits[0].softmax(-1).tolist()))
    assert {row.what: row.cells["pruned"].share for row in rows} == pytest.approx(expected, abs=1e-4)
    assert pair.example().mode == "L"
    with pytest.raises(PruningError, match="must be an image"):
        pair.compare(None)


def test_images_of_a_model_with_its_processor(tmp_path):
    home = a_run(tmp_path, "ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **LABELS)
    made = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    made(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(home / "dense")
    pair = load_pair(home)
    expected = piped(pair, "pruned", "image-classification", pair.example())
    said = {row.what: row.cells["pruned"].share for row in pair.compare(pair.example()).rows}
    assert said == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-4)


def test_both_are_timed_on_this_input(classifier):
    report = load_pair(classifier).compare("good film in Rome", "").report
    assert report.dense.latency_ms["torch"] > 0
    assert report.pruned.latency_ms["torch"] > 0
    assert (report.dense.length, report.pruned.length) == (6, 6)
    assert re.search(r"latency in torch, ms \(1 x 6 tokens, 1 thread\).*x speed", report.table())


def test_long_texts_are_cut_to_what_the_model_reads(classifier):
    assert load_pair(classifier).compare("good film " * 40, "").report.pruned.length == 32


# the page
@pytest.fixture(scope="module")
def served(classifier):
    pytest.importorskip("gradio", reason="the extra demo has it")
    blocks, address = serve(load_pair(classifier))
    yield address
    blocks.close()


def test_the_page_answers(served):
    from gradio_client import Client

    client = Client(served, verbose=False, analytics_enabled=False)
    answers, costs = client.predict("good <b>film</b>", "bad play", api_name="/compare")
    assert re.findall(r"<th>(\w*)</th>", answers) == ["", "dense", "pruned"]
    shares = [float(one) for one in re.findall(r"([\d.]+)%<", answers)]
    assert len(shares) == 6
    assert sum(shares) == pytest.approx(200, abs=0.5)
    assert "x speed" in costs
    assert "size, MB" in costs
    with pytest.raises(Exception, match="There must be a text"):
        client.predict(" ", "", api_name="/compare")


def test_an_image_is_sent_and_answered(vit):
    pytest.importorskip("gradio", reason="the extra demo has it")
    from gradio_client import Client, handle_file

    blocks, address = serve(load_pair(vit))
    try:
        file = vit / "picture.png"
        load_pair(vit).example().save(file)
        answers, _ = Client(address, verbose=False).predict(handle_file(str(file)), api_name="/compare")
    finally:
        blocks.close()
    assert answers.count("so-so") == 1


QUIET = ("background-networking", "component-update", "default-apps", "domain-reliability", "sync")


def chromium(address: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser that can reach this machine alone, and calls nobody on its own account."""
    told = [f"--user-data-dir={home / 'profile'}", "--headless=new", "--no-sandbox", "--hide-scrollbars"]
    told += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr", "--no-first-run"]
    told += ["--virtual-time-budget=15000", *(f"--disable-{one}" for one in ("gpu", *QUIET)), *options]
    return subprocess.run([browser(), *told, address], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 500)])
def test_chromium_shows_it_and_asks_no_other_host(served, tmp_path, theme, width):
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    options = [f"--window-size={width},1400", f"--screenshot={shot}", "--dump-dom", f"--log-net-log={log}"]
    done = chromium(f"{served}?__theme={theme}", tmp_path, *options)
    for words in ("Compare", "so-so", "x speed", "attention.heads: 6 of 8 kept", "<svg"):
        assert words in done.stdout, words
    assert "Content Security Policy" not in done.stderr  # the page has not even tried
    told = [event.get("params", {}) for event in json.loads(log.read_text("utf-8"))["events"]]
    asked = {one["url"] for one in told if "url" in one and one.get("initiator", "").startswith(("http", "null"))}
    assert len(asked) > 10
    assert [one for one in asked if not one.startswith((served, "data:", "blob:"))] == []
    pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=float) / 255
    assert (np.median(pixels.mean(2)) < 0.3) == (theme == "dark")
    assert np.ptp(pixels, axis=2).max() > 0.3  # coloured: what was kept
    assert (np.abs(pixels.mean(2) - np.median(pixels.mean(2))) > 0.5).mean() > 0.004  # text stands out


# the command
def test_missing_gradio_names_the_extra(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(cli.app, ["demo", str(classifier)])
    assert isinstance(done.exception, PruningError)
    assert "pip install 'hf_prune[demo]'" in str(done.exception)


def test_a_port_that_is_taken_is_refused(served, classifier):
    port = int(served.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(PruningError, match="--port must be a free one"):
        serve(load_pair(classifier), port=port)
