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


def run_example(path: Path, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run an example in a process of its own and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(path), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_both_examples_are_there():
    assert [path.name for path in EXAMPLES] == ["own_loop.py", "text_classification.py"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
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


def figures(printed: str) -> list[float]:
    """Return the accuracies that an example prints."""
    words = printed.partition("accuracy ")[2].split()
    return [float(word) for word in words if word[0].isdigit()]
