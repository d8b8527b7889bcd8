"""What each term of distillation brings, while a model is pruned to 1/2 and 1/4 of its MACs.

    python benchmarks/distillation.py lm --models FOLDER --data FOLDER --seeds 0 1 2      # stories260k on WikiText-2
    python benchmarks/distillation.py sst2 --models FOLDER --data FOLDER                  # MiniLM-L6, 16,000 sentences
    python benchmarks/distillation.py --table

FOLDER of models: stories260k, or all-minilm-l6-v2 (in Hugging Face format); of data: wikitext2/*.tokens.gz, or
sst2/{train,validation,test}.parquet with columns sentence and label. A run that is in the results is not done again.

Causal LM: the model is fine-tuned first, then pruned by heads, KV groups and neurons while the fine-tuned one teaches;
the loss (nats a token) is on 200 windows of 128 tokens of the validation file. SST-2: as in quality_sst2.py, accuracy
on validation and test together.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import statistics
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import add_record, load_records

NAME = "distillation"
KEY = ("task", "budget", "terms", "ratio", "seed")
TERMS: dict[str, dict[str, float]] = {
    "none": {"hard": 1.0, "logits": 0.0},
    "logits": {"hard": 0.5, "logits": 0.5},
    "logits + hidden": {"hard": 0.5, "logits": 0.5, "hidden": 1.0},
    "logits + attention": {"hard": 0.5, "logits": 0.5, "attention": 1.0},
    "logits + hidden + attention": {"hard": 0.5, "logits": 0.5, "hidden": 1.0, "attention": 1.0},
}
WINDOW, EVALUATED, BATCH = 128, 200, 16


def is_done(**run: Any) -> bool:
    return any(all(record.get(key) == run[key] for key in KEY) for record in load_records(NAME))


def windows(options: argparse.Namespace, split: str, limit: int) -> list[dict[str, Any]]:
    """Cut a split of WikiText-2 into windows of equal length."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.models / "stories260k")
    with gzip.open(options.data / "wikitext2" / f"{split}.tokens.gz", "rt", encoding="utf-8") as file:
        text = file.read(limit * 800)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:limit]
    return [{"input_ids": row, "labels": row} for row in rows]


