# ruff: noqa: E402 (the tests folder has to be on the path first)
"""Damaged folders by the ten thousand: each is refused with a `CheckpointError`, or computes what it did before.

python benchmarks/fuzz.py [--folders 50000] [--processes 2]    with each lane's interpreter; a minute a thousand

Adds to results/fuzz.json. The slowest folder and the one that took most memory are told with what was done to them.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

import fuzzing
import torch
import transformers
from architectures import LANE
from common import add_record
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.progress import Progress

LIMIT_S = 30  # of the processor: a folder that takes longer hangs
CHUNK = 250


def peak_mb(what: str = "VmHWM") -> float:
    """Return a process's peak memory since it was last forgotten (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def prepare() -> None:
    global sound
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        sound = fuzzing.sound_folders(Path(scratch))


def hang(*_: Any) -> None:
    raise TimeoutError(f"longer than {LIMIT_S} s")


def try_chunk(number: int) -> dict[str, Any]:
    """Load one chunk of damaged folders, drawn with its number as the seed."""
    told: dict[str, Any] = {
        "outcomes": Counter(),
        "mutations": Counter(),
        "bad": [],
        "slowest": (0.0, ""),
        "largest": (0.0, ""),
    }
    signal.signal(signal.SIGPROF, hang)
    with tempfile.TemporaryDirectory() as scratch:

        @seed(number)
        @settings(CHUNK_SETTINGS)
        @given(fuzzing.damaged(sound))
        def check(damage: fuzzing.Damage) -> None:
            Path("/proc/self/clear_refs").write_text("5")
            before, start = peak_mb("VmRSS"), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
            try:
                outcome = fuzzing.load(sound[damage.name], damage, Path(scratch) / "model")
            except AssertionError as error:
                outcome = "wrong"
                told["bad"].append(f"{damage}: {str(error)[:200]}")
            except Exception as error:
                outcome = "hang" if isinstance(error, TimeoutError) else "crash"
                told["bad"].append(f"{damage}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            seconds = time.process_time() - start
            told["outcomes"]["hang" if seconds > LIMIT_S else outcome] += 1
            told["mutations"].update(damage.steps)
            told["slowest"] = max(told["slowest"], (seconds, str(damage)))
            told["largest"] = max(told["largest"], (peak_mb() - before, str(damage)))

        check()
    return told


CHUNK_SETTINGS = settings(
    max_examples=CHUNK, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    mutations: Counter[str] = Counter()
    bad: list[str] = []
    slowest, largest, start = (0.0, ""), (0.0, ""), time.perf_counter()
    chunks = range(arguments.first_seed, arguments.first_seed + arguments.folders // CHUNK)
    pool = multiprocessing.get_context("spawn").Pool(arguments.processes, prepare)
    with pool, Progress() as progress:
        for told in progress.track(pool.imap_unordered(try_chunk, chunks), total=len(chunks)):
            outcomes.update(told["outcomes"])
            mutations.update(told["mutations"])
            bad += told["bad"]
            slowest, largest = max(slowest, told["slowest"]), max(largest, told["largest"])
    record = {
        "lane": LANE,
        "folders": outcomes.total(),
        "outcomes": {one: outcomes[one] for one in ("refused", "equal", "wrong", "crash", "hang")},
        "mutations": {name.strip("_"): count for name, count in sorted(mutations.items())},
        "bad": bad[:50],
        "slowest": {"seconds": round(slowest[0], 3), "folder": slowest[1]},
        "largest": {"added_mb": round(largest[0], 1), "folder": largest[1]},
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "seed": arguments.first_seed,
    }
    add_record("fuzz", record, key=("lane",))


if __name__ == "__main__":
    main()
