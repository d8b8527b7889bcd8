"""The page about a run: what stands in it, that it needs nothing from outside, and how it looks, light and dark."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from models import build_bert
from test_report import measurement
from typer.testing import CliRunner

from hf_prune import PruningError, Report, cli, save_pruned, shrink
from hf_prune.page import read_run, write_page
from hf_prune.report import measure_grid
from hf_prune.training_log import TrainingLog

KEPT = {"layers.0.attention.heads": [0, 2], "layers.1.mlp.neurons": [*range(8)]}
UNITS = {f"layers.{layer}.{place}": units for layer in range(2) for place, units in
         (("attention.heads", 4), ("mlp.neurons", 64))}  # fmt: skip
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What a page is made of: its text, its tags, and whatever could fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.fetched, self.open = [], [], [], []
        self.feed(html)
        self.close()
        self.said = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        self.fetched += [value for name, value in attrs if name.endswith(("href", "src"))]
        self.fetched += [value for name, value in attrs if value and "url(" in value and "url(#" not in value]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open += [] if tag in VOID else [self.open.pop()][:0]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read_page(path: Path) -> Page:
    page = Page(path.read_text("utf-8"))
    assert page.open == []
    return page


def write_report(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"recipe": "tiny", "recipe_yaml": "name: tiny\nseed: 7\n", "command": "hf-prune run tiny", "seed": 7,
                "hardware": "a slow machine", "versions": {"torch": "9.9", "date": "2031-01-02"}}  # fmt: skip
    figures = {"dense": measurement(1), "pruned": measurement(0.5), "settings": settings}
    metrics = {"loss": {"dense": 0.1, "pruned": 0.2}, "accuracy": {"dense": 0.9, "pruned": 0.88}}
    report = Report(**{"kept": KEPT, "units": UNITS, "metrics": metrics, **figures, **changes})
    (folder / "report.json").write_text(json.dumps(report.to_dict()))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Everything that a run can leave."""
    folder = write_report(tmp_path_factory.mktemp("runs") / "whole")
    dense, pruned = build_bert(), shrink(build_bert(), KEPT)
    save_pruned(dense, folder / "dense")
    save_pruned(pruned, folder / "model")
    log = TrainingLog(folder / "checkpoints" / "pruning_log.csv")
    for step in (10, 20):
        log.add({"step": step, "loss": 1 / step, "sparsity": step / 40, "macs_left": 0.5, "eval_accuracy": 0.8})
    grid = measure_grid({"dense": dense, "model": pruned}, batches=[1, 3], lengths=[5], repeats=1)
    (folder / "latency.json").write_text(json.dumps(grid.to_dict()))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(bytes(2_000_000))
    return folder


def test_a_page_tells_everything_and_fetches_nothing(run, tmp_path):
    path, pictures = write_page([run], tmp_path / "new" / "page.html")
    page = read_page(path)
    for words in ("0.8800", "-0.0200 against dense 0.9000", "2.00x", "ONNX Runtime, batch 8 x 128 tokens, 1 thread",
                  "attention.heads: 6 of 8 kept (75%)", "mlp.neurons: 72 of 128 kept (56%)", "Weights before and after",
                  "PyTorch, 3 x 5 tokens", "90th percentile", "seed: 7", "hf-prune run tiny", "a slow machine", "9.9",
                  "onnx ONNX 2.00"):  # fmt: skip
        assert words in page.said, words
    assert "script" not in page.tags
    assert [one for one in page.fetched if not one.startswith(("#", "data:image/png;base64,"))] == []
    assert "@import" not in path.read_text()
    assert page.tags.count("svg") == len(pictures) == 6
    assert {one.suffix for one in pictures} == {".png"}
    assert all(one.parent == tmp_path / "new" / "page_pictures" and one.stat().st_size for one in pictures)


def test_what_a_run_lacks_is_left_out(tmp_path):
    folder = write_report(tmp_path / "bare", settings={}, dense=None)
    (folder / "latency.json").write_text("")  # of a redirected command that failed
    said = read_page(write_page([folder])[0]).said
    assert "What was kept" in said
    for title in ("How it was trained", "Weights before and after", "Saved and exported", "What was done", "speed-up"):
        assert title not in said


