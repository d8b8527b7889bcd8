"""Time what runs, in turn: machines are noisy, and noise must fall on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import PruningError

STEADY = 0.15  # how far the 90th percentile may lie above the median; more is another load's doing
ROUNDS = 3  # times that what is unsteady is measured
Clock = Callable[[], float]  # runs once, and returns for how many milliseconds


def wall_clock(run: Callable[[], object]) -> Clock:
    """Return what runs something and reads the machine's clock."""

    def clock() -> float:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    return clock


def thread_clock(run: Callable[[], object]) -> Clock:
    """Return what runs something in one thread and reads for how long a processor was at it.

    Where other processes wait for the same core, that is what the run would take by itself; a wall clock adds their
    turns, and adds more of them to long runs than to short ones. Windows' clock of threads ticks too rarely: there it
    is the wall's.
    """
    if time.get_clock_info("thread_time").resolution > 1e-4:
        return wall_clock(run)

    def clock() -> float:
        start = time.thread_time()
        run()
        return 1000 * (time.thread_time() - start)

    return clock


def event_clock(run: Callable[[], object], device: torch.device) -> Clock:
    """Return what runs something on a CUDA device and reads that device's own clock."""

    def clock() -> float:
        with torch.cuda.device(device):
            events: Any = torch.cuda.Event
            start, end = (events(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))

    return clock


def times_in_turn(clocks: Mapping[str, Clock], *, repeats: int = 20, warmup: int = 3) -> dict[str, list[float]]:
    """Run several clocks in turn (a b a b …) and return the milliseconds of each one's rounds.

    Args:
        clocks: Name -> what to time.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before them that do not count.
    """
    if repeats < 1:
        raise PruningError(f"repeats must be at least 1. Received: {repeats}.")
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(warmup + repeats):
        for name, clock in clocks.items():
            spent = clock()
            if number >= warmup:
                times[name].append(spent)
    return times


def steadiest(
    clocks: Mapping[str, Clock], *, repeats: int = 20, again: Callable[[float], None] = lambda spread: None
) -> tuple[dict[str, list[float]], int]:
    """Return the times of that one of three rounds in which they scatter least, and how many rounds it took.

    Args:
        clocks: Name -> what to time.
        repeats: As in `times_in_turn`.
        again: Is told how far times scatter before they are measured again.
    """
    found: list[tuple[float, dict[str, list[float]]]] = []
    while len(found) < ROUNDS and (not found or found[-1][0] > STEADY):
        if found:
            again(found[-1][0])
        times = times_in_turn(clocks, repeats=repeats)
        found.append((max(map(spread_of, times.values())), times))
    return min(found, key=lambda one: one[0])[1], len(found)


def spread_of(times: Sequence[float]) -> float:
    """Return how far the 90th percentile lies above the median, as a share of it."""
    median, high = np.percentile(times, [50, 90]).tolist()
    return float((high - median) / median) if median else 0.0


def compare_latency(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    clock: Callable[[Callable[[], object]], Clock] = wall_clock,
) -> dict[str, float]:
    """Time several callables in turn (a b a b …) and return each one's median in milliseconds.

    Args:
        runs: Name -> what to time; on an accelerator it must wait until the work is done.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before them that do not count.
        clock: Makes the clock of each.
    """
    clocks = {name: clock(run) for name, run in runs.items()}
    return {name: statistics.median(one) for name, one in times_in_turn(clocks, repeats=repeats, warmup=warmup).items()}
