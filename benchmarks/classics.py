"""The classical cases of pruning, dense against pruned: small networks of one's own, MiniLM and a small GPT-2.

    python benchmarks/classics.py cnn_digits lstm_digits recommender --seeds 0 1 2
    python benchmarks/classics.py cnn_fashion                  # Debian: apt-get install dataset-fashion-mnist
    python benchmarks/classics.py gpt2_shakespeare
    python benchmarks/classics.py minilm_sst2 --models FOLDER  # with all-minilm-l6-v2 in Hugging Face format
    python benchmarks/classics.py --table

Each case trains a dense model, and prunes it gradually while it trains on for as many steps again. `continued` is the
dense model trained on for the same steps without pruning: what the extra training alone is worth (not for MiniLM).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_record, load_records
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cnn_digits
import lstm_digits
import recommender
from sklearn.metrics import accuracy_score, f1_score, recall_score

from hf_prune import ChannelPruner, NeuronPruner, Pruning, Schedule, WeightPruner
from hf_prune.report import Report, measure_pair

NAME, KEY = "classics", ("case", "seed")
Scores = dict[str, float]


# --- the small networks of the examples ------------------------------------------------------------------------------


def digits_cnn(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    train, test = cnn_digits.load(seed)
    fit = lambda model, **prune: cnn_digits.fit(model, train, 20, **prune)  # noqa: E731
    prune = {"pruners": [ChannelPruner(), NeuronPruner()], "macs": 0.49}
    score = lambda model: cnn_digits.score(model, test)  # noqa: E731
    return compare(cnn_digits.DigitCnn(), fit, prune, score, {"images": test[0][:64]})


def fashion_cnn(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    train, test = (load_fashion(options.fashion, part) for part in ("train", "t10k"))
    fit = lambda model, **prune: cnn_digits.fit(model, train, options.fashion_epochs, **prune)  # noqa: E731
    prune = {"pruners": [ChannelPruner(), NeuronPruner()], "macs": 0.29}
    score = lambda model: cnn_digits.score(model, test)  # noqa: E731
    return compare(cnn_digits.DigitCnn(side=28), fit, prune, score, {"images": test[0][:64]})


def digits_lstm(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    train, test = cnn_digits.load(seed)
    fit = lambda model, **prune: cnn_digits.fit(model, train, 40, rate=5e-3, **prune)  # noqa: E731
    score = lambda model: cnn_digits.score(model, test)  # noqa: E731
    prune = {"pruners": [NeuronPruner()], "macs": 0.38}
    return compare(lstm_digits.DigitLstm(), fit, prune, score, {"images": test[0][:64]})


def recommender_mlp(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    train, test = recommender.make_data(seed)
    fit = lambda model, **prune: recommender.fit(model, train, 20, **prune)  # noqa: E731
    score = lambda model: {"RMSE": recommender.rmse(model, test)}  # noqa: E731
    return compare(recommender.Recommender(), fit, {"macs": 0.38}, score, {"pairs": test[0][:200]})


def load_fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read the IDX files: 60,000 images of 28 x 28 to learn from (`train`), 10,000 to be judged by (`t10k`)."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    return torch.from_numpy(images), torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64))


def compare(
    model: nn.Module,
    fit: Callable[..., Report | None],
    prune: dict[str, Any],
    score: Callable[[nn.Module], Scores],
    inputs: dict[str, Tensor],
) -> dict[str, Any]:
    """Train dense, then from there once more without and once with pruning; measure the first and the last in turn."""
    fit(model)
    continued, pruned = copy.deepcopy(model), copy.deepcopy(model)
    fit(continued)
    fit(pruned, **prune)
    found = figures(model, pruned, score, inputs)
    return found | {"continued": rounded(score(continued))}


def figures(
    dense: Any, pruned: Any, score: Callable[[Any], Scores], inputs: dict[str, Tensor] | None
) -> dict[str, Any]:
    """Return scores, counts and latency of both; inputs of ``None``: one row of 128 tokens."""
    found: dict[str, Any] = {"dense": rounded(score(dense)), "pruned": rounded(score(pruned))}
    for name, one in zip(("dense", "pruned"), measure_pair(dense, pruned, inputs, repeats=50)):
        found[name] |= {"parameters": one.parameters, "nonzero": one.nonzero, "size_mb": round(one.size_mb, 4)}
        found[name] |= {"latency_ms": round(one.latency_ms["torch"], 4)}
        found["latency_of"] = {"batch": one.batch, "length": one.length, "threads": one.threads}
    return found


def rounded(scores: Scores) -> Scores:
    return {name: round(float(value), 5) for name, value in scores.items()}


# --- a small GPT-2 on Shakespeare ------------------------------------------------------------------------------------


def shakespeare_gpt2(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Half of all parameters are zeroed, one by one; 53 % of the matrices in layers, as tables and norms stay."""
    from transformers import GPT2Config, GPT2LMHeadModel

    text = gzip.decompress((options.shared / "data/tinyshakespeare/input.txt.gz").read_bytes()).decode()
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([letters[letter] for letter in text])
    rows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    train, test = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": len(letters)}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    fit = lambda model, **prune: fit_text(model, train, options.gpt2_steps, **prune)  # noqa: E731
    return compare(model, fit, {"sparsity": 0.53}, lambda model: next_token(model, test), {"input_ids": test[:1]})


