# ruff: noqa: E402 (the tests folder has to be on the path first)
"""Folders of one lane loaded on the other: every family that users name most, pruned in all ways at once.

python benchmarks/cross_lane.py save FOLDER      with one lane's interpreter
python benchmarks/cross_lane.py load FOLDER      with the other's: compares outputs, writes results/cross_lane.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

import torch
import zoo
from architectures import LANE, NAMED
from common import add_record

from hf_prune import find_groups, load_pruned, save_pruned, shrink
from hf_prune.selfcheck import output_of, random_plan, relative_difference


def save(folder: Path) -> None:
    first: dict[str, str] = {}
    for name, task in zoo.instances():
        first.setdefault(name, task)
    for name in NAMED:
        model = zoo.build(name, first[name])
        batch = zoo.inputs(model)
        shrink(model, random_plan(model, find_groups(model), 0))
        save_pruned(model, folder / name)
        told = {"lane": LANE, "class": type(model).__name__, "inputs": batch, "output": output_of(model, batch)}
        torch.save(told, folder / name / "expected.pt")


def load(folder: Path) -> None:
    import transformers

    differences: dict[str, Any] = {}
    for name in NAMED:
        told = torch.load(folder / name / "expected.pt")
        try:
            model = load_pruned(folder / name, model_class=getattr(transformers, told["class"]), dtype=torch.float32)
            differences[name] = relative_difference(told["output"], output_of(model, told["inputs"]))
        except Exception as error:
            differences[name] = f"{type(error).__name__}: {str(error).replace(str(folder), folder.name)[:160]}"
    bad = {name: value for name, value in differences.items() if isinstance(value, str) or value > 1e-5}
    record = {"saved_on": told["lane"], "loaded_on": LANE, "families": len(NAMED), "equal": len(NAMED) - len(bad)}
    add_record("cross_lane", record | {"not_equal": bad}, key=("saved_on",))


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
