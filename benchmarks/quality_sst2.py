"""Accuracy of pruned MiniLM-L6 on SST-2 against its dense self and a ready-made half-size model.

    python benchmarks/quality_sst2.py --models FOLDER --data FOLDER                      # small budget, seed 0
    python benchmarks/quality_sst2.py --models FOLDER --data FOLDER --budget full --ratios 1/3
    python benchmarks/quality_sst2.py --models FOLDER --data FOLDER --latency            # of the saved models, in turn
    python benchmarks/quality_sst2.py --table

FOLDER of models: all-minilm-l6-v2 and paraphrase-minilm-l3-v2 in Hugging Face format; of data: train, validation and
test.parquet with columns sentence and label. Accuracy is on validation and test together. The small budget is 16,000
sentences and 2 epochs, the full one all sentences and 1 epoch; every model gets the same number of steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet
from common import add_record, load_records

NAME = "quality_sst2"
KEY = ("budget", "method", "ratio", "seed")
BUDGETS = {"small": {"epochs": 2, "limit": 16000}, "full": {"epochs": 1, "limit": None}}
DENSE, READY_MADE = "all-minilm-l6-v2", "paraphrase-minilm-l3-v2"


def splits_of(data: Path) -> list[str]:
    """Return the splits of a folder to evaluate on."""
    return [split for split in ("validation", "test") if (data / f"{split}.parquet").is_file()]


def text_of(data: Path) -> str:
    """Return the column of a folder's files that holds the text."""
    names = pyarrow.parquet.read_schema(data / "train.parquet").names
    return "sentence" if "sentence" in names else "text"


def overrides(options: argparse.Namespace, model: Path, output: Path, seed: int) -> list[str]:
    budget = BUDGETS[options.budget]
    common = [
        f"model.name={model}",
        f"data.name={options.data}",
        f"data.text={text_of(options.data)}",
        f"data.evaluation=[{', '.join(splits_of(options.data))}]",
        f"output={output}",
    ]
    common += [f"seed={seed}", f"train.epochs={budget['epochs']}", "onnx=false"]
    common += ["train.disable_dropout=false"]  # as the recipe was when most records were made; half_point.py has both
    return common + ([f"data.train_limit={budget['limit']}"] if budget["limit"] else [])


def fine_tune(options: argparse.Namespace, name: str, seed: int) -> tuple[Path, float]:
    """Train a dense model with the budget; return its folder and accuracy."""
    from hf_prune import workflow
    from hf_prune.recipe import load_recipe
    from hf_prune.report import Report

    folder = options.work / f"{options.budget}-{name}-{seed}"
    epochs = BUDGETS[options.budget]["epochs"]
    recipe = load_recipe(
        "minilm_sst2", [*overrides(options, options.models / name, folder, seed), f"dense.epochs={epochs}"]
    )
    workflow.set_seed(seed)
    job = workflow.prepare(recipe)
    if not (folder / "dense").is_dir():
        workflow.train_dense(job)
    else:
        from transformers import AutoModelForSequenceClassification

        job.model = AutoModelForSequenceClassification.from_pretrained(folder / "dense")
    job.pruned, job.report = job.model, Report()
    workflow.score(job)
    return folder / "dense", job.report.metrics["accuracy"]["dense"]


def run_seed(options: argparse.Namespace, seed: int) -> None:
    import hf_prune

    done = {tuple(record.get(k) for k in KEY) for record in load_records(NAME)}
    start = time.time()
    dense_seed = seed if options.dense_seed is None else options.dense_seed
    dense, accuracy = fine_tune(options, DENSE, dense_seed)
    note = {"budget": options.budget, "seed": seed}
    if dense_seed == seed and (options.budget, "dense", "1", seed) not in done:
        add_record(
            NAME,
            {**note, "method": "dense", "ratio": "1", "accuracy": accuracy, "seconds": round(time.time() - start)},
            key=KEY,
        )
    for ratio in options.ratios:
        if (options.budget, "hf_prune", str(ratio), seed) in done:
            continue
        start = time.time()
        folder = options.work / f"{options.budget}-hf_prune-{str(ratio).replace('/', '_')}-{seed}"
        settings = [*overrides(options, dense, folder, seed), "dense=null", f"target.macs={float(ratio)}", *options.set]
        report = hf_prune.run("minilm_sst2", settings)
        kept = {name: len(units) for name, units in report.kept.items()}
        record = {**note, "method": "hf_prune", "ratio": str(ratio), "accuracy": report.metrics["accuracy"]["pruned"]}
        record |= {
            "dense_accuracy": accuracy,
            "dense_seed": dense_seed,
            "macs_left": report.settings["macs_left"],
            "kept": kept,
        }
        add_record(NAME, record | {"overrides": options.set, "seconds": round(time.time() - start)}, key=KEY)
    if options.ready_made and (options.budget, READY_MADE, "1/2", seed) not in done:
        start = time.time()
        _, accuracy = fine_tune(options, READY_MADE, seed)
        add_record(
            NAME,
            {**note, "method": READY_MADE, "ratio": "1/2", "accuracy": accuracy, "seconds": round(time.time() - start)},
            key=KEY,
        )


def latency(options: argparse.Namespace) -> None:
    """Time ONNX Runtime on dense and pruned in turn: one thread, 128 tokens, batch 1 and 8."""
    from hf_prune import export_onnx, load_pruned
    from hf_prune.report import measure_pair

    dense = options.work / f"{options.budget}-{DENSE}-{options.seeds[0]}" / "dense"
    for ratio in options.ratios:
        pruned = options.work / f"{options.budget}-hf_prune-{str(ratio).replace('/', '_')}-{options.seeds[0]}" / "model"
        if not pruned.is_dir():
            continue
        onnx = tuple(export_onnx(folder, folder.parent / f"onnx-{folder.name}").path for folder in (dense, pruned))
        for batch in (1, 8):
            models = [load_pruned(folder).eval() for folder in (dense, pruned)]
            before, after = measure_pair(*models, onnx=onnx, batch=batch, length=128, repeats=40)
            speedup = {name: round(ms / after.latency_ms[name], 3) for name, ms in before.latency_ms.items()}
            record = {"ratio": str(ratio), "batch": batch, "length": 128, "threads": 1, "speedup": speedup}
            record |= {"dense_ms": before.latency_ms, "pruned_ms": after.latency_ms}
            add_record("latency_sst2", {"budget": options.budget, **record}, key=("budget", "ratio", "batch"))


def table() -> None:
    rows: dict[tuple[str, str, str], list[float]] = {}
    for record in load_records(NAME):
        rows.setdefault((record["budget"], record["method"], record["ratio"]), []).append(100 * record["accuracy"])
    print("| budget | method | MACs left | accuracy | seeds |\n| --- | --- | --- | --- | --- |")
    for (budget, method, ratio), values in rows.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"| {budget} | {method} | {ratio} | {statistics.mean(values):.2f}{spread} | {len(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/quality_sst2"))
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--ratios", nargs="*", type=Fraction, default=[Fraction(1, n) for n in (3, 10, 5, 2)])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dense-seed", type=int, help="prune the dense model of this seed (default: of the same seed)")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides of the recipe")
    parser.add_argument("--ready-made", action="store_true", help="fine-tune the half-size model too")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    if options.latency:
        return latency(options)
    for seed in options.seeds:
        run_seed(options, seed)


if __name__ == "__main__":
    main()
