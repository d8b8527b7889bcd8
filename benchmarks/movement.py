"""Why movement collapses in one shot, and in short runs from a model that is fine-tuned: what leaves points one way.

    python benchmarks/movement.py --models FOLDER --data FOLDER [--shares 0.01 0.1 0.5]

MiniLM-L6, fine-tuned on SST-2 (the small budget of `quality_sst2.py`): single weights leave by `-w dL/dw` over 512
sentences, the least first, and are judged on the validation split. `signs drawn` removes by numbers of the same sizes
with signs by chance. `first_order` is what the gradient says the loss becomes less by. Writes results/movement.json.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import pandas
import quality_sst2
import torch
from common import add_record
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import WeightPruner

ROWS, SIZE = 512, 32


def batches_of(rows: pandas.DataFrame, tokenizer: Any) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(rows), SIZE):
        some = rows.iloc[start : start + SIZE]
        batch = tokenizer(some["sentence"].tolist(), padding=True, truncation=True, max_length=64, return_tensors="pt")
        found.append({**batch, "labels": torch.tensor(some["label"].tolist())})
    return found


@torch.inference_mode()
def quality(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    outputs = [model(**batch) for batch in batches]
    rows = [len(batch["labels"]) for batch in batches]
    loss = sum(float(output.loss) * count for output, count in zip(outputs, rows))
    right = sum(int((output.logits.argmax(-1) == batch["labels"]).sum()) for output, batch in zip(outputs, batches))
    return {"loss": round(loss / sum(rows), 4), "accuracy": round(right / sum(rows), 4)}


def remove(model: Any, scores: dict[str, Tensor], share: float) -> Any:
    """Return a copy without the weights that score least."""
    pruned = copy.deepcopy(model)
    least = torch.cat([score.flatten() for score in scores.values()]).kthvalue(
        round(share * sum(score.numel() for score in scores.values()))
    )
    with torch.no_grad():
        for name, score in scores.items():
            pruned.get_parameter(name).mul_(score > least.values)
    return pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/equal_time"), help="as equal_time.py's")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.1, 0.5])
    options = parser.parse_args()
    options.budget = "small"
    dense, _ = quality_sst2.fine_tune(options, quality_sst2.DENSE, 0)
    model, tokenizer = (one.from_pretrained(dense) for one in (AutoModelForSequenceClassification, AutoTokenizer))
    train, validation = (pandas.read_parquet(options.data / f"{split}.parquet") for split in ("train", "validation"))
    seen, judged = (batches_of(rows, tokenizer) for rows in (train.sample(ROWS, random_state=1), validation))
    for batch in seen:
        model.eval()(**batch).loss.backward()
    parameters = {name: model.get_parameter(name) for name in WeightPruner(sparsity=0.5).choose_weights(model)}
    scores = {name: (-one * one.grad / len(seen)).detach() for name, one in parameters.items()}
    torch.manual_seed(0)
    drawn = {name: score * (torch.randint(0, 2, score.shape) * 2 - 1) for name, score in scores.items()}
    add_record("movement", {"by": "dense", "share": 0.0, "seed": 0, **quality(model, judged)}, key=("by", "share"))
    for share in options.shares:
        for by, values in (("movement", scores), ("signs drawn", drawn)):
            pruned = remove(model, values, share)
            gone = [score[pruned.get_parameter(name) == 0] for name, score in scores.items()]
            first_order = -sum(float(one.sum()) for one in gone)
            record = {
                "by": by,
                "share": share,
                "seed": 0,
                "first_order": round(first_order, 3),
                **quality(pruned, judged),
            }
            add_record("movement", record, key=("by", "share"))


if __name__ == "__main__":
    main()
