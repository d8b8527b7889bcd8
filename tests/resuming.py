"""Training runs that are killed and resumed until they are done: do they end where an uninterrupted run does?

Shared by `test_resume.py` (a few kills) and `benchmarks/resume_kills.py`. A run is a forked process, so that a kill
costs no import; it trains with a real Trainer, dropout, and a checkpoint at each step, of which two are kept. Most
kills are a SIGKILL at a random moment, the others hit one random write, which they leave cut off.
"""

from __future__ import annotations

import gc
import json
import logging
import mmap
import os
import random
import select
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from models import build_bert, draw_rows, training_arguments
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, modeling_utils
from transformers.trainer_callback import TrainerState

from hf_prune import (
    Distillation,
    DistillationTrainer,
    HeadPruner,
    NeuronPruner,
    PruningCallback,
    Schedule,
    Target,
    WeightPruner,
    latest_checkpoint,
)
from hf_prune.packing import pack
from hf_prune.resume import ASIDE

UNITS = {"pruners": [HeadPruner(), NeuronPruner()], "target": Target(macs=0.5)}
KINDS: dict[str, dict[str, Any]] = {
    "units": UNITS,
    "weights": {"pruners": WeightPruner(sparsity=0.7)},
    "shrink_during_training": {**UNITS, "shrink_during_training": True},
    "projections": UNITS,
    "projections alone": {},
}
DISTILLED = ("projections", "projections alone")  # kinds with a teacher that is wider than the student
PHASES = ("starting", "training", "saving", "ended")
FINAL = "final.safetensors"
WRITES = 12  # of one save, about: where a kill may hit


