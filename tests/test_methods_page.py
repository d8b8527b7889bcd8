"""docs/methods.md holds every registered method, with recipes that load, and says what was measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import build_bert, draw_batch

from hf_prune import HeadPruner, Pruning, prune
from hf_prune.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import methods_page  # noqa: E402

METHODS = {f"{title}: {one.name}": one for title, rows in methods_page.methods().items() for one in rows}
RUNS = [
    {"what": "training", "method": "units, l2", "accuracy": accuracy, "cross_entropy": loss, "kl_to_dense": 0.1}
    for accuracy, loss in ((0.8, 0.5), (0.9, 0.3))
]
SHOTS = [
    {"what": "scores", "method": "units, l2", "left": left, "spearman": 80.0 + n}
    for left, n in (("3/4", 1), ("1/2", 0))
]
REFUSED = {"what": "scores", "method": "units, wanda", "left": "1/2", "refused": "because"}


def test_the_page_is_what_registries_and_records_make_of_it():
    written = methods_page.PAGE.read_text(encoding="utf-8")
    records = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text(encoding="utf-8"))["records"]
    assert written == methods_page.page(records), "python benchmarks/methods_page.py writes it"


@pytest.mark.parametrize("registry", ["REGULARISERS", "RULES", "SCHEDULES", "ALLOCATIONS", "GUARDS", "SCORES"])
def test_everything_that_is_registered_has_a_row(registry):
    names = {one.name for one in METHODS.values()}
    registered = getattr(methods_page, registry)
    found = (
        methods_page.ours(registered)
        if registry != "SCORES"
        else {n for of in ("unit", "weight") for n, _ in methods_page.scores(of)}
    )
    assert set(found) <= names
    assert len(found) > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_row_has_a_recipe_that_works(name):
    model, method = build_bert(), METHODS[name]
    assert method.what
    if isinstance(method.use, str):
        told: dict[str, Any] = {
            "prune": prune,
            "HeadPruner": HeadPruner,
            "model": model,
            "batches": [draw_batch(model)],
        }
        assert eval(method.use, told).pruned.parameters < sum(one.numel() for one in build_bert().parameters())
        return
    bare = ["target=null", "shrink_during_training=false", "distillation=null"]
    recipe = load_recipe(
        "quickstart",
        [*bare, *(f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in method.use.items())],
    )
    optimizer = torch.optim.AdamW(model.parameters())
    Pruning(model, recipe.pruning, total_steps=500, optimizer=optimizer).close()


def test_records_are_put_beside_their_methods():
    page = methods_page.page([*RUNS, *SHOTS, REFUSED, {**RUNS[0], "method": "weights, by hand"}])
    rows = {
        match[1]: line
        for line in page.split("## Scores of single weights")[0].splitlines()
        if (match := re.match(r"\| `(\w+)` ", line))
    }
    assert "| 85.00, 0.400, 0.100 (2 seeds) | 81.00, 80.00 |" in rows["l2"]
    assert "| not measured | not measured |" in rows["taylor"]
    assert page.count("| refused |") == 0  # 'wanda' has no row among scores of units
    assert "| weights, by hand | 80.00, 0.500, 0.100 |" in page


def test_losses_of_a_language_model_are_means():
    lm = [("dense", "1", 2.0), ("taylor", "3/4", 2.25), ("taylor", "3/4", 2.75), ("taylor", "1/2", 3.0)]
    records = [{"what": "lm", "method": name, "left": left, "loss": loss} for name, left, loss in lm]
    assert "| taylor | 2.500 | 3.000 |" in methods_page.page([*RUNS, *records]).split("dense 2.000.")[1]
