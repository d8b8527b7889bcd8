"""Which score removes the right layers: the loss of a language model after one shot, without training.

    python benchmarks/layers.py --models stories260k --text input.txt.gz
    python benchmarks/layers.py --models SmolLM2-135M --text test.tokens.gz --left 0.9 0.7 --windows 8 --beside
    python benchmarks/layers.py --table

Calibration takes the first windows of the text, evaluation the last ones. A score that needs the model's own loss sees
calibration alone. `--beside` measures what layers compete with: KV groups (or heads) and neurons by Taylor, at the
share of MACs that as many layers leave. It goes on where results/layers.json ends; the table has the means from which
the default of `LayerPruner` follows. Of 30 layers `greedy` makes some 270 passes over the calibration data for 0.7.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import add_record, load_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import HeadPruner, LayerPruner, NeuronPruner, Target, prune

SCORES = ("random", "l2", "taylor", "output_norm", "block_influence", "loss_without", "greedy")
NAME, KEY, UNITS = "layers", ("model", "text", "score", "left"), "taylor, of KV groups and neurons"


def windows(model: str, text: Path, length: int, count: int) -> tuple[list[Any], list[Any]]:
    """Return the first and the last windows of a text as batches."""
    data = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    told, tokenizer = data.decode("utf-8", "replace"), AutoTokenizer.from_pretrained(model)
    letters = 12 * length * count  # more than any tokenizer takes
    found = []
    for part, from_end in ((told[:letters], False), (told[-letters:], True)):
        ids = tokenizer(part, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        ids = ids[-length * count :] if from_end else ids[: length * count]
        found.append([{"input_ids": one, "labels": one} for one in ids.view(count, 1, length)])
    return found[0], found[1]


@torch.no_grad()
def loss_of(model: Any, batches: list[Any]) -> float:
    model.eval()
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def measure(model: str, text: Path, given: argparse.Namespace) -> None:
    """Measure the dense model, and then what has no record yet."""
    calibration, evaluation = windows(model, text, given.length, given.windows)
    note = {"model": Path(model).name, "text": f"{text.parent.name}/{text.name}"}
    note |= {"windows": given.windows, "length": given.length}
    scores = [*given.scores, *([UNITS] if given.beside else [])]
    for score, left in [("dense", 1.0), *((score, left) for left in given.left for score in scores)]:
        told = {**note, "score": score, "left": left}
        if any(all(old[key] == told[key] for key in KEY) for old in load_records(NAME)):
            continue
        found: dict[str, Any] = {}
        one = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if score != "dense":
            found = cut(one, score, left, calibration)
        loss = loss_of(one, evaluation)
        add_record(NAME, {**told, "loss": loss, "perplexity": math.exp(loss), **found}, key=KEY)


def cut(model: Any, score: str, left: float, calibration: list[Any]) -> dict[str, Any]:
    """Prune in one shot; say which layers are left, if these leave, and how long it took."""
    start = time.perf_counter()
    if score == UNITS:
        prune(model, [HeadPruner(), NeuronPruner()], target=Target(macs=left), data=calibration)
        return {"seconds": time.perf_counter() - start}
    report = prune(model, LayerPruner(sparsity=1 - left, score=score), data=calibration)
    return {"layers": report.kept["layers"], "seconds": time.perf_counter() - start}


def table() -> None:
    """Print losses; the last column is by how much they are above the dense model's, on the mean of all columns."""
    records = load_records(NAME)
    dense = {(one["model"], one["text"]): one["loss"] for one in records if one["score"] == "dense"}
    cuts = [one for one in records if one["score"] != "dense"]
    columns = dict.fromkeys((one["model"], one["text"], one["left"]) for one in cuts)
    print("| score |", *(f"{model}, {text}, {left} |" for model, text, left in columns), "above dense |")
    print("| --- " * (len(columns) + 2) + "|")
    for score in dict.fromkeys(one["score"] for one in cuts):
        losses = {(one["model"], one["text"], one["left"]): one["loss"] for one in cuts if one["score"] == score}
        above = [loss - dense[place[:2]] for place, loss in losses.items()]
        cells = [f"{losses[place]:.3f}" if place in losses else "" for place in columns]
        print("|", " | ".join([score, *cells, f"{sum(above) / len(above):.3f}" if all(cells) else ""]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="folders or names of causal language models")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="text files, plain or .gz")
    parser.add_argument("--left", nargs="+", type=float, default=[0.8, 0.6], help="shares of the layers that stay")
    parser.add_argument("--scores", nargs="+", default=list(SCORES))
    parser.add_argument("--windows", type=int, default=16, help="of calibration, and as many of evaluation")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--beside", action="store_true", help="KV groups and neurons at the same share, too")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return table()
    for model in given.models:
        for text in given.text:
            measure(model, text, given)


if __name__ == "__main__":
    main()
