"""Accuracy at equal measured latency: a target of time, one of MACs, and widths that are equal in all layers.

    python benchmarks/equal_time.py --models FOLDER --data FOLDER [--ratios 1/10 1/3] [--seeds 0]
    python benchmarks/equal_time.py --table | --plot

MiniLM-L6 on SST-2 (the small budget of `quality_sst2.py`), or on another folder of parquet files. The run with a
target of MACs sets the time: its model is timed in ONNX Runtime (one thread, batch 1, 128 tokens, dense and pruned in
turn). The run with a target of time gets that time; widths that are equal in all layers get the MACs at which they
take that time, found on the dense model. All three may remove whole branches, start from one dense model, and see the
same batches. Accuracy, cross-entropy and KL to the dense model are those of validation and test together. Writes
results/equal_time.json; it goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import pandas
import quality_sst2
import torch
from common import add_record, load_records
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_prune
from hf_prune import HeadPruner, NeuronPruner, Target, find_groups, load_pruned, prune
from hf_prune.timing import Conditions, Stopwatch

NAME, KEY = "equal_time", ("task", "method", "ratio", "seed")
FREE = ["pruners.heads={min_kept: 0}", "pruners.neurons={min_kept: 0}"]
EVEN = ["pruners.heads={allocation: uniform}", "pruners.neurons={allocation: uniform}"]


@torch.inference_mode()
def logits(model: torch.nn.Module, tokenizer: Any, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels of validation and test together."""
    splits = quality_sst2.splits_of(data)
    rows = pandas.concat([pandas.read_parquet(data / f"{split}.parquet") for split in splits])
    texts, found = rows[quality_sst2.text_of(data)].tolist(), []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt")
        found.append(model(**batch).logits)
    return torch.cat(found).double(), torch.tensor(rows["label"].tolist())


def quality(model: torch.nn.Module, dense: Path, data: Path) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(dense)
    (ours, labels), (theirs, _) = (logits(one.eval(), tokenizer, data) for one in (model, load_pruned(dense)))
    ours, theirs = log_softmax(ours, -1), log_softmax(theirs, -1)
    accuracy = (ours.argmax(-1) == labels).double().mean()
    told = {"accuracy": accuracy, "cross_entropy": cross_entropy(ours, labels)}
    told["kl_to_dense"] = kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return {name: round(float(value), 5) for name, value in told.items()}


def share_of_time(pruned: Path, dense: Path, seconds: float = 6.0) -> float:
    """Return the time of a pruned model over that of the dense one, in ONNX Runtime, in turn."""
    watch = Stopwatch(AutoModelForSequenceClassification.from_pretrained(dense), Conditions())
    model = load_pruned(pruned)
    return watch.ratio(model, find_groups(model), {}, seconds=seconds)


def even_macs(dense: Path, share: float, most: float) -> float:
    """Return the MACs at which equal widths in all layers take this share of the time: by halving, seven times."""
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    watch, low, high = Stopwatch(model, Conditions()), 0.3 * most, min(1.0, 1.6 * most)
    for _ in range(7):
        middle, smaller = (low + high) / 2, copy.deepcopy(model)
        pruners = [one(score="l1", allocation="uniform") for one in (HeadPruner, NeuronPruner)]
        prune(smaller, pruners, target=Target(macs=middle))
        fast = watch.ratio(smaller, find_groups(smaller), {}, seconds=3) <= share
        low, high = (middle, high) if fast else (low, middle)
    return round(low, 4)


def train(options: argparse.Namespace, dense: Path, seed: int, output: Path, settings: list[str]) -> dict[str, Any]:
    """Run the recipe, unless it has ended before; return what its report says."""
    cache = f"distillation.cache={options.work / 'teacher'}"
    common = [*quality_sst2.overrides(options, dense, output, seed), "dense=null", cache]
    start = time.time()
    report = hf_prune.run("minilm_sst2", [*common, *settings])
    told = {name: report.settings[name] for name in ("asked_ms", "measured_ms") if name in report.settings}
    kept = {name: len(units) for name, units in report.kept.items()}
    return {**told, "macs_left": report.settings.get("macs_left"), "kept": kept, "seconds": round(time.time() - start)}


