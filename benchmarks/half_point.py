"""Where the gradual run and a simple baseline of 300 lines differ: one thing is changed at a time.

    python benchmarks/half_point.py --models FOLDER --data FOLDER --baselines FOLDER [--ratio 1/3] [--seeds 0 1]
    python benchmarks/half_point.py --table

MiniLM-L6 on SST-2 (the small budget of `quality_sst2.py`), one dense model that is the teacher too, its answers cached.
`baseline` is the gradual method of the baselines' `peer_quality.py` in float32; `library` the recipe `minilm_sst2`
with the model's dropout, as the baseline has it; `quiet` the recipe as it is, without;
`order` shuffles the batches that Trainer's grouping by length puts in order, from long to short, fifty at a time;
`cuts` removes units at the baseline's moments (the first of its ten changes removes something); `reads` reads every
step and fades as slowly as the baseline; `all` does all three. `free` lets whole branches leave (`min_kept: 0`), as the
baseline does; `fast` has twice the learning rate, `free_fast` both, `baseline_fast` is the baseline with that rate;
`quiet_fast` and `all_three` more of these without dropout, `baseline_quiet` the baseline without.
Accuracy, cross-entropy and KL to the dense model are those of validation and test together. Writes
results/half_point.json; it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import equal_time
import quality_sst2
import torch
from common import add_record, load_records
from transformers import AutoTokenizer, trainer_pt_utils

from hf_prune import load_pruned
from hf_prune.evidence import running

NAME, KEY = "half_point", ("method", "ratio", "seed")
STEPS, CUTS, UNTIL = 1000, 10, 0.6  # of the small budget, and of the baseline
BY_HAND = [[round(UNTIL * STEPS * cut / CUTS), round(1 - (1 - cut / CUTS) ** 3, 4)] for cut in range(1, CUTS + 1)]
GROUPED = trainer_pt_utils.get_length_grouped_indices
CHANGES = ("order", "cuts", "reads")
METHODS = {
    **{"library": (), "free": ("free",), "fast": ("fast",), "free_fast": ("free", "fast")},
    **{"quiet": ("quiet",), "quiet_fast": ("quiet", "fast"), "all_three": ("quiet", "free", "fast")},
    **{"baseline": (), "baseline_fast": ("fast",), "baseline_quiet": ("quiet",)},
    **{one: (one,) for one in CHANGES},
    "all": CHANGES,
}
FAST = 2e-4  # the recipe and the baseline have half of it


@contextlib.contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    """Let a module have other values for a while."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    yield
    vars(module).update(before)


def shuffled(lengths: list[int], batch_size: int, **options: Any) -> list[int]:
    """Return rows grouped by length, and the batches in any order."""
    rows = GROUPED(lengths, batch_size, **options)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    order = torch.randperm(len(batches), generator=options.get("generator")).tolist()
    return [row for batch in order for row in batches[batch]]


def library(options: argparse.Namespace, dense: Path, method: str, seed: int, output: Path) -> dict[str, Any]:
    settings = [f"target.macs={float(options.ratio)}"]
    with contextlib.ExitStack() as stack:
        if "order" in METHODS[method]:
            stack.enter_context(changed(trainer_pt_utils, get_length_grouped_indices=shuffled))
        if "reads" in METHODS[method]:
            stack.enter_context(changed(running, _READ_EVERY=1, DECAY=0.98))
        if "cuts" in METHODS[method]:
            settings.append(f"schedule={{steps: {BY_HAND}}}")
        if "free" in METHODS[method]:
            settings += equal_time.FREE
        if "fast" in METHODS[method]:
            settings.append(f"train.learning_rate={FAST}")
        if "quiet" in METHODS[method]:
            settings.append("train.disable_dropout=true")
        return equal_time.train(options, dense, seed, output, settings)


def baseline(
    options: argparse.Namespace, dense: Path, method: str, seed: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train by the baseline's own code, from the same dense model."""
    sys.path.insert(0, str(options.baselines))
    import peer_quality

    peer_quality.bf16 = contextlib.nullcontext
    start = time.time()
    teacher = options.work / "baseline_teacher"
    if not teacher.is_dir():
        shutil.copytree(dense, teacher)  # its answers are kept beside it
    task = peer_quality.Task("sst2", AutoTokenizer.from_pretrained(dense))
    model = peer_quality.load(task, dense)
    rate = {"lr": FAST} if "fast" in METHODS[method] else {}
    if "quiet" in METHODS[method]:
        for module in (one for one in model.modules() if isinstance(one, torch.nn.Dropout)):
            module.p = 0.0
    told = peer_quality.gradual(model, peer_quality.load(task, teacher), task, float(options.ratio), seed, **rate)
    names = [(f"layers.{n}.attention.heads", f"layers.{n}.mlp.neurons") for n in range(len(told["heads"]))]
    kept = {
        name: count for pair, both in zip(names, zip(told["heads"], told["neurons"])) for name, count in zip(pair, both)
    }
    return model, {"macs_left": round(told["macs_left"], 4), "kept": kept, "seconds": round(time.time() - start)}


def compare(options: argparse.Namespace, dense: Path, method: str, seed: int) -> None:
    note = {"method": method, "ratio": str(options.ratio), "seed": seed}
    if any(all(one[key] == note[key] for key in KEY) for one in load_records(NAME)):
        return
    if method.startswith("baseline"):
        model, told = baseline(options, dense, method, seed)
    else:
        output = options.work / f"{method}-{str(options.ratio).replace('/', '_')}-{seed}"
        told = library(options, dense, method, seed, output)
        model = load_pruned(output / "model")
    add_record(NAME, {**note, **told, **equal_time.quality(model, dense, options.data)}, key=KEY)


def table() -> None:
    """Print means and standard deviations over seeds."""
    print(f"| MACs left | method | seeds | accuracy | cross-entropy | KL to dense |\n{'| --- ' * 6}|")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in sorted(load_records(NAME), key=lambda one: (-Fraction(one["ratio"]), [*METHODS].index(one["method"]))):
        groups.setdefault((one["ratio"], one["method"]), []).append(one)
    for (ratio, method), found in groups.items():
        accuracies = [100 * one["accuracy"] for one in found]
        spread = f" ± {stdev(accuracies):.2f}" if len(found) > 1 else ""
        losses = " | ".join(f"{mean(one[key] for one in found):.3f}" for key in ("cross_entropy", "kl_to_dense"))
        print(f"| {ratio} | {method} | {len(found)} | {mean(accuracies):.2f}{spread} | {losses} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--baselines", type=Path, help="the folder of peer_quality.py")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/equal_time"), help="as equal_time.py's: one dense model"
    )
    parser.add_argument("--ratio", type=Fraction, default=Fraction(1, 3))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    options.budget = "small"
    dense, _ = quality_sst2.fine_tune(options, quality_sst2.DENSE, 0)
    for seed in options.seeds:
        for method in options.methods:
            compare(options, dense, method, seed)
    return None


if __name__ == "__main__":
    main()
