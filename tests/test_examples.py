"""Every example runs as it stands, offline, and leaves a model that loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def run_example(path: Path, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run an example in a process of its own and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(path), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_all_examples_are_tested():
    assert [path.stem for path in EXAMPLES] == sorted([*TRANSFORMERS, *MODULES, "fsdp2"])  # that one in test_fsdp.py


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


def table_rows(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by the name of their row."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines}


def figures(printed: str) -> list[float]:
    """Return the accuracies that an example prints."""
    words = printed.partition("accuracy ")[2].split()
    return [float(word) for word in words if word[0].isdigit()]
