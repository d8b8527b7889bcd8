"""Masks that come back against masks that are final: MiniLM-L6 on SST-2, 16,000 sentences, 2 epochs, no teacher.

    python benchmarks/reversible.py --models FOLDER --data FOLDER [--seeds 0] [--only weights/l1 …]
    python benchmarks/reversible.py --table

FOLDER of models: all-minilm-l6-v2; of data: sst2/{train,validation,test}.parquet, as for `distillation.py`, whose dense
models are taken where they lie in `--work`. Accuracy is on validation and test together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import quality_sst2
from common import add_record, load_records

import hf_prune

NAME = "reversible"
KEY = ("method", "amount", "seed")
WEIGHTS = {"l1": {"score": "l1"}, "l1 reversible": {"score": "l1", "reversible": True}}
WEIGHTS |= {"taylor": {"score": "taylor"}, "movement": {"score": "movement"}}
WEIGHTS |= {f"{name} in each matrix": {**WEIGHTS[name], "allocation": "uniform"} for name in ("l1", "movement")}
UNITS: dict[str, dict[str, Any]] = {"taylor": {}, "taylor reversible": {"reversible": True}}
UNITS |= {"movement": {"score": "movement"}}


def settings_of(method: str, amount: float) -> list[str]:
    """Return the recipe's overrides of one method: a share of zeros for weights, of the MACs left for units."""
    kind, _, name = method.partition("/")
    common = ["distillation.hard=1", "distillation.logits=0", "shrink_during_training=false"]
    if kind == "weights":
        pruners = {"weights": {"sparsity": amount, **WEIGHTS[name]}}
        return [*common, f"pruners={json.dumps(pruners)}", "target=null"]
    pruners = {"heads": UNITS[name], "neurons": UNITS[name]}
    return [*common, f"pruners={json.dumps(pruners)}", f"target.macs={amount}"]


def run_seed(options: argparse.Namespace, seed: int) -> None:
    quality_sst2.BUDGETS["here"] = {"epochs": 2, "limit": 16000}
    options.budget = "here"
    todo = [(method, amount) for method in options.only for amount in options.amounts[method.partition("/")[0]]]
    done = {tuple(record[key] for key in KEY) for record in load_records(NAME)}
    todo = [one for one in todo if (*one, seed) not in done]
    dense, dense_accuracy = quality_sst2.fine_tune(options, quality_sst2.DENSE, seed) if todo else (Path(), 0.0)
    for method, amount in todo:
        start = time.time()
        folder = options.work / f"reversible-{method.replace('/', '-').replace(' ', '_')}-{amount}-{seed}"
        settings = [*quality_sst2.overrides(options, dense, folder, seed), "dense=null", *settings_of(method, amount)]
        report = hf_prune.run("minilm_sst2", settings)
        record = {"method": method, "amount": amount, "seed": seed, "accuracy": report.metrics["accuracy"]["pruned"]}
        record |= {"dense_accuracy": dense_accuracy, "settings": report.settings}
        add_record(NAME, {**record, "seconds": round(time.time() - start)}, key=KEY)


def table() -> None:
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in load_records(NAME):
        rows.setdefault((record["method"], record["amount"]), []).append(record)
    print("| method | zeros, or MACs left | accuracy | memory for masks that come back, MB | seeds |")
    print("| --- | --- | --- | --- | --- |")
    for (method, amount), records in sorted(rows.items(), key=lambda row: (row[0][0].split("/")[0], row[0][1])):
        mean = statistics.mean(100 * record["accuracy"] for record in records)
        memory = records[0]["settings"].get("reversible_mb", 0)
        print(f"| {method} | {amount:g} | {mean:.2f} | {memory} | {len(records)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*(f"weights/{name}" for name in WEIGHTS), *(f"units/{name}" for name in UNITS)]
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/distillation/16000-2"))
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--weights", nargs="+", type=float, default=[0.9], help="shares of zeros")
    parser.add_argument("--units", nargs="+", type=float, default=[0.25], help="shares of the MACs left")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    options.data = options.data / "sst2"
    options.amounts = {"weights": options.weights, "units": options.units}
    for seed in options.seeds:
        run_seed(options, seed)


if __name__ == "__main__":
    main()
