"""Every method once, under the same budget: scores without training on STS-B, training methods on SST-2.

    python benchmarks/methods.py scores --models FOLDER --data FOLDER/stsb [--seeds 0]
    python benchmarks/methods.py training --models FOLDER --data FOLDER/sst2 [--only movement rigl] [--seeds 0]
    python benchmarks/methods.py lm --models FOLDER --data FOLDER [--seeds 0 1 2]
    python benchmarks/methods.py --table

`scores`: MiniLM-L6 as it is published, 256 pairs of the train split to calibrate, 1,379 pairs of the test split;
Spearman of the cosine with what people said. Units leave to 3/4 and 1/2 of the encoder's MACs, half of single weights;
and, calibrated with 64 pairs as some scores ask about each unit by itself, a quarter of the heads, two or three layers.
`training`: from one dense fine-tune (the small budget of `quality_sst2.py`), one epoch of 16,000 sentences (500 steps)
with the dense model as teacher; units to a fifth of the MACs, single weights to 80 % zeros. Accuracy, cross-entropy and
KL to the dense model are those of validation and test together.
`lm`: stories260k, fine-tuned on WikiText-2 as in `distillation.py`, then as many steps again while heads and neurons
leave to 3/4 and 1/2 of the MACs and the fine-tuned model teaches; the loss in nats a token.
Writes results/methods.json; it goes on where it was.
`python benchmarks/methods_page.py` then writes docs/methods.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import distillation
import equal_time
import pandas
import quality_sst2
import torch
from common import add_record, load_records
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_prune import (
    Distillation,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    WeightPruner,
    load_pruned,
    prune,
)
from hf_prune.scores import SCORES

NAME, KEY = "methods", ("what", "method", "left", "seed")
ONE_BY_ONE = ("greedy", "loss_without")  # a pass over the data for each of 9,288 units
FEW: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {  # pruners of few units, and how many leave
    "heads": (HeadPruner, {"3/4": 1 / 4}),
    "layers": (LayerPruner, {"2/3": 1 / 3, "1/2": 1 / 2}),
}

UNITS = "pruners={{heads: {0}, neurons: {0}}}"
WEIGHTS = ("target=null", "shrink_during_training=false")
LATE = "schedule={kind: oneshot, begin: 0.6, end: 0.6}"
PHASES = "schedule={steps: [[50, 1], [150, 0], [250, 1], [300, 0], [350, 1]]}"
STAYS = "shrink_during_training=false"


def units(score: str, *further: str) -> list[str]:
    return [UNITS.format(f"{{score: {score}}}"), "target={macs: 0.2}", *further]


def weights(settings: str, *further: str) -> list[str]:
    return [f"pruners={{weights: {{{settings}}}}}", *WEIGHTS, *further]


TRAINING: dict[str, list[str]] = {
    "units, taylor, cubic": units("taylor"),
    "units, taylor, oneshot": units("taylor", "schedule={kind: oneshot, begin: 0.02, end: 0.02}"),
    "units, taylor, linear": units("taylor", "schedule={kind: linear, begin: 0.06, end: 0.6, frequency: 30}"),
    "units, taylor, even widths": [
        UNITS.format("{score: taylor, allocation: uniform}"),
        "target={macs: 0.2}",
    ],
    "units, as_is": [UNITS.format("{score: taylor, allocation: as_is}"), "target={macs: 0.2}"],
    **{
        f"units, taylor, {kind}": units("taylor", f"schedule={{kind: {kind}, begin: 0.06, end: 0.6, frequency: 30}}")
        for kind in ("polynomial", "exponential", "cosine")
    },
    "units, guarded by accuracy": units("taylor", "guard={metric: accuracy, max_drop: 0.01}", STAYS),
    "units, random": units("random"),
    "units, l2": units("l2"),
    "units, movement": units("movement", STAYS),
    "units, activation": units("activation"),
    "units, output_norm": units("output_norm"),
    "units, l0": units("l0", LATE),
    "units, movement_adam": units(
        "movement_adam", STAYS, "schedule={kind: cubic, begin: 0.2, end: 0.6, frequency: 30}"
    ),
    "layers, block_influence": ["pruners={layers: {score: block_influence, sparsity: 0.8}}", "target=null"],
    "weights, l1, cubic": weights("sparsity: 0.8, score: l1"),
    "weights, l1, oneshot": weights("sparsity: 0.8, score: l1", "schedule={kind: oneshot, begin: 0.02, end: 0.02}"),
    "weights, random": weights("sparsity: 0.8, score: random"),
    "weights, taylor": weights("sparsity: 0.8, score: taylor"),
    "weights, fisher": weights("sparsity: 0.8, score: fisher"),
    "weights, wanda": weights("sparsity: 0.8, score: wanda"),
    "weights, movement": weights("sparsity: 0.8, score: movement"),
    "weights, movement_adam": weights("sparsity: 0.8, score: movement_adam"),
    "weights, movement, each matrix": weights("sparsity: 0.8, score: movement, allocation: uniform"),
    "weights, movement, final": weights("sparsity: 0.8, score: movement, rule: final"),
    "weights, soft_movement": weights("sparsity: 0.8, score: soft_movement"),
    "weights, rigl": weights(
        "sparsity: 0.8, score: l1, rule: rigl, allocation: uniform",
        "schedule={kind: constant, begin: 10, end: 0.75, frequency: 30}",
    ),
    "weights, set": weights(
        "sparsity: 0.8, score: l1, rule: set, allocation: uniform",
        "schedule={kind: constant, begin: 10, end: 0.75, frequency: 30}",
    ),
    **{
        f"weights, rewinding {what}": weights(
            "sparsity: 0.8, score: l1", f"rewinding={{rounds: 2, to: 0.1, what: {what}}}", "schedule=null"
        )
        for what in ("weights", "rate")
    },
    "weights, AC/DC": weights("sparsity: 0.8, score: l1, rule: from_zero", PHASES),
    **{
        f"units, regularised by {kind}, {strength:g}": units(
            "l1", LATE, f"regularisation={{kind: {kind}, strength: {strength}}}"
        )
        for kind, strength in (("l1", 0.05), ("group_lasso", 2.0))
    },
    **{
        f"units, regularised by {kind}": units("l1", LATE, f"regularisation={{kind: {kind}, strength: {strength}}}")
        for kind, strength in (("l1", 1.0), ("group_lasso", 20.0), ("sensitivity", 20.0), ("growing", 200.0))
    },
}

LM_STEPS, LM_LEFT = 250, ("3/4", "1/2")
RAMP, ONCE = Schedule(begin=0.05, end=0.6, frequency=16), Schedule("oneshot", begin=0.6, end=0.6)
LM: dict[str, tuple[dict[str, str], Schedule]] = {
    "taylor": ({}, RAMP),
    "l0": ({"score": "l0"}, ONCE),
    "movement": ({"score": "movement"}, RAMP),
    "l2, even widths": ({"score": "l2", "allocation": "uniform"}, RAMP),
}


# --- scores without training -----------------------------------------------------------------------------------------


def pairs(path: Path, rows: int | None = None) -> pandas.DataFrame:
    frame = pandas.read_parquet(path)
    return frame if rows is None else frame.sample(rows, random_state=0)


def cosines(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the cosine of each pair's two means over tokens; the first sentences lead."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return cosine_similarity(*((hidden * mask).sum(1) / mask.sum(1)).chunk(2))


def batches_of(frame: pandas.DataFrame, tokenizer: Any, size: int = 32) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(frame), size):
        some = frame.iloc[start : start + size]
        texts = [*some["sentence1"], *some["sentence2"]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        found.append({**batch, "labels": torch.tensor(some["score"].to_numpy() / 5, dtype=torch.float32)})
    return found


@torch.inference_mode()
def spearman(model: Any, batches: list[dict[str, Any]]) -> float:
    model.eval()
    found = torch.cat([cosines(model, batch) for batch in batches])
    return round(100 * float(spearmanr(found, torch.cat([batch["labels"] for batch in batches])).statistic), 2)


def scores(options: argparse.Namespace) -> None:
    """One shot of every score, for units and for single weights."""
    folder = options.models / quality_sst2.DENSE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    train, test = (pairs(options.data / f"{split}.parquet", rows) for split, rows in (("train", 256), ("test", None)))
    calibration, test = (
        batches_of(train, tokenizer),
        batches_of(test.sort_values("sentence1", key=lambda s: s.str.len()), tokenizer),
    )
    once("scores", "dense", "1", 0, lambda: {"spearman": spearman(dense, test)})
    for name in SCORES:
        for of, left in (("unit", "3/4"), ("unit", "1/2"), ("weight", "1/2")):
            if (of == "weight" and of not in SCORES[name]) or name in ONE_BY_ONE:
                continue
            for seed in options.seeds if name == "random" else options.seeds[:1]:
                asked = (dense, name, of, left, calibration, test, seed)
                once("scores", f"{of}s, {name}", left, seed, lambda asked=asked: one_shot(*asked))
        for of, (kind, shares) in FEW.items():
            for left, sparsity in shares.items():
                asked = (dense, kind(score=name, sparsity=sparsity), calibration[:2], test, 0)
                once("scores", f"{of}, {name}", left, 0, lambda asked=asked: pruned(*asked))


def one_shot(
    dense: Any, name: str, of: str, left: str, calibration: list[Any], test: list[Any], seed: int
) -> dict[str, Any]:
    share = float(Fraction(left))
    if of == "weight":
        return pruned(dense, WeightPruner(sparsity=1 - share, score=name), calibration, test, seed)
    pruners = [HeadPruner(score=name), NeuronPruner(score=name)]
    return pruned(dense, pruners, calibration, test, seed, target=Target(macs=share))


def pruned(
    dense: Any, pruners: Any, calibration: list[Any], test: list[Any], seed: int, target: Target | None = None
) -> dict[str, Any]:
    """Prune a copy; return its correlation, or why it was refused."""
    model = copy.deepcopy(dense)
    loss = lambda model, batch: mse_loss(cosines(model, batch), batch["labels"])  # noqa: E731
    try:
        report = prune(model, pruners, target=target, data=calibration, loss=loss, seed=seed)
    except PruningError as refused:
        return {"refused": str(refused)}
    return {"spearman": spearman(model, test), "macs_left": report.settings.get("macs_left")}


# --- methods of training ---------------------------------------------------------------------------------------------


def training(options: argparse.Namespace) -> None:
    """One run of every method."""
    options.budget = "small"
    dense, _ = quality_sst2.fine_tune(options, quality_sst2.DENSE, 0)
    for seed in options.seeds:
        for name, settings in TRAINING.items():
            if not options.only or any(word in name for word in options.only):
                left = "1/5" if "weights" not in name else "20 %"
                asked = (options, dense, name, settings, seed)
                once("training", name, left, seed, lambda asked=asked: run_one(*asked))


def run_one(options: argparse.Namespace, dense: Path, name: str, settings: list[str], seed: int) -> dict[str, Any]:
    output = options.work / "methods" / "".join(one if one.isalnum() else "_" for one in f"{name}-{seed}")
    schedule = "schedule={kind: cubic, begin: 0.06, end: 0.6, frequency: 30}"
    told = equal_time.train(options, dense, seed, output, ["train.epochs=1", schedule, *settings])
    told.pop("kept")
    return {"settings": settings, **told, **equal_time.quality(load_pruned(output / "model"), dense, options.data)}


# --- a language model ------------------------------------------------------------------------------------------------


def language_model(options: argparse.Namespace) -> None:
    """Fine-tune with each seed, then prune by each method."""
    options.work = options.work / "lm"
    for seed in options.seeds:
        set_seed(seed)
        rows = distillation.windows(options, "train", 12000), distillation.windows(options, "valid", 200)
        dense = AutoModelForCausalLM.from_pretrained(options.models / "stories260k", dtype=torch.float32)
        trainer = distillation.lm_trainer(options, dense, LM_STEPS, seed, rows)
        trainer.train()
        once("lm", "dense", "1", seed, lambda trainer=trainer: {"loss": round(trainer.evaluate()["eval_loss"], 4)})
        for name in LM:
            for left in LM_LEFT:
                asked = (options, dense, name, left, seed, rows)
                once("lm", name, left, seed, lambda asked=asked: prune_lm(*asked))


def prune_lm(options: argparse.Namespace, dense: Any, name: str, left: str, seed: int, rows: Any) -> dict[str, Any]:
    told, schedule = LM[name]
    set_seed(seed)
    callback = PruningCallback(
        [HeadPruner(**told), NeuronPruner(**told)], schedule, target=Target(macs=float(Fraction(left))), seed=seed
    )
    taught = {"teacher": dense, "distillation": Distillation(hard=0.5, logits=0.5)}
    trainer = distillation.lm_trainer(options, copy.deepcopy(dense), LM_STEPS, seed, rows, **taught)
    callback.attach(trainer).train()
    loss, left_of = trainer.evaluate()["eval_loss"], callback.report.settings["macs_left"]
    return {"loss": round(loss, 4), "macs_left": round(left_of, 4)}


def once(what: str, method: str, left: str, seed: int, run: Callable[[], dict[str, Any]]) -> None:
    """Run what has no record yet, and add one."""
    note = {"what": what, "method": method, "left": left, "seed": seed}
    if not any(all(one[key] == note[key] for key in KEY) for one in load_records(NAME)):
        start = time.time()
        found = run()
        add_record(NAME, {**note, **found, "seconds": round(time.time() - start)}, key=KEY)


def table() -> None:
    records = load_records(NAME)
    print("| score, without training | 3/4 | 1/2 |\n| --- | --- | --- |")
    cells: dict[str, dict[str, Any]] = {}
    for one in records:
        if one["what"] == "scores":
            cells.setdefault(one["method"], {})[one["left"]] = one.get("spearman", "refused")
    for name, row in cells.items():
        print(f"| {name} | {row.get('3/4', '')} | {row.get('1/2', row.get('1', ''))} |")
    print("\n| method, with training | left | accuracy | cross-entropy | KL to dense | seed |\n" + "| --- " * 6 + "|")
    for one in records:
        if one["what"] == "training":
            numbers = f"{100 * one['accuracy']:.2f} | {one['cross_entropy']:.4f} | {one['kl_to_dense']:.4f}"
            print(f"| {one['method']} | {one['left']} | {numbers} | {one['seed']} |")
    print("\n| language model | left | loss, nats | seed |\n| --- | --- | --- | --- |")
    for one in records:
        if one["what"] == "lm":
            print(f"| {one['method']} | {one['left']} | {one['loss']:.4f} | {one['seed']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["scores", "training", "lm"])
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/equal_time"), help="as equal_time.py's: one dense model"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", help="training methods whose names have one of these words")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table or options.what is None:
        return table()
    return {"scores": scores, "training": training, "lm": language_model}[options.what](options)


if __name__ == "__main__":
    main()
