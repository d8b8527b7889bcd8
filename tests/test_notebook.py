"""The notebook runs from top to bottom, offline, in a kernel, and shows what it promises."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "notebook.ipynb"


def shown(cell) -> str:
    """Return everything that a cell displays: printed text, plain text, tables, names of pictures."""
    parts = [one.get("text", "") + "".join(one.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html"))
             for one in cell.get("outputs", ())]  # fmt: skip
    kinds = [kind for one in cell.get("outputs", ()) for kind in one.get("data", {})]
    return "\n".join([*parts, *kinds])


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    client = pytest.importorskip("nbclient", reason="the extra dev has it")
    pytest.importorskip("ipykernel", reason="the extra dev has it")
    import nbformat

    notebook, home = nbformat.read(NOTEBOOK, as_version=4), tmp_path_factory.mktemp("notebook")
    environment = {**os.environ, "PYTHONPATH": str(NOTEBOOK.parent.parent)}
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(home)}}).execute(env=environment)
    return notebook, home


def test_it_runs_and_shows_what_it_promises(executed):
    notebook, home = executed
    said = "\n".join(shown(cell) for cell in notebook.cells)
    for words in ("layers.3.mlp.neurons", "<table>", "accuracy", "of 16 heads", "image/png", "onnx/model.onnx"):
        assert words in said, words
    assert (home / "runs" / "notebook" / "model" / "model.safetensors").is_file()
    pictures = [cell for cell in notebook.cells if "image/png" in shown(cell)]
    assert len(pictures) == 2


def test_the_small_model_still_reads(executed):
    notebook, _ = executed
    told = next(shown(cell) for cell in notebook.cells if "DistillationTrainer(" in cell["source"])
    numbers = re.findall(r"accuracy</td><td[^>]*>([\d.]+)</td><td[^>]*>([\d.]+)", told)
    assert min(map(float, *numbers)) > 0.8


def test_no_output_is_kept_in_the_repository():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