def fit_text(model: Any, rows: Tensor, steps: int, sparsity: float = 0.0) -> Report | None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    pruner, schedule = WeightPruner(sparsity, score="l1"), Schedule(begin=0.05, end=0.6, frequency=20)
    pruning = sparsity and Pruning(model, pruner, schedule, total_steps=steps, optimizer=optimizer)
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if pruning:
            pruning.after_backward()
        optimizer.step()
        decay.step()
        if pruning:
            pruning.step()
        optimizer.zero_grad()
    return pruning.finish() if pruning else None


@torch.no_grad()
def next_token(model: Any, rows: Tensor) -> Scores:
    """Return how well the next letter is guessed, all letters of the held-out text."""
    found = torch.cat([model.eval()(input_ids=part).logits[:, :-1].argmax(-1) for part in rows.split(64)])
    return classified(rows[:, 1:].flatten(), found.flatten())


def classified(labels: Tensor, found: Tensor) -> Scores:
    macro = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": accuracy_score(labels, found),
        "recall": recall_score(labels, found, **macro),
        "F1": f1_score(labels, found, **macro),
    }


# --- MiniLM on SST-2 -------------------------------------------------------------------------------------------------


def sst2_minilm(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Heads and neurons go until 39.5 % of the encoder's matrices stay: less than 40 % of its parameters."""
    import quality_sst2
    from transformers import AutoTokenizer

    import hf_prune

    options.budget, options.data, options.work = "small", options.shared / "data/sst2", options.output
    dense, _ = quality_sst2.fine_tune(options, quality_sst2.DENSE, seed)
    folder = options.output / f"minilm-{seed}"
    hf_prune.run(
        "minilm_sst2", [*quality_sst2.overrides(options, dense, folder, seed), "dense=null", "target.macs=0.395"]
    )
    tokenizer, models = (
        AutoTokenizer.from_pretrained(dense),
        [hf_prune.load_pruned(one) for one in (dense, folder / "model")],
    )
    sentences, labels = load_sst2(options.data)
    found = figures(*models, lambda model: classified(labels, sentiment(model, tokenizer, sentences)), None)
    for name, model in zip(("dense", "pruned"), models):
        found[name]["encoder_parameters"] = sum(one.numel() for one in model.bert.encoder.parameters())
    return found


def load_sst2(folder: Path) -> tuple[list[str], Tensor]:
    """Return the sentences of validation and test together, and their labels."""
    from datasets import load_dataset

    files = {"test": [str(folder / f"{part}.parquet") for part in ("validation", "test")]}
    rows = load_dataset("parquet", data_files=files, split="test")
    return list(rows["sentence"]), torch.tensor(rows["label"])


@torch.no_grad()
def sentiment(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    found = []
    for start in range(0, len(sentences), 64):
        texts = sentences[start : start + 64]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        found.append(model.eval()(**batch).logits.argmax(-1))
    return torch.cat(found)


# --- all cases -------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {
    "cnn_fashion": fashion_cnn,
    "cnn_digits": digits_cnn,
    "lstm_digits": digits_lstm,
    "recommender": recommender_mlp,
    "minilm_sst2": sst2_minilm,
    "gpt2_shakespeare": shakespeare_gpt2,
}
# share of the parameters that has to go, and the score with what it may lose; RMSE: relative
GOALS = {name: (share, "accuracy", 0.01) for name, share in zip(CASES, (0.7, 0.5, 0.6, 0.6, 0.6, 0.5))}
GOALS["recommender"] = (0.6, "RMSE", 0.01)


def removed(record: dict[str, Any]) -> float:
    """Return the share of parameters (MiniLM: of the encoder's) that went or is zero."""
    name = "encoder_parameters" if "encoder_parameters" in record["dense"] else "nonzero"
    return 1 - record["pruned"][name] / record["dense"][name]


def lost(record: dict[str, Any], against: str = "dense") -> float:
    """Return what pruning cost: accuracy as a difference, RMSE relative to the dense model's."""
    name = GOALS[record["case"]][1]
    before, after = record[against][name], record["pruned"][name]
    return after / before - 1 if name == "RMSE" else before - after


def table() -> None:
    """Print means over seeds; a loss is given against the dense model, and against one that was trained as long."""
    heads = "case | removed | score | dense | pruned | lost | against continued | MB | latency, ms | seeds"
    print(f"| {heads} |\n|{' --- |' * len(heads.split('|'))}")
    for case, (_, name, _) in GOALS.items():
        records = [record for record in load_records(NAME) if record["case"] == case]
        if records:
            print(f"| {' | '.join([case, *cells(records, name)])} | {len(records)} |")


def cells(records: list[dict[str, Any]], name: str) -> list[str]:
    """Return one case's cells, as means over its records."""

    def mean(which: str, key: str) -> float:
        return statistics.mean(record[which][key] for record in records)

    share, loss = (statistics.mean(map(figure, records)) for figure in (removed, lost))
    longer = [lost(record, "continued") for record in records if "continued" in record]
    pairs = [f"{mean('dense', key):.4g} → {mean('pruned', key):.4g}" for key in ("size_mb", "latency_ms")]
    scores = [name, f"{mean('dense', name):.4f}", f"{mean('pruned', name):.4f}"]
    return [f"{share:.1%}", *scores, f"{loss:+.2%}", f"{statistics.mean(longer):+.2%}" if longer else "-", *pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", type=Path, help="folder of Hugging Face models, for minilm_sst2")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="with data/sst2 and data/tinyshakespeare"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/classics"), help="where MiniLM's models go")
    parser.add_argument("--fashion-epochs", type=int, default=5)
    parser.add_argument("--gpt2-steps", type=int, default=1500)
    parser.add_argument("--table", action="store_true", help="print what was recorded")
    options = parser.parse_args()
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"cases must be among {', '.join(CASES)}. Received: {unknown[0]}")
    for case in options.cases:
        for seed in options.seeds:
            start = time.time()
            torch.manual_seed(seed)
            record = {"case": case, "seed": seed, **CASES[case](options, seed)}
            share, name, allowed = GOALS[case]
            met = removed(record) >= share and lost(record) <= allowed
            told = {"goal": f"-{share:.0%} parameters, {name} within 1 %", "removed": round(removed(record), 4)}
            add_record(NAME, {**record, **told, "met": met, "seconds": round(time.time() - start)}, key=KEY)
    if options.table:
        table()


if __name__ == "__main__":
    main()
