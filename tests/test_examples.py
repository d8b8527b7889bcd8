"""Every example runs as it stands, offline, and leaves a model that loads."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zygote import run_forked

from hf_prune import find_groups, load_pruned
from hf_prune.architectures import prunable_macs

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TRANSFORMERS = ("own_loop", "text_classification")
# of modules of one's own: the row of the score, the row that shows what went, and the percentage that may be left
MODULES = {
    "cnn_digits": ("accuracy", "parameters", 41),
    "lstm_digits": ("accuracy", "parameters", 31),
    "recommender": ("RMSE", "parameters", 36),
    "song_ratings": ("RMSE", "parameters that are not 0", 42),
}

# with a Trainer and PruningArguments: the figure it prints, what that must reach, and how many MACs may be left
TRAINERS = {
    "token_classification": ("accuracy", 0.95, 8192),
    "image_classification": ("accuracy", 0.75, 8192),
    "audio_classification": ("accuracy", 0.95, 8192),
    "question_answering": ("accuracy", 0.95, 8192),
    "causal_lm": ("perplexity", 6, 0.7 * 18432),  # of 60 words
    "seq2seq": ("perplexity", 4, 0.5 * 41216),  # of 30
    "lora": ("perplexity", 60, 0.5 * 18432),
}


def run_example(path: Path, folder: Path, *arguments: str, launcher: tuple[str, ...] = (), processes: int = 1) -> str:
    """Run an example in a process of its own and return what it prints.

    Args:
        path: The example.
        folder: Where it runs.
        arguments: What it is told.
        launcher: Of several processes: Python's arguments. Without one, processes are forks that have imported torch
            and transformers already.
        processes: How many forks, each with the environment that torchrun gives a rank.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    if launcher:
        command = [sys.executable, *launcher, str(path), *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    else:
        code = f"import sys; sys.path[0:1] = [{str(path.parent)!r}, {str(ROOT)!r}]; sys.argv[0] = {str(path)!r}\n"
        code += f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
        told = {"kind": "training", "ranks": ranks_of(processes)}
        result = run_forked(code, arguments, environment, folder, **told)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def ranks_of(processes: int) -> list[dict[str, str]]:
    """Return what torchrun adds to the environment of each process; nothing to that of one alone."""
    if processes == 1:
        return [{}]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    common |= {"LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def test_all_examples_are_tested():
    assert [path.stem for path in EXAMPLES] == sorted(
        [*TRANSFORMERS, *MODULES, *TRAINERS, "fsdp2", "lightning_callback"]
    )  # these two in test_fsdp.py and test_other_loops.py


@pytest.mark.parametrize("path", [one for one in EXAMPLES if one.stem in TRANSFORMERS], ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    printed = run_example(path, tmp_path, "--tiny", "--output", "out")
    assert "parameters" in printed
    assert "saved to" in printed
    assert len(figures(printed)) == (2 if path.stem == "text_classification" else 0)
    model = load_pruned(tmp_path / "out" / "final", dtype=torch.float32)
    heads = "layers.0.attention.kv_groups" if path.stem == "own_loop" else "layers.0.attention.heads"
    assert {"layers.0.mlp.neurons", heads} <= {group.name for group in find_groups(model)}
    share = 0.7 if path.stem == "own_loop" else 0.5
    attention = 4 * 32 * 32 if path.stem == "text_classification" else 2 * 32 * 32 + 2 * 32 * 16
    neurons = (2 if path.stem == "text_classification" else 3) * 32 * 64
    assert prunable_macs(model) <= share * 2 * (attention + neurons)
    assert all(figure > 0.95 for figure in figures(printed)), printed


@pytest.mark.parametrize("name", MODULES)
def test_example_of_a_module_prunes_and_still_works(name, tmp_path):
    score, size, most = MODULES[name]
    rows = table_rows(run_example(ROOT / "examples" / f"{name}.py", tmp_path, "--tiny"))
    dense, pruned = map(float, rows[score][:2])
    assert pruned > dense - 0.1 if score == "accuracy" else pruned < dense * 1.1
    assert float(rows[size][2].removesuffix("% left")) <= most
    assert any(name.startswith("latency in torch") for name in rows)


@pytest.mark.parametrize("name", TRAINERS)
def test_example_with_arguments(name, tmp_path, monkeypatch, capsys):
    """Runs as a script does, in this process: starting another one takes longer than the example."""
    figure, least, macs = TRAINERS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--output_dir", "out", "--disable_tqdm", "true"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"saved to {Path('out', 'final')}")
    values = [float(word) for word in last.replace(",", "").split() if word[0].isdigit()]
    assert values[-1] > least if figure == "accuracy" else values[-1] < least
    assert name != "lora" or values[1] < 0.7 * values[0]
    model = load_pruned(tmp_path / "out" / "final", dtype=torch.float32)
    assert 0.8 * macs < prunable_macs(model) <= macs


def table_rows(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by the name of their row."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines}


def figures(printed: str) -> list[float]:
    """Return the accuracies that an example prints."""
    words = printed.partition("accuracy ")[2].split()
    return [float(word) for word in words if word[0].isdigit()]
