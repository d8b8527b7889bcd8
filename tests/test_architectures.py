"""The families that users name most: masked = shrunk = reloaded, and the committed table of all the others."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import LANE

from hf_prune import find_groups, load_pruned, save_pruned, shrink, verify
from hf_prune.selfcheck import output_of, random_plan, relative_difference

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from architectures import NAMED, RELOADED, SHRUNK, passed, result_file  # noqa: E402

RESULTS = {lane: json.loads(result_file(lane).read_text()) for lane in ("v5", "optimum")}
FIRST: dict[str, str] = {}
for _type, _task in zoo.instances():
    FIRST.setdefault(_type, _task)


@pytest.mark.parametrize("name", NAMED)
def test_masked_is_shrunk_is_reloaded(name, tmp_path):
    model = zoo.build(name, FIRST[name])
    batch = zoo.inputs(model)
    report = verify(model, batch)
    assert not report.failures
    assert max(report.differences.values()) <= SHRUNK
    assert report.effects["all"] > 1e-3, "the plan removed nothing that the inputs pass"
    small = shrink(copy.deepcopy(model), random_plan(model, find_groups(model), 0))
    reloaded = load_pruned(save_pruned(small, tmp_path), model_class=type(model), dtype=torch.float32)
    assert relative_difference(output_of(small, batch), output_of(reloaded, batch)) <= RELOADED


def records(lane: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["type"], one["task"]): one for one in RESULTS[lane]["records"] if one["built"]}


@pytest.mark.parametrize("lane", RESULTS)
def test_table_holds_what_was_promised(lane):
    built = records(lane).values()
    assert sum(map(passed, built)) >= 0.98 * len(built)
    assert [one["type"] for one in built if one["type"] in NAMED and not passed(one)] == []
    assert {one["type"] for one in built} >= {*NAMED}
    heads = [one for one in built if {"head", "kv_group"} & {*one.get("kinds", ())}]
    neurons = [one for one in built if "neuron" in one.get("kinds", ())]
    assert len(heads) >= (0.85 if lane == "v5" else 0.84) * len(built)  # the rest: convolutions, norms over all heads
    assert len(neurons) >= 0.9 * len(built)


def test_table_is_of_this_transformers():
    assert version("transformers").split(".")[0] == RESULTS[LANE]["environment"]["transformers"].split(".")[0]


@pytest.mark.parametrize("name", NAMED)
def test_groups_are_those_of_the_table_on_both_lanes(name):
    expected = records(LANE)[name, FIRST[name]]["groups"]
    assert {group.name: group.units for group in find_groups(zoo.build(name, FIRST[name]))} == expected
    other = records("v5" if LANE == "optimum" else "optimum").get((name, FIRST[name]))
    assert other is None or other["groups"] == expected


def test_document_has_a_row_for_each_type():
    lines = (ROOT / "docs" / "architectures.md").read_text().splitlines()
    listed = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    assert {kind for lane in RESULTS for kind, _ in records(lane)} <= listed


def test_another_package_registers_an_architecture_by_its_entry_point(tmp_path):
    """A real installed distribution: metadata on the path, a module that registers when it is loaded."""
    (tmp_path / "their_models.py").write_text(
        "from hf_prune import Group, Slice, register_architecture\n"
        "@register_architecture('TheirModel')\n"
        "def groups(model):\n"
        "    return [Group('mlp.neurons', 'neuron', 4, (Slice('0.weight', 0, 1), Slice('2.weight', 1, 1)))]\n"
    )
    folder = tmp_path / "their_models-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[hf_prune]\ntheirs = their_models\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from torch import nn; from hf_prune import find_groups\n"
        "class TheirModel(nn.Sequential): pass\n"
        "print(find_groups(TheirModel(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))[0].name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "mlp.neurons\n", result.stderr
