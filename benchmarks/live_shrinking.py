"""What removing units while a model trains saves: wall time of masked and shrunk runs, against as many dense steps.

OMP_NUM_THREADS=1 python benchmarks/live_shrinking.py [--steps 20] [--repeats 1] [--processes 1 2] [--macs 0.25]

MiniLM's shape (6 layers of 384, random weights) goes to a quarter of its MACs on a ramp from 10 to 60 % of the steps,
without a teacher; in one process, and under DDP with two (gloo on a CPU), where processes share the rows of a step.
Each time is from the first step's begin to the last one's end, so that changes are in it; the median of `repeats`
counts, and the three kinds take turns. `same` says whether the same units left by masks and live; `difference` is the
largest one of their logits. Writes results/live_shrinking.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import transformers
from common import add_record
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_prune import HeadPruner, NeuronPruner, PruningCallback, Schedule, Target

KINDS = ("dense", "masked", "live")
SHAPE = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # or shapes would draw other numbers


class Watch(TrainerCallback):
    """Notes when the first step begins and the last one ends."""

    begin = end = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, once."""
        self.begin = self.begin or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, when a GPU is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.end = time.perf_counter()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="rows of a step, shared by all processes")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--macs", type=float, default=0.25)
    parser.add_argument("--worker", type=Path, help="of this script alone: where one of several processes writes")
    return parser.parse_args()


def train(kind: str, arguments: argparse.Namespace, folder: str) -> tuple[float, Any, dict[str, Any]]:
    """Train once; return seconds, the model, and what was kept."""
    torch.manual_seed(0)
    model, watch = BertForSequenceClassification(BertConfig(**SHAPE, **NO_DROPOUT)), Watch()
    ids = torch.randint(5, 30000, (arguments.batch * 8, arguments.length))
    rows = [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": n % 2} for n, one in enumerate(ids)]
    settings = TrainingArguments(
        folder, max_steps=arguments.steps, save_strategy="no", report_to="none", disable_tqdm=True,
        per_device_train_batch_size=arguments.batch // int(os.environ.get("WORLD_SIZE", "1")), logging_strategy="no",
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer, callback = Trainer(model, settings, train_dataset=rows), None
    if kind != "dense":
        schedule, target = Schedule("cubic", begin=0.1, end=0.6), Target(macs=arguments.macs)
        pruners, live = [HeadPruner(), NeuronPruner()], kind == "live"
        callback = PruningCallback(pruners, schedule, target=target, shrink_during_training=live)
        callback.attach(trainer)
    trainer.add_callback(watch)
    trainer.train()
    return watch.end - watch.begin, model.eval(), {} if callback is None else callback.report.kept


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return times of all kinds, and whether masks and live shrinking came to the same."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        train("live", argparse.Namespace(**{**vars(arguments), "steps": 3}), folder)  # whatever is slow only once
        for repeat in range(arguments.repeats):
            models, kept = {}, {}
            for kind in (*KINDS[repeat % 3 :], *KINDS[: repeat % 3]):
                took, models[kind], kept[kind] = train(kind, arguments, folder)
                seconds[kind].append(took)
    ids = torch.randint(5, 30000, (8, arguments.length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        masked, live = (models[kind].cpu()(ids).logits for kind in ("masked", "live"))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        **{f"{kind}_s": round(value, 2) for kind, value in medians.items()},
        **{kind: round(medians[kind] / medians["dense"], 3) for kind in ("masked", "live")},
        "same": kept["masked"] == kept["live"],
        "difference": float(f"{(masked - live).abs().max():.1e}"),
    }


def measure_in(processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in several processes: each runs this script."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        settings = {name: getattr(arguments, name) for name in ("steps", "repeats", "batch", "length", "macs")}
        given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        environment = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
        command = [sys.executable, *launcher, __file__, *given, "--worker", str(told)]
        subprocess.run(command, check=True, env=environment)
        return dict(json.loads(told.read_text(encoding="utf-8")))


def main() -> None:
    arguments = parse()
    transformers.utils.logging.set_verbosity_error()
    if arguments.worker is not None:
        found = measure(arguments)
        if os.environ["RANK"] == "0":
            arguments.worker.write_text(json.dumps(found), encoding="utf-8")
        return
    for processes in arguments.processes:
        found = measure(arguments) if processes == 1 else measure_in(processes, arguments)
        settings = {name: getattr(arguments, name) for name in ("steps", "repeats", "batch", "length", "macs")}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        record = {"processes": processes, "device": device, **settings, "seed": 0, **found}
        add_record(
            "live_shrinking",
            {**record, "threads": torch.get_num_threads()},
            key=("processes", "device", "macs", "batch"),
        )


if __name__ == "__main__":
    main()