@pytest.mark.parametrize("layers", [1, 48])
def test_few_and_many_layers(layers, tmp_path):
    places = {"attention.heads": 16, "mlp.neurons": 4096, "experts.0.neurons": 8, "experts.1.neurons": 8}
    units = {f"layers.{layer}.{place}": number for layer in range(layers) for place, number in places.items()}
    kept = {"layers.0.attention.heads": [], "layers.0.mlp.neurons": [], "layers.0.experts.1.neurons": [3]}
    folder = write_report(tmp_path / "run", units=units, kept=kept)
    path, pictures = write_page([folder])
    assert [one.stem for one in pictures][:3] == ["kept-attention.heads", "kept-mlp.neurons", "kept-experts.neurons"]
    assert f"experts.neurons: {16 * layers - 7} of {16 * layers} kept" in read_page(path).said
    assert path.stat().st_size < 600_000


def test_names_and_settings_of_a_stranger_are_text(tmp_path):
    evil = "<script>alert(1)</script>$x^$"
    told = {"recipe_yaml": evil, "command": evil, "hardware": [evil], "seed": {"a": 1}, "versions": {evil: evil}}
    folder = write_report(tmp_path / "a$b$<i>", settings=told, units={**UNITS, evil: 3}, kept={evil: [1]})
    (folder / "pruning_log.csv").write_text(f"step,loss,eval_{evil}\n1,nan,1\n2,0.5,2\nx,1,1\n3,0.25,2,9\n")
    other = write_report(tmp_path / "plain")
    page = read_page(write_page([folder, other], tmp_path / "page.html")[0])
    assert not {"script", "i"} & set(page.tags)
    assert "a$b$<i>" in page.said
    assert evil in page.said


def test_several_runs_have_names_of_their_own_and_a_common_picture(run, tmp_path):
    others = [write_report(tmp_path / name / "whole") for name in ("first", "second")]
    path, pictures = write_page([run, *others, others[0]], tmp_path / "all.html")
    page = read_page(path)
    assert "4 pruning runs" in page.said
    assert "accuracy over measured speed-up" in page.said
    for name in (f"{run.parent.name}/whole", "first/whole", "first/whole (2)", "second/whole"):
        assert name in page.said
    assert {"#run-1", "#run-4"} <= set(page.fetched)
    assert len(set(pictures)) == len(pictures)
    assert tmp_path / "all_pictures" / "runs.png" in pictures


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (None, "no folder"),
        ({}, "a folder without one"),
        ({"pruning_log.csv": "step\n1\n"}, "whose run has not ended"),
        ({"report.json": "[1]"}, "must hold a mapping"),
        ({"report.json": "{"}, "must be a JSON file"),
        ({"report.json": '{"results": 3}'}, "must say what was kept, scored or counted"),
    ],
)
def test_a_folder_that_is_no_run_is_named_and_nothing_is_written(files, why, tmp_path):
    folder, good = tmp_path / "folder", write_report(tmp_path / "good")
    if files is not None:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(PruningError, match=why):
        write_page([good, folder], tmp_path / "page.html")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder"] * (files is not None) + ["good"]


def test_only_our_own_page_is_replaced(tmp_path):
    folder = write_report(tmp_path / "run")
    mine = tmp_path / "index.html"
    mine.write_text("<html>mine</html>")
    with pytest.raises(PruningError, match=r"index\.html', which is neither"):
        write_page([folder], mine)
    with pytest.raises(PruningError, match="a folder"):
        write_page([folder], tmp_path)
    assert mine.read_text() == "<html>mine</html>"
    assert write_page([folder])[0] == write_page([folder])[0] == folder / "report.html"
    assert write_page([folder], tmp_path / "page")[0] == tmp_path / "page.html"


