"""Everything that only a GPU can show, in one command of less than eight minutes on an H100.

    python benchmarks/gpu.py [--only 1 3] [--small] [--here] [--results FOLDER]

1 trainers   what the callback costs a Trainer in bf16 and fp16 (time and peak memory), and fp16 whose steps overflow
2 wrappers   DDP, and FSDP2 by torch, accelerate and Trainer, one process each: the same masks as without them
3 round trip masked, shrunk, saved and loaded models give the same outputs, in fp32, bf16 and fp16
4 latency    dense against pruned, eager and compiled; 2:4 zeros in torch's semi-structured kernels
5 distilled  pruned gradually to a third of the MACs with the dense model as the teacher

Each part runs in a process of its own, for a limited time (470 s in all), and each case's record is written to
results/gpu.json when the case ends; one that fails leaves the error in its record. The exit status is 3 where a case
was wrong or failed.
`--small` needs a minute on a CPU, where what needs a GPU is skipped and its record says so.

It runs from a clone without installing it (PYTHONPATH=. from the repository's root) and needs only torch,
transformers, accelerate, safetensors, numpy, rich, wrapt, typing_extensions, and pydantic with what pydantic needs
(pydantic_core, annotated_types, typing_inspection). Inductor needs Triton. The network is not used.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from accelerate.state import AcceleratorState
from gpu_models import DEVICE, SIZES, NeedsGpuError
from gpu_parts import PARTS, Case

KEY = ("part", "case", "size", "device", "transformers")
SECONDS = {"trainers": 165, "wrappers": 50, "round trip": 70, "latency": 130, "distilled": 55}  # 470 in all
PATIENCE = 600  # seconds of each part with --small, on whatever machine
WRONG = 3  # exit status; Python's own is 1
TAIL = 12  # lines of a traceback


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(1, len(PARTS) + 1)
    parser.add_argument("--only", nargs="+", type=int, choices=numbers, default=[*numbers], metavar="PART")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    parser.add_argument("--here", action="store_true", help="all parts in this process, without limits of time")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="the folder of gpu.json")
    parser.add_argument("--seconds", type=float, help="time for each part, in place of its own")
    return parser.parse_args(given)


def record(options: argparse.Namespace, part: str, case: str, told: dict[str, Any], start: float) -> None:
    """Write what a case has told, with what it was measured on."""
    common.RESULTS = options.results
    about = {
        "part": part,
        "case": case,
        "size": "small" if options.small else "full",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "transformers": transformers.__version__,
        "accelerate": importlib.metadata.version("accelerate"),
        "cuda": torch.version.cuda,
        "seed": 0,
        "seconds": round(time.perf_counter() - start, 1),
    }
    common.add_record("gpu", {**about, **told}, key=KEY)


def attempt(work: Case) -> dict[str, Any]:
    """Return what a case finds: figures, and whether they are `right`; or why it was skipped; or how it failed."""
    try:
        return work()
    except NeedsGpuError as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        tail = traceback.format_exc().splitlines()[-TAIL:]
        return {"right": False, "error": f"{type(error).__name__}: {error}"[:2000], "traceback": tail}


@contextmanager
def isolated() -> Iterator[None]:
    """Undo what Trainers and accelerate leave for the next case: environment, process group, state, memory."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)
        torch.use_deterministic_algorithms(False)
        if DEVICE == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def run_here(options: argparse.Namespace, part: str, make: Callable[..., dict[str, Case]]) -> bool:
    """Run all cases of a part, and return whether none was wrong or failed."""
    right = True
    for case, work in make(SIZES["small" if options.small else "full"]).items():
        print(f"== {part}: {case}", flush=True)
        start = time.perf_counter()
        with isolated():
            torch.manual_seed(0)
            told = attempt(work)
        record(options, part, case, told, start)
        right = right and told.get("right", True)
    return right


def run_apart(options: argparse.Namespace, number: int, part: str, limit: float) -> bool:
    """Run a part in a process of its own; one that crashes, or that takes too long, leaves a record too."""
    command = [sys.executable, __file__, "--only", str(number), "--here", "--results", str(options.results)]
    command += ["--small"] if options.small else []
    start = time.perf_counter()
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for deterministic matrix products
    with tempfile.TemporaryFile("w+") as said:
        try:
            code = subprocess.run(command, stderr=said, timeout=limit, env=environment).returncode
            error = f"the process ended with status {code}"
        except subprocess.TimeoutExpired:
            code, error = -1, f"the part was stopped after {limit:.1f} s"
        said.seek(0)
        tail = said.read().splitlines()[-TAIL:]
    failed = {} if code in (0, WRONG) else {"error": error, "traceback": tail}
    record(options, part, "the whole part", {"right": code == 0, **failed}, start)
    return code == 0


def main(given: list[str] | None = None) -> int:
    options, start, wrong, allowed = parse(given), time.perf_counter(), [], 0.0
    common.RESULTS = options.results
    transformers.utils.logging.set_verbosity_error()
    for number, (part, make) in enumerate(PARTS.items(), 1):
        if number not in options.only:
            continue
        spent = time.perf_counter() - start
        allowed += options.seconds or (PATIENCE if options.small else SECONDS[part])  # what one leaves, others may use
        print(f"[{spent:.0f} s] part {number}: {part}", flush=True)
        right = run_here(options, part, make) if options.here else run_apart(options, number, part, allowed - spent)
        wrong += [] if right else [part]
    if not options.here:
        print(f"[{time.perf_counter() - start:.0f} s] " + (f"wrong: {', '.join(wrong)}" if wrong else "all is right"))
    return WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
