"""A diagonal of the loading matrix: each model, each kind of cut and each way to load; the rest is a benchmark.

One process has one lane, so folders are saved and loaded on the same; `test_folders.py` has some of the other lane.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from load_alone import CELL, LANE, environment_without_us  # noqa: E402
from load_extras import EXTRAS, HUB  # noqa: E402
from load_models import KINDS, MODELS  # noqa: E402
from load_ways import WAYS, Case, judge, save  # noqa: E402

DIAGONAL = {name: list(KINDS)[(number + 1) % len(KINDS)] for number, name in enumerate(MODELS)} | {"llama": "all"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return where the cells of the diagonal lie, as the benchmark lays them out."""
    folder = tmp_path_factory.mktemp("matrix")
    for name, kind in DIAGONAL.items():
        (folder / LANE / name / kind).mkdir(parents=True)
        assert save(name, kind, folder / LANE / name / kind, wide=False) == ""
    return folder


def case_of(root: Path, name: str) -> Case:
    folder = root / LANE / name / DIAGONAL[name]
    return Case(name, folder, torch.load(folder / CELL))


def test_the_diagonal_has_every_kind():
    assert set(DIAGONAL.values()) == set(KINDS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_was_saved(name, way, root):
    found = judge(WAYS[way], case_of(root, name))
    if way == "pipeline" and MODELS[name].pipeline not in transformers.pipelines.SUPPORTED_TASKS:
        assert str(found).startswith("not applicable: transformers 5")
    else:
        assert found == 0


@pytest.mark.parametrize("way", [*EXTRAS, *HUB])
def test_rarer_ways(way, root):
    assert judge({**EXTRAS, **HUB}[way], case_of(root, "llama")) == 0


def test_standalone_folders_load_where_hf_prune_is_not_installed(root, tmp_path):
    python = environment_without_us(tmp_path / "alone")
    command = [python, BENCHMARKS / "load_alone.py", root, *MODELS]
    settings = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    values = {name: value for _, name, _, _, value in found}
    if LANE == "v5":  # there the router of an emptied branch is a module of a kind of its own
        assert values["mixtral"].startswith("not applicable: A standalone folder cannot say all of this Mixtral")
        values["mixtral"] = 0.0
    assert values == dict.fromkeys(DIAGONAL, 0.0), done.stderr[-2000:]


def test_a_single_changed_weight_is_seen(root, tmp_path):
    told = case_of(root, "bert").told
    model = case_of(root, "bert").load()
    model.save_pretrained(tmp_path / "model")
    assert judge(WAYS["auto"], Case("bert", tmp_path, told)) == 0
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["classifier.bias"][0] += 1e-6
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert judge(WAYS["auto"], Case("bert", tmp_path, told)) == (
        "failed: ValueError: tensors differ from those that were saved"
    )
