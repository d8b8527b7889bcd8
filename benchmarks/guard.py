"""How far a guard prunes within one run, against a grid of runs with fixed budgets.

    python benchmarks/guard.py --models FOLDER --data FOLDER [--drops 0.01 0.02] [--left 1/2 1/3 ... 1/20] [--seeds 0]
    python benchmarks/guard.py --table

MiniLM-L6 on SST-2 (the small budget of `quality_sst2.py`), one dense model that is the teacher too. A run with a guard
is told a drop of accuracy and a target far beyond it; runs of the grid are told a target alone. All may remove whole
branches. Accuracy is that of validation and test together, which is what the guard sees. Writes results/guard.json; it
goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import equal_time
import quality_sst2
from common import add_record, load_records

from hf_prune import load_pruned

NAME, KEY = "guard", ("method", "asked", "seed")
GRID = [Fraction(1, one) for one in (2, 3, 4, 5, 7, 10, 14, 20)]


def one(options: argparse.Namespace, dense: Path, method: str, asked: str, seed: int, settings: list[str]) -> None:
    note = {"method": method, "asked": asked, "seed": seed}
    if any(all(record[key] == note[key] for key in KEY) for record in [*load_records(NAME), *grid()]):
        return
    output = options.work / f"{method}-{asked.replace('/', '_')}-{seed}"
    told = equal_time.train(options, dense, seed, output, [*equal_time.FREE, *settings])
    told["guards"] = json.loads((output / "report.json").read_text())["settings"].get("guards")
    add_record(
        NAME, {**note, **told, **equal_time.quality(load_pruned(output / "model"), dense, options.data)}, key=KEY
    )


def dense_accuracy() -> float:
    found = [one for one in load_records("quality_sst2") if one["method"] == "dense" and one["budget"] == "small"]
    return float(next(one["accuracy"] for one in found if one["seed"] == 0))


def table() -> None:
    """Print all runs, and for each guard the smallest run of the grid that it would have allowed."""
    dense, guards = dense_accuracy(), [one for one in load_records(NAME) if one["method"] == "guard"]
    print("| method | asked | seed | MACs left | accuracy | drop | seconds |\n" + "| --- " * 7 + "|")
    for record in sorted([*grid(), *guards], key=lambda one: (one["method"], one["seed"], -one["macs_left"])):
        numbers = f"{record['macs_left']:.4f} | {100 * record['accuracy']:.2f} | {dense - record['accuracy']:.4f}"
        print(f"| {record['method']} | {record['asked']} | {record['seed']} | {numbers} | {record['seconds']} |")
    for record in guards:
        same = [one for one in grid() if one["seed"] == record["seed"]]
        allowed = [one for one in same if dense - one["accuracy"] <= float(record["asked"])]
        print(f"guard {record['asked']}: {record['macs_left']:.4f}; the grid: {[one['asked'] for one in allowed]}")


def grid() -> list[dict[str, Any]]:
    """Return runs with fixed budgets; those that `equal_time.py` has made are the same runs."""
    theirs = [one for one in load_records("equal_time") if (one["task"], one["method"]) == ("sst2", "macs")]
    ours = [one for one in load_records(NAME) if one["method"] == "fixed"]
    return ours + [{**one, "method": "fixed", "asked": one["ratio"]} for one in theirs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/equal_time"), help="as equal_time.py's: one dense model"
    )
    parser.add_argument("--drops", nargs="*", type=float, default=[0.01, 0.02])
    parser.add_argument("--left", nargs="*", type=Fraction, default=GRID)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    options.budget = "small"
    dense, _ = quality_sst2.fine_tune(options, quality_sst2.DENSE, 0)
    for seed in options.seeds:
        for drop in options.drops:
            guard = f"guard={{metric: accuracy, max_drop: {drop}, dense: {dense_accuracy()}}}"
            one(options, dense, "guard", f"{drop}", seed, [guard, "shrink_during_training=false", "target.macs=0.04"])
        for left in options.left:
            one(options, dense, "fixed", f"{left}", seed, [f"target.macs={float(left)}"])
    return None


if __name__ == "__main__":
    main()
