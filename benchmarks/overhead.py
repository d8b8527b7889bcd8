"""What the callback costs a Trainer: step time and memory while it prunes, against the same Trainer without it.

OMP_NUM_THREADS=1 python benchmarks/overhead.py [--model FOLDER] [--steps 200] [--batch 32] [--bf16] [--only units]

Two Trainers of one process take turns, a step each, so that both see the same machine. Writes results/overhead.json:
`wall` and `cpu` are sums over all steps (changes of masks among them), `median` is the median of paired steps, and
`peak` the share of a GPU's memory. `gpu.py` uses the same functions.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import transformers
from common import add_record
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_prune import HeadPruner, NeuronPruner, PruningCallback, Schedule, Target, WeightPruner

LENGTH, WARM = 64, 5
WHOLE = Schedule("cubic", begin=0.0, end=1.0, frequency=50)  # active from the first step to the last
PRUNING = {
    "units": lambda: PruningCallback([HeadPruner(), NeuronPruner()], WHOLE, target=Target(macs=0.5)),
    "weights": lambda: PruningCallback(WeightPruner(sparsity=0.5, score="l1"), WHOLE),
    "weights_taylor": lambda: PruningCallback(WeightPruner(sparsity=0.5, score="taylor"), WHOLE),
    "weights_movement": lambda: PruningCallback(WeightPruner(sparsity=0.5, score="movement"), WHOLE),
    "units_reversible": lambda: PruningCallback(
        [HeadPruner(reversible=True), NeuronPruner(reversible=True)], WHOLE, target=Target(macs=0.5)
    ),
}


class Turns(TrainerCallback):
    """Let two Trainers in two threads take steps in turn, and note how long each of their steps takes."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other, self.wall, self.cpu = mine, other, list[float](), list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other Trainer's step to end."""
        self.mine.acquire()
        _wait()
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Hand over."""
        _wait()
        self.wall.append(time.perf_counter() - self.start[0])
        self.cpu.append(time.process_time() - self.start[1])
        self.other.release()

    def leave(self, steps: int) -> None:
        """Let the other go on alone, also where this one has failed."""
        self.other.release(steps)


class Memory(TrainerCallback):
    """Note the most bytes that live tensors hold after a step, gradients and moments among them."""

    most = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count every tensor that Python knows."""
        gc.collect()
        found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        found += [one.grad for one in found if one.is_leaf and one.grad is not None]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
        self.most = max(self.most, sum(storages.values()))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    if arguments.model:
        return transformers.AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32)
    return BertForSequenceClassification(BertConfig())  # the shape of BERT base


def trainer(model: Any, arguments: argparse.Namespace, steps: int, folder: str, callbacks: list[Any]) -> Trainer:
    draw, length = torch.Generator().manual_seed(0), getattr(arguments, "length", LENGTH)
    rows = [
        {
            "input_ids": torch.randint(5, 1000, (length,), generator=draw),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": int(torch.randint(2, (), generator=draw)),
        }
        for _ in range(arguments.batch * 4)
    ]
    settings = TrainingArguments(
        folder,
        per_device_train_batch_size=arguments.batch,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        bf16=arguments.bf16,
        fp16=getattr(arguments, "fp16", False),
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),  # or else bf16 is refused
    )
    return Trainer(model, settings, train_dataset=rows, callbacks=callbacks)


def train_in_turn(run: Trainer, turns: Turns, steps: int) -> None:
    try:
        run.train()
    finally:
        turns.leave(steps)


def compare_time(kind: str, dense: Any, arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    """Return how much longer steps take with the callback."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    plain, pruned = Turns(first, second), Turns(second, first)
    runs = [
        trainer(copy.deepcopy(dense), arguments, arguments.steps, folder, [plain]),
        trainer(copy.deepcopy(dense), arguments, arguments.steps, folder, [PRUNING[kind](), pruned]),
    ]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train_in_turn, *pair, arguments.steps) for pair in zip(runs, (plain, pruned), strict=True)]
    for job in jobs:
        job.result()  # raises what it raised
    pairs = list(zip(plain.wall, pruned.wall, strict=True))[WARM:]
    return {
        "step_ms": round(1000 * statistics.median(plain.wall[WARM:]), 2),
        "wall": round(sum(pruned.wall[WARM:]) / sum(plain.wall[WARM:]), 4),
        "cpu": round(sum(pruned.cpu[WARM:]) / sum(plain.cpu[WARM:]), 4),
        "median": round(statistics.median(theirs / mine for mine, theirs in pairs), 4),
    }


def compare_memory(kind: str, dense: Any, arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    """Return how many bytes more live after a step, for each weight that may be pruned."""
    most = []
    for extra in ([], [PRUNING[kind]()]):
        memory = Memory()
        trainer(copy.deepcopy(dense), arguments, 6, folder, [*extra, memory]).train()
        most.append(memory.most)
    prunable = sum(one.weight.numel() for one in dense.base_model.modules() if isinstance(one, torch.nn.Linear))
    return {"prunable_weights": prunable, "bytes_per_weight": round((most[1] - most[0]) / prunable, 4)}


def compare_peaks(kind: str, dense: Any, arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    """Return how much more a GPU's memory is filled at the worst moment; nothing where there is none."""
    peaks = []
    for extra in ([], [PRUNING[kind]()]) if torch.cuda.is_available() else ():
        gc.collect()  # Trainers of before
        torch.cuda.reset_peak_memory_stats()
        trainer(copy.deepcopy(dense), arguments, 12, folder, extra).train()
        peaks.append(torch.cuda.max_memory_allocated())
    return {"peak_mb": round(peaks[0] / 1e6, 1), "peak": round(peaks[1] / peaks[0], 4)} if peaks else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; left out, a random BERT base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(PRUNING), choices=list(PRUNING))
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    dense = build(arguments)
    shape = f"{dense.config.num_hidden_layers} layers of {dense.config.hidden_size}"
    for kind in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            told = compare_time(kind, dense, arguments, folder) | compare_memory(kind, dense, arguments, folder)
            told |= compare_peaks(kind, dense, arguments, folder)
        settings = {"batch": arguments.batch, "tokens": LENGTH, "steps": arguments.steps, "bf16": arguments.bf16}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        record = {"kind": kind, "shape": shape, "device": device, **settings, "seed": 0, **told}
        add_record("overhead", record, key=("kind", "shape", "device", "bf16"))


if __name__ == "__main__":
    main()