def test_the_command(tmp_path):
    folder = write_report(tmp_path / "run")
    done = CliRunner().invoke(cli.app, ["report", str(folder), "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 0
    assert "page.html" in done.output
    assert (tmp_path / "page_pictures" / "latency.png").is_file()


def test_a_search_stands_for_its_trials(tmp_path):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "search.json").write_text("{}")
    with pytest.raises(PruningError, match="a search of which a trial has ended"):
        write_page([tmp_path / "found"])
    for name in ("0", "1"):
        write_report(tmp_path / "found" / "trials" / name)
    page, pictures = write_page([tmp_path / "found"])
    assert page == tmp_path / "found" / "report.html"
    assert "2 pruning runs" in read_page(page).said
    assert tmp_path / "found" / "report_pictures" / "runs.png" in pictures


def test_a_time_that_was_aimed_at_is_told(tmp_path):
    times = {"dense_ms": 9.0, "asked_ms": 4.5, "predicted_ms": 4.321, "measured_ms": 4.4321}
    said = read_page(write_page([write_report(tmp_path / "run", settings=times)])[0]).said
    assert "4.432 ms asked for 4.5 ms; the table predicted 4.321 ms" in said


def test_each_file_has_its_own_latency(tmp_path):
    """int8 that was exported later was not timed: it has none, and not that of the fp32 file."""
    timed = {
        name: replace(measurement(1), latency_ms={"torch": ms, "onnxruntime": ms / 2})
        for name, ms in (("dense", 8.0), ("pruned", 5.0))
    }
    exports = [{"runtime": "torch", "latency_ms": 7.0}, {"runtime": "onnxruntime", "folder": "more", "latency_ms": 3.0}]
    folder = write_report(tmp_path / "run", exports=exports, **timed)
    for name in ("int8", "onnx", "onnx-dense", "more"):
        (folder / name).mkdir()
        (folder / name / "model.onnx").write_bytes(b"0" * 10000)
    said = read_page(write_page([folder])[0]).said
    assert "onnx-dense ONNX 0.01 4 int8 ONNX 0.01 more ONNX 0.01 3 onnx ONNX 0.01 2.5" in said, said


def test_a_file_that_export_alone_asked_for_has_its_latency(tmp_path):
    """`onnx: false` with `export: {format: onnx}`: no pair of files was timed, but this one was."""
    exports = [{"runtime": "torch", "latency_ms": 7.0}, {"runtime": "onnxruntime", "folder": "onnx", "latency_ms": 3.0}]
    timed = {name: replace(measurement(1), latency_ms={"torch": 8.0}) for name in ("dense", "pruned")}
    folder = write_report(tmp_path / "run", exports=exports, **timed)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"0" * 10000)
    assert "onnx ONNX 0.01 3" in read_page(write_page([folder])[0]).said


def test_metrics_of_evaluations_are_in_the_log(tmp_path):
    folder = write_report(tmp_path / "run")
    (folder / "pruning_log.csv").write_text("step,loss,eval_accuracy\n10,0.5,\n10,,0.25\n20,0.4,\n20,,0.75\n")
    assert read_run(folder).log == [
        {"step": 10, "loss": 0.5}, {"step": 10, "eval_accuracy": 0.25},
        {"step": 20, "loss": 0.4}, {"step": 20, "eval_accuracy": 0.75},
    ]  # fmt: skip
    assert "Training" in read_page(write_page([folder])[0]).said


# --- in a browser ---


def browser() -> str:
    """Return a Chromium that is at hand; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [one for name in names if (one := shutil.which(name))]
    found += map(str, Path.home().glob(".cache/ms-playwright/chromium*/chrome-linux*/*chrome"))
    if not found:
        pytest.skip("no Chromium is at hand")
    return found[0]


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 420)])
def test_chromium_shows_it_light_and_dark(run, tmp_path, dark, width):
    from matplotlib.image import imread

    page, _ = write_page([run], tmp_path / "page.html")
    shot = tmp_path / "shot.png"
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600", f"--screenshot={shot}"]
    options += ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += ["--force-dark-mode"] if dark else []
    done = subprocess.run([browser(), *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    picture = imread(shot)[..., :3]
    brightness = picture.mean(2)
    assert (np.median(brightness) < 0.2) == dark
    assert (np.median(brightness) > 0.9) != dark
    assert np.ptp(picture, axis=2).max() > 0.3  # coloured: what was kept
    assert (np.abs(brightness - np.median(brightness)) > 0.5).mean() > 0.005  # text stands out
    assert "CONSOLE" not in done.stderr  # nothing was refused by the page's own policy