def lm_trainer(options: argparse.Namespace, model: Any, steps: int, seed: int, rows: Any, **distil: Any) -> Any:
    """Return a Trainer for the language model, with a teacher where one is given."""
    from transformers import Trainer, TrainingArguments

    from hf_prune import DistillationTrainer

    arguments = TrainingArguments(
        str(options.work / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=40,
        learning_rate=2e-3,
        warmup_steps=steps // 20,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, steps // 4),
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    common = {"model": model, "args": arguments, "train_dataset": rows[0], "eval_dataset": rows[1]}
    return DistillationTrainer(**common, **distil) if distil else Trainer(**common)


def run_lm(options: argparse.Namespace, seed: int) -> None:
    """Fine-tune once, then prune with each set of terms."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from hf_prune import Distillation, HeadPruner, NeuronPruner, PruningCallback, Schedule, Target

    budget = f"{options.steps} steps" if options.rows is None else f"{options.steps} steps, {options.rows} rows"
    runs: list[dict[str, Any]] = [
        {"task": "lm", "budget": budget, "terms": terms, "ratio": str(ratio), "seed": seed}
        for ratio in options.ratios
        for terms in options.terms
    ]
    if all(is_done(**run) for run in runs):
        return
    set_seed(seed)
    rows = windows(options, "train", options.rows or 12000), windows(options, "valid", EVALUATED)
    dense = AutoModelForCausalLM.from_pretrained(options.models / "stories260k", dtype=torch.float32)
    trainer = lm_trainer(options, dense, options.steps, seed, rows)
    trainer.train()
    dense_loss = trainer.evaluate()["eval_loss"]
    for run in runs:
        if is_done(**run):
            continue
        start, pruned, terms = time.time(), copy.deepcopy(dense), run["terms"]
        set_seed(seed)
        callback = PruningCallback(
            [HeadPruner(), NeuronPruner()],
            Schedule(begin=0.05, end=0.6, frequency=max(1, options.steps // 15)),
            target=Target(macs=float(Fraction(run["ratio"]))),
            shrink_during_training=True,
            seed=seed,
        )
        settings = Distillation(**TERMS[terms])
        trainer = lm_trainer(options, pruned, options.steps, seed, rows, teacher=dense, distillation=settings)
        callback.attach(trainer).train()
        loss = trainer.evaluate()["eval_loss"]
        logged = [e for e in trainer.state.log_history if "distillation_hard" in e]
        last = {key: value for key, value in logged[-1].items() if key.startswith("distillation_")}
        record = {**run, "loss": round(loss, 4), "dense_loss": round(dense_loss, 4), "last_terms": last}
        record |= {"macs_left": round(callback.report.settings["macs_left"], 4), "weights": TERMS[terms]}
        add_record(NAME, {**record, "seconds": round(time.time() - start)}, key=KEY)


def run_sst2(options: argparse.Namespace, seed: int) -> None:
    """Fine-tune once, then prune with each set of terms, as `quality_sst2.py` does."""
    import quality_sst2

    import hf_prune

    rows = options.rows or 16000
    quality_sst2.BUDGETS["here"] = {"epochs": options.epochs, "limit": rows}
    options.budget, budget = "here", f"{rows} sentences, {options.epochs:g} epochs"
    options.data = options.data / "sst2"
    options.work = options.work / f"{rows}-{options.epochs:g}"
    pending = [
        (ratio, terms)
        for ratio in options.ratios
        for terms in options.terms
        if not is_done(task="sst2", budget=budget, terms=terms, ratio=str(ratio), seed=seed)
    ]
    dense, dense_accuracy = quality_sst2.fine_tune(options, quality_sst2.DENSE, seed) if pending else ("", 0.0)
    for ratio, terms in pending:
        start = time.time()
        folder = options.work / f"{terms.replace(' ', '')}-{str(ratio).replace('/', '_')}-{seed}"
        settings = [*quality_sst2.overrides(options, dense, folder, seed), "dense=null", f"target.macs={float(ratio)}"]
        settings += [f"distillation.{key}={value}" for key, value in TERMS[terms].items()]
        report = hf_prune.run("minilm_sst2", settings)
        record = {"task": "sst2", "budget": budget, "terms": terms, "ratio": str(ratio), "seed": seed}
        record |= {"accuracy": report.metrics["accuracy"]["pruned"], "dense_accuracy": dense_accuracy}
        record |= {"macs_left": round(report.settings["macs_left"], 4), "weights": TERMS[terms]}
        add_record(NAME, {**record, "seconds": round(time.time() - start)}, key=KEY)


def table() -> None:
    """Print means over seeds, and what each set of terms changes against plain fine-tuning with the same seeds."""
    rows: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for record in load_records(NAME):
        value = 100 * record["accuracy"] if "accuracy" in record else record["loss"]
        rows.setdefault(tuple(record[k] for k in KEY[:4]), {})[record["seed"]] = value  # type: ignore[arg-type]
    print("| task | budget | MACs left | terms | accuracy, or loss (perplexity) | against none | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (task, budget, terms, ratio), values in sorted(rows.items(), key=lambda row: (row[0][0], row[0][3])):
        base = rows.get((task, budget, "none", ratio), {})
        paired = [value - base[seed] for seed, value in values.items() if seed in base]
        spread = f" ± {statistics.stdev(values.values()):.3f}" if len(values) > 1 else ""
        mean = statistics.mean(values.values())
        shown = f"{mean:.2f}{spread}" if task == "sst2" else f"{mean:.4f}{spread} ({math.exp(mean):.2f})"
        gain = f"{statistics.mean(paired):+.3f}" if paired else ""
        print(f"| {task} | {budget} | {ratio} | {terms} | {shown} | {gain} | {len(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("lm", "sst2"))
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--ratios", nargs="+", type=Fraction, default=[Fraction(1, 2), Fraction(1, 4)])
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=list(TERMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, help="training windows or sentences (default: 12,000 or 16,000)")
    parser.add_argument("--epochs", type=float, default=2.0, help="of SST-2")
    parser.add_argument("--steps", type=int, default=250, help="of the language model, dense and again pruned")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table or options.task is None:
        return table()
    for seed in options.seeds:
        (run_lm if options.task == "lm" else run_sst2)(copy.copy(options), seed)


if __name__ == "__main__":
    main()