class Phases(TrainerCallback):
    """Tell the process that kills what this one is doing."""

    def __init__(self, shared: mmap.mmap) -> None:
        self.shared = shared

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shared[0] = PHASES.index("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shared[0] = PHASES.index("saving")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shared[0] = PHASES.index("training")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shared[0] = PHASES.index("ended")


class Warnings(logging.Handler):
    """Count the checkpoints that were set aside."""

    def __init__(self, shared: mmap.mmap) -> None:
        super().__init__()
        self.shared = shared

    def emit(self, record: logging.LogRecord) -> None:
        self.shared[1] += "is not whole" in record.getMessage()


def make_trainer(kind: str, folder: Path, steps: int) -> tuple[Trainer, PruningCallback | None]:
    model = build_bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_strategy": "no"}
    arguments = training_arguments(folder, max_steps=steps, **settings)
    schedule = Schedule(begin=min(2, steps - 2), end=steps - 2, frequency=3)
    callback = PruningCallback(schedule=schedule, **KINDS[kind]) if KINDS[kind] else None
    given = {"train_dataset": draw_rows(model, 24), "callbacks": [callback] if callback else None}
    if kind in DISTILLED:
        wider, terms = build_bert(seed=1, hidden_size=32), Distillation(hidden=1.0)
        return DistillationTrainer(model, arguments, teacher=wider, distillation=terms, **given), callback
    return Trainer(model, arguments, **given), callback


def train(kind: str, folder: Path, steps: int, shared: mmap.mmap) -> None:
    """Train from the newest whole checkpoint, or from the beginning, to the end; write down where that is."""
    for name in ("hf_prune", "transformers"):
        logging.getLogger(name).handlers = [Warnings(shared)]
        logging.getLogger(name).propagate = False
    transformers.utils.logging.disable_progress_bar()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a Trainer prints what it logs
    trainer, callback = make_trainer(kind, folder, steps)
    trainer.add_callback(Phases(shared))
    several = len([*folder.glob("checkpoint-*")]) > 1
    trainer.train(resume_from_checkpoint=True if several else latest_checkpoint(folder))
    partial = folder / f"{FINAL}.partial"
    safetensors.torch.save_file(everything(trainer, callback), partial)
    os.replace(partial, folder / FINAL)


def everything(trainer: Trainer, callback: PruningCallback | None) -> dict[str, torch.Tensor]:
    """Return all that a run ends with: weights, moments, masks, running means, kept units, where it stands."""
    kinds = {"weight": trainer.model.state_dict()}
    if isinstance(trainer, DistillationTrainer):
        kinds["projection"] = trainer.lesson.projections.state_dict()
    if callback is not None:
        state = callback.pruning.state_dict()
        kinds["pruning"] = pack(state)[1]
    found = {f"{kind}/{name}": one.clone() for kind, named in kinds.items() for name, one in named.items()}
    for i, entry in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{i}/{key}": torch.as_tensor(value).clone() for key, value in entry.items()}
    if callback is None:
        return found
    plain = {"kept": callback.report.kept, "steps": callback.pruning.steps, "logs": callback.pruning.logs()}
    text = json.dumps(plain, sort_keys=True).encode()
    return {**found, "plain": torch.tensor(list(text), dtype=torch.uint8)}


def kill_at_write(number: int, share: float) -> None:
    """Let this process die in its `number`-th write: of the file, or of what a rename or removal was to do, a share."""
    count = 0

    def dying(owner: Any, name: str, die: Callable[[Any, tuple[Any, ...]], None]) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                die(lambda: real(*args, **kwargs), args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    def cut_off(write: Any, args: tuple[Any, ...]) -> None:
        write()
        path = next(one for one in args[1:] if isinstance(one, (str, Path)))
        os.truncate(path, int(share * os.path.getsize(path)))

    def before_or_after(rename: Any, args: tuple[Any, ...]) -> None:
        if share > 0.5:
            rename()

    def half(remove: Any, args: tuple[Any, ...]) -> None:
        names = sorted(os.listdir(args[0])) if os.path.isdir(args[0]) else []
        for name in random.Random(share).sample(names, int(share * len(names))):
            os.unlink(os.path.join(args[0], name))

    config = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
    for owner, name in ((torch, "save"), (modeling_utils, "safe_save_file"), (safetensors.torch, "save_file")):
        dying(owner, name, cut_off)
    dying(TrainerState, "save_to_json", cut_off)
    dying(config, "to_json_file", cut_off)
    dying(os, "replace", before_or_after)
    dying(shutil, "rmtree", half)


def run_forked(work: Callable[[], None], delay: float | None = None) -> tuple[float, bool]:
    """Run something in a forked process; return how long it ran, and whether it ended by itself.

    Args:
        work: May kill its own process.
        delay: Seconds after which it is killed.
    """
    start = time.perf_counter()
    child = os.fork()
    if not child:
        try:
            gc.freeze()  # a Trainer collects garbage, and need not look at what this process has
            tqdm.set_lock(threading.RLock())  # its own is shared with this process, which a kill would stop for ever
            work()
            os._exit(0)
        finally:
            os._exit(1)
    watch = os.pidfd_open(child)
    if not select.select([watch], [], [], delay)[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(watch)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("A run failed that was not killed")
    return time.perf_counter() - start, os.WIFEXITED(status)


def kill_at_each_write(kind: str, scratch: Path, steps: int, writes: range) -> list[str]:
    """Kill a run in each of these writes, resume it, and return what was not bit for bit as without a kill.

    Returns:
        One line for each run that ended otherwise: the write, and the first tensor that was not the same.
    """
    shared, different = mmap.mmap(-1, 2), []
    make_trainer(kind, scratch / "whole", steps)
    run_forked(lambda: train(kind, scratch / "whole", steps, shared))
    expected = load_file(scratch / "whole" / FINAL)
    for number in writes:
        folder = scratch / f"killed-{number}"

        def work(folder: Path = folder, number: int = number) -> None:
            kill_at_write(number, 0.9 if number % 2 else 0.4)
            train(kind, folder, steps, shared)

        _, ended = run_forked(work)
        assert not ended, f"there is no write {number}"
        run_forked(lambda folder=folder: train(kind, folder, steps, shared))
        different += [f"{number}: {name}" for name in differences(load_file(folder / FINAL), expected)[:1]]
    return different


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that one of two runs lacks, or else of those that differ."""
    return sorted(found.keys() ^ expected.keys()) or [
        name for name, one in expected.items() if not torch.equal(one, found[name])
    ]


def kill_runs(kind: str, scratch: Path, kills: int, steps: int = 24, seed: int = 0) -> dict[str, Any]:
    """Kill runs, resume each until it is done, and compare where they end with a run that was left alone.

    Returns:
        ``kills``, and how many of them came while ``starting`` (resuming too), ``training``, ``saving``, ``ended``
        (shrinking); ``at_writes``: kills in one exact write; ``set_aside``: incomplete checkpoints; ``runs`` that were
        killed, ``equal``: of these, bit for bit the uninterrupted one; ``different``: the first tensor that was not.
    """
    shared, draw, counts = mmap.mmap(-1, 2), random.Random(seed), Counter[str]()
    make_trainer(kind, scratch / "whole", steps)  # imports what a Trainer imports late, for all that are forked
    whole, _ = run_forked(lambda: train(kind, scratch / "whole", steps, shared))
    expected, different = load_file(scratch / "whole" / FINAL), list[str]()
    while counts["kills"] < kills:
        folder = scratch / f"run-{counts['runs']}"
        ended = False
        while not ended:
            shared[0] = shared[1] = 0
            left, write = counts["kills"] < kills, draw.random() < 0.5
            number, share = draw.randint(1, 2 * WRITES), draw.random()
            delay = draw.uniform(0, 0.6 * whole)

            def work(folder: Path = folder, at: Any = (number, share) if left and write else None) -> None:
                if at is not None:
                    kill_at_write(*at)
                train(kind, folder, steps, shared)

            _, ended = run_forked(work, delay if left and not write else None)
            counts["set_aside"] += shared[1]
            if not ended:
                counts.update({"kills": 1, "at_writes": int(write), PHASES[shared[0]]: 1})
        wrong = differences(load_file(folder / FINAL), expected)
        different += wrong[:1]
        counts.update({"runs": 1, "equal": int(not wrong)})
        assert len([*folder.glob(f"{ASIDE}*")]) <= counts["set_aside"]
    names = ("kills", *PHASES, "at_writes", "set_aside", "runs", "equal")
    return {**{name: counts[name] for name in names}, "different": different, "run_s": round(whole, 2)}
