"""The commands, each on a tiny model; errors are one line and a status."""

import gc
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from models import TINY_RECIPE, build_bert
from typer.testing import CliRunner

from hf_prune import PruningError, cli, save_pruned, shrink, workflow
from hf_prune.listing import LISTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    model = build_bert()
    save_pruned(model, home / "dense")
    shrink(model, {"layers.0.attention.heads": [0, 2], "layers.1.mlp.neurons": range(8)})
    save_pruned(model, home / "pruned")
    return home


def ask(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "140"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_inspect_shows_what_is_left_of_what(folders):
    lines = [line.split() for line in ask("inspect", folders / "pruned").splitlines()]
    heads = next(line for line in lines if "layers.0.attention.heads" in line)
    assert [word for word in heads if word.isdigit()][:2] == ["2", "4"]


LISTED = {
    "scores": ["taylor", "gate_square", "arXiv"],
    "schedules": ["cubic", "linear", "oneshot"],
    "allocations": ["global", "uniform"],
    "rules": ["final", "anew"],
    "patterns": ["unstructured"],
    "budgets": ["macs", "time"],
    "guards": [],
    "regularisations": ["group_lasso", "growing"],
    "evidence": ["gradient", "movement"],
    "pruners": ["heads", "HeadPruner", "unit=branch"],
    "tasks": ["token-classification", "...ForTokenClassification", "f1_macro"],
    "metrics": ["accuracy", "entity_f1"],
    "formats": ["onnx", "executorch"],
    "architectures": ["query, key, value", "query_key_value", "gate_proj, up_proj, down_proj"],
    "recipes": ["quickstart", "minilm_sst2", "exported, measured and carded."],
    "keys": ["train.epochs", "Passes over the data"],
}


@pytest.mark.parametrize("what", LISTS)
def test_list(what):
    output = CliRunner().invoke(cli.app, ["list", what], env={"COLUMNS": "40"}).output
    rows = json.loads(ask("list", what, "--json"))
    assert all(word in output for word in LISTED[what]), "whole lines, however narrow"
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(value in output for row in rows for value in row.values())


def test_list_alone_names_the_lists():
    assert [row["list"] for row in json.loads(ask("list", "--json"))] == list(LISTED)


def test_the_version_and_completion():
    from hf_prune import __version__

    assert ask("--version") == f"{__version__}\n"
    as_module = subprocess.run([sys.executable, "-m", "hf_prune", "--version"], capture_output=True, text=True)
    assert as_module.stdout == f"{__version__}\n"
    assert "--install-completion" in ask("--help")


def test_list_of_something_else_suggests():
    with pytest.raises(PruningError, match="Did you mean 'scores'"):
        ask("list", "score")


def test_measure_two_models_in_turn(folders):
    output = ask("measure", folders / "dense", folders / "pruned", "--length", "8", "--repeats", "2")
    assert "x speed" in output


def test_export_and_push_dry_run(folders, tmp_path):
    ask("export", folders / "pruned", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    planned = ask("push", folders / "pruned", "someone/model", "--onnx", tmp_path / "onnx", "--dry-run")
    assert "model.safetensors" in planned
    assert "onnx/model.onnx" in planned


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PruningError, match="no-such-folder"):
        ask("inspect", tmp_path / "no-such-folder")


def test_doctor_names_the_lane(lane):
    assert json.loads(ask("doctor"))["lane"].startswith(lane)


MARKUP = ["[bold]x", "[/]", "[/red]", "a:smile:b", "[link=evil]x", "x\x1b[31my"]


@pytest.mark.parametrize("name", MARKUP)
def test_markup_in_a_path_is_text(name, tmp_path, monkeypatch, capsys):
    """It neither vanishes nor crashes; what would move the cursor is shown."""
    shown = name.replace("\x1b", r"\x1b")
    monkeypatch.chdir(tmp_path)
    for words in (
        ["card", name],
        ["inspect", name],
        ["push", name, "me/x", "--dry-run"],
        ["list", name],
        ["run", name],
    ):
        monkeypatch.setattr("sys.argv", ["hf-prune", *words])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr().err
        assert said.startswith("Error: ")
        assert shown in said
    save_pruned(build_bert(), tmp_path / name.replace("/", ""))
    assert shown.replace("/", "") in ask("card", tmp_path / name.replace("/", ""))


@pytest.mark.parametrize("name", MARKUP)
def test_markup_in_what_a_run_says_is_text(name, capsys, monkeypatch):
    from rich.console import Console

    from hf_prune import workflow

    monkeypatch.setattr(workflow, "console", Console(markup=False, emoji=False, highlight=False))
    workflow.say(f"Model: {name}")
    assert name.replace("\x1b", r"\x1b") in capsys.readouterr().out


def test_a_dry_run_shows_what_stays(folders, tmp_path):
    (folders / "pruned" / "id_rsa").write_text("mine")
    said = ask("push", folders / "pruned", "me/x", "--dry-run")
    (folders / "pruned" / "id_rsa").unlink()
    assert "stays here   id_rsa: not a model's file" in said
    assert re.search(r"To https://huggingface.co/me/x would go \d files, 0\.\d+ MB:", said)
    assert "# x\n" in said
    assert "## How to load" in said
    assert " MB  model.safetensors" in said


def press_ctrl_c(*told, **named):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background has it ignored
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("stage", ["prepare", "train_dense", "prune_and_distil", "measure_both"])
def test_ctrl_c_says_what_a_run_has_kept_and_how_to_go_on(stage, tmp_path, monkeypatch):
    output = tmp_path / "a run"
    quick = [
        *TINY_RECIPE,
        "dense.epochs=1",
        "train.epochs=1",
        "schedule.frequency=1",
        "measure.repeats=1",
        "onnx=false",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(workflow, stage, press_ctrl_c)
        result = CliRunner().invoke(cli.app, ["run", "quickstart", *quick, f"output={output}"])
    said = " ".join(result.output.split())
    assert result.exit_code == 130
    assert "Traceback" not in said
    if stage == "prepare":
        assert "Nothing was written: the same command begins again." in said
        return
    kept = {"train_dense": "the recipe alone", "prune_and_distil": f"{output}/dense"}
    assert (
        f"Kept: {kept.get(stage, f'{output}/dense and {output}/model')}. This goes on from there: hf-prune run" in said
    )
    if stage == "prune_and_distil":
        words = shlex.split(re.search(r"from there: hf-prune (.*? dense=null)", said)[1])
        assert "Training the dense model" not in ask(*words)
        assert (output / "model" / "config.json").is_file()


class Doomed:
    """What the garbage collector finds, with a finalizer into which Ctrl-C falls."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        press_ctrl_c()


def test_ctrl_c_is_not_lost_where_libraries_collect_garbage(tmp_path, monkeypatch):
    """Python drops what a finalizer raises: a run would go on as if nobody had asked it to stop."""

    def collect(job):
        Doomed()
        gc.collect()
        time.sleep(60)
        pytest.fail("nobody heard of it")

    monkeypatch.setattr(workflow, "train_dense", collect)
    hook = sys.unraisablehook
    result = CliRunner().invoke(cli.app, ["run", "quickstart", *TINY_RECIPE, f"output={tmp_path / 'out'}"])
    assert result.exit_code == 130
    assert "Kept: the recipe alone" in " ".join(result.output.split())
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distillation={cache: /proc/x}"], "distillation.cache must be a folder that can be written"),
        (["distillation={layer_map: nearest}"], "give hidden or attention a weight"),
        (["distillation={cache: answers, top_k: 5}"], "image-classification goes without top_k"),
        (["distillation={hidden: 1.0, relations: 1.0, relation_heads: 3}"], "relation_heads"),
        (["distillation={relations: 1.0, relation_layer: 5}"], "relation_layer"),
    ],
)
def test_what_a_teacher_cannot_teach_is_said_before_training(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "train_dense", lambda job: pytest.fail("training began"))
    for command in ("validate", "run"):
        words = [command, "quickstart", *TINY_RECIPE, f"output={tmp_path / 'out'}", *settings]
        with pytest.raises(PruningError, match=message):
            ask(*words)
    assert not (tmp_path / "out").exists()


def test_a_model_that_diverged_is_no_success(tmp_path):
    early = "schedule={kind: oneshot, begin: 1, end: 1}"  # before the loss is no number any more
    quick = ["dense=null", "train.epochs=1", "train.learning_rate=1e20", "onnx=false", "distillation=null", early]
    with pytest.raises(PruningError, match="training has diverged"):
        ask("run", "quickstart", *TINY_RECIPE, *quick, f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out" / "model").exists()
