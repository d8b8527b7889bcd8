"""Which score removes the right layers: the loss of a language model after one shot, without training.

    python benchmarks/layers.py --models stories260k SmolLM2-135M --text input.txt.gz

Calibration takes the first windows of the text, evaluation the last ones. A score that needs the model's own loss sees
calibration alone.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import add_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import LayerPruner, prune

SCORES = ("random", "l2", "taylor", "output_norm", "block_influence", "loss_without", "greedy")


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
    calibration, evaluation = windows(model, text, given.length, given.windows)
    fresh = lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # noqa: E731
    dense, named = loss_of(fresh(), evaluation), {"model": Path(model).name, "text": f"{text.parent.name}/{text.name}"}
    data = {"windows": given.windows, "length": given.length}
    add_record(
        "layers",
        {**named, **data, "score": "dense", "left": 1.0, "loss": dense, "perplexity": math.exp(dense)},
        key=("model", "text", "score", "left"),
    )
    for left in given.left:
        for score in given.scores:
            one, start = fresh(), time.perf_counter()
            report = prune(one, LayerPruner(sparsity=1 - left, score=score), data=calibration)
            took, loss = time.perf_counter() - start, loss_of(one, evaluation)
            found = {"loss": loss, "perplexity": math.exp(loss), "layers": report.kept["layers"], "seconds": took}
            record = {**named, **data, "score": score, "left": left, **found}
            add_record("layers", record, key=("model", "text", "score", "left"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders or names of causal language models")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text files, plain or .gz")
    parser.add_argument("--left", nargs="+", type=float, default=[0.8, 0.6], help="shares of the layers that stay")
    parser.add_argument("--scores", nargs="+", default=list(SCORES))
    parser.add_argument("--windows", type=int, default=16, help="of calibration, and as many of evaluation")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    given = parser.parse_args()
    for model in given.models:
        for text in given.text:
            measure(model, text, given)


if __name__ == "__main__":
    main()
