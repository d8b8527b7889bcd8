"""Aim at time: is a model as fast as was asked for, measured apart from the session that chose it?

OMP_NUM_THREADS=1 python benchmarks/aim.py [--model FOLDER] [--speedups 1.5 2 3 5] [--batches 1 8] [--int8 3]

Heads and neurons of a classifier leave by gradients on random inputs: the times do not depend on which. Without a
folder a MiniLM shape (6 layers of 384) with random weights is pruned; image models see 224 x 224 pixels. Dense and
pruned run in turn in ONNX Runtime, in graphs of their own, after the session has ended. Writes results/aim.json: what
was asked, what the session measured, and what was measured then.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from common import add_record
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from hf_prune import HeadPruner, NeuronPruner, Target, find_groups, prune
from hf_prune.timing import Conditions, Stopwatch

LENGTH, PIXELS = 128, 224  # as DINOv2's processor cuts images; its config names the 518 that it was trained with


def build(folder: str | None) -> Any:
    torch.manual_seed(0)
    if folder:
        images = hasattr(AutoConfig.from_pretrained(folder), "image_size")
        kind = AutoModelForImageClassification if images else AutoModelForSequenceClassification
        return kind.from_pretrained(folder)
    shape = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(**shape))


def data_for(model: Any) -> list[dict[str, torch.Tensor]]:
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(4, 3, PIXELS, PIXELS), "labels": torch.arange(4) % 2}]
    ids = torch.randint(5, 1000, (16, 32), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}]


def aim(dense: Any, speedup: float, batch: int, dtype: str) -> dict[str, Any]:
    """Prune a copy to a speed-up, and measure it anew."""
    model, start = copy.deepcopy(dense), time.perf_counter()
    told = {"batch": batch, "length": LENGTH, "image_size": PIXELS, "dtype": dtype}
    pruners = [HeadPruner(min_kept=0), NeuronPruner(min_kept=0)]
    found = prune(model, pruners, target=Target(speedup=speedup, **told), data=data_for(model)).settings
    seconds = time.perf_counter() - start
    watch = Stopwatch(dense, Conditions(**told))
    measured = 1 / watch.ratio(model, find_groups(model), {}, seconds=4)
    told = {"measured_by_session": round(found["dense_ms"] / found["measured_ms"], 3), "measured": round(measured, 3)}
    told |= {"off": round(measured / speedup - 1, 4), "dense_ms": found["dense_ms"], "macs_left": found["macs_left"]}
    share = measured * found["macs_left"]
    return {**told, "speedup_per_macs_ratio": round(share, 3), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; left out, a random MiniLM shape")
    parser.add_argument("--speedups", type=float, nargs="*", default=[1.5, 2, 3, 5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--int8", type=float, nargs="*", default=[])
    given = parser.parse_args()
    dense = build(given.model)
    shape = f"{dense.config.num_hidden_layers} layers of {dense.config.hidden_size}"
    wanted = [("fp32", one) for one in given.speedups] + [("int8", one) for one in given.int8]
    for batch in given.batches:
        for dtype, speedup in wanted:
            asked = {"shape": shape, "dtype": dtype, "batch": batch, "tokens": LENGTH, "asked": speedup, "seed": 0}
            add_record("aim", {**asked, **aim(dense, speedup, batch, dtype)}, key=tuple(asked))


if __name__ == "__main__":
    main()
