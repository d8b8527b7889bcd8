"""What a teacher costs whose logits are kept: wall time of training with it, remembered against asked, in one run.

OMP_NUM_THREADS=1 python benchmarks/teacher_cache.py [--steps 15] [--task lm]

MiniLM's shape (6 layers of 384, random weights) is the teacher; students have all, a third and a tenth of its MACs.
With ``--task lm`` it is a Llama of that shape with 8,000 words, of which 50 of each token are kept. The first of three
epochs fills the memory, the two others are timed; so are those of a Trainer that asks each time. Writes
results/teacher_cache.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
from common import add_record
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from hf_prune import Distillation, DistillationTrainer, HeadPruner, NeuronPruner, Target, prune

BATCH, LENGTH, WORDS, TOP = 32, 64, 8000, 50
SHAPE = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}


class Epochs(TrainerCallback):
    """Notes when each epoch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def seconds(student: Any, teacher: Any, rows: list[dict[str, Any]], cache: Path | None) -> float:
    """Return the time of the last two of three epochs."""
    watch = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=BATCH, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        top_k = TOP if cache and isinstance(teacher, LlamaForCausalLM) else None
        told = Distillation(cache=str(cache) if cache else None, top_k=top_k)
        DistillationTrainer(
            student, arguments, train_dataset=rows, teacher=teacher, distillation=told, callbacks=[watch]
        ).train()
    return watch.ends[2] - watch.ends[0]


def build(task: str, steps: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return a teacher and the rows of an epoch."""
    torch.manual_seed(0)
    if task == "lm":
        teacher = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **SHAPE)).eval()
    else:
        teacher = BertForSequenceClassification(BertConfig(**SHAPE)).eval()
    ids = torch.randint(5, WORDS if task == "lm" else 30000, (steps * BATCH, LENGTH))
    labels = ids if task == "lm" else [n % 2 for n in range(len(ids))]
    return teacher, [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": label} for one, label in zip(ids, labels)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="of an epoch")
    parser.add_argument("--task", choices=("classification", "lm"), default="classification")
    told = parser.parse_args()
    steps = told.steps
    teacher, rows = build(told.task, steps)
    for macs in (1.0, 1 / 3, 0.1):
        student = copy.deepcopy(teacher)
        if macs < 1:
            pruners = [one(score="l1", allocation="uniform") for one in (HeadPruner, NeuronPruner)]
            prune(student, pruners, target=Target(macs=macs))
        with tempfile.TemporaryDirectory() as folder:
            asked = seconds(copy.deepcopy(student), teacher, rows, None)
            kept = seconds(copy.deepcopy(student), teacher, rows, Path(folder))
        record = {
            "task": told.task,
            "macs_left": round(macs, 4),
            "batch": BATCH,
            "tokens": LENGTH,
            "steps": 2 * steps,
            "seed": 0,
        }
        record |= {"asked_s": round(asked, 2), "remembered_s": round(kept, 2), "ratio": round(kept / asked, 3)}
        add_record("teacher_cache", {**record, "threads": torch.get_num_threads()}, key=("task", "macs_left"))


if __name__ == "__main__":
    main()