def compare(options: argparse.Namespace, dense: Path, ratio: Fraction, seed: int) -> None:
    done = {tuple(one[k] for k in KEY): one for one in load_records(NAME)}
    share = 0.0
    for method in ("macs", "time", "even"):
        note = {"task": options.data.name, "method": method, "ratio": str(ratio), "seed": seed}
        if (record := done.get(tuple(note.values()))) is None:
            output = options.work / f"{method}-{str(ratio).replace('/', '_')}-{seed}"
            if method == "macs":
                settings = [*FREE, f"target.macs={float(ratio)}"]
            elif method == "time":
                settings = [*FREE, f"target={{speedup: {1 / share:.4f}}}"]
            else:
                settings = [*EVEN, f"target.macs={even_macs(dense, share, float(ratio))}"]
            record = {**note, "settings": settings, **train(options, dense, seed, output, settings)}
            folder = output / "model"
            record |= {"speedup": round(1 / share_of_time(folder, dense), 3)}
            record |= quality(load_pruned(folder), dense, options.data)
            add_record(NAME, record, key=KEY)
        if method == "macs":
            share = 1 / record["speedup"]


def table() -> None:
    print("| task | MACs that set it | seed | target | MACs left | speed-up | accuracy | cross-entropy | KL to dense |")
    print("| --- " * 9 + "|")
    pruned = [one for one in load_records(NAME) if "macs_left" in one]  # not the ready-made model
    for one in sorted(pruned, key=lambda one: (one["task"], one["ratio"], one["seed"])):
        numbers = f"{one['macs_left']:.3f} | {one['speedup']:.2f}x | {100 * one['accuracy']:.2f}"
        losses = f"{one['cross_entropy']:.4f} | {one['kl_to_dense']:.4f}"
        print(f"| {one['task']} | {one['ratio']} | {one['seed']} | {one['method']} | {numbers} | {losses} |")


def plot(options: argparse.Namespace) -> None:
    """Draw accuracy over speed-up into docs/equal_time.png, beside a ready-made model of half the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    records = [one for one in load_records(NAME) if one["task"] == "sst2"]
    named = {"macs": "target of MACs", "time": "target of time", "even": "equal widths"}
    for (method, label), marker in zip(named.items(), "os^"):
        found = [one for one in records if one["method"] == method]
        axes.scatter(
            [one["speedup"] for one in found], [100 * one["accuracy"] for one in found], marker=marker, label=label
        )
    half = next(one for one in load_records("quality_sst2") if one["method"] == quality_sst2.READY_MADE)
    dense, half_size = (
        AutoModelForSequenceClassification.from_pretrained(options.models / name)
        for name in (quality_sst2.DENSE, quality_sst2.READY_MADE)
    )
    share = Stopwatch(dense, Conditions()).ratio(half_size, find_groups(half_size), {}, seconds=6)
    note = {"task": "sst2", "method": quality_sst2.READY_MADE, "ratio": "1/2", "seed": 0}
    add_record(NAME, {**note, "speedup": round(1 / share, 3), "accuracy": half["accuracy"]}, key=KEY)
    axes.scatter([1 / share], [100 * half["accuracy"]], marker="x", label="paraphrase-MiniLM-L3, fine-tuned")
    whole = next(one for one in load_records("quality_sst2") if one["method"] == "dense")
    axes.scatter([1], [100 * whole["accuracy"]], marker="D", color="black", label="dense MiniLM-L6")
    axes.set(xlabel="times as fast as dense (ONNX Runtime, one thread)", ylabel="accuracy on SST-2, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(__file__).resolve().parent.parent / "docs" / "equal_time.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/equal_time"))
    parser.add_argument("--ratios", nargs="+", type=Fraction, default=[Fraction(1, 10), Fraction(1, 3)])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", action="store_true", help="write docs/equal_time.png")
    options = parser.parse_args()
    if options.table or options.plot:
        return table() if options.table else plot(options)
    options.budget = "small"
    dense, _ = quality_sst2.fine_tune(options, quality_sst2.DENSE, 0)
    for ratio in options.ratios:
        for seed in options.seeds:
            compare(options, dense, ratio, seed)
    return None


if __name__ == "__main__":
    main()
