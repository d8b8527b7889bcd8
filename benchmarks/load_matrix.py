# ruff: noqa: E402 (the tests folder has to be on the path first)
"""The loading matrix: models cut in every way, saved on each lane, and loaded on both in every way that people load.

    python benchmarks/load_matrix.py [--only MODEL ...]

On one lane what is loaded must be equal bit for bit, tensors and outputs; across lanes outputs must agree to 1e-5 of
the largest. One process saves on each lane, then one loads there, and one loads there without hf_prune. A cell is
a difference, why it cannot exist, or how it failed. All of them go to results/load_matrix.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import torch
from common import add_record
from lanes import LANES, python
from load_alone import CELL, LANE, REASON, environment_without_us
from load_extras import EXTRAS, HUB
from load_models import KINDS, MODELS
from load_ways import WAYS, Case, judge, save
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ALONE = HERE / "load_alone.py"
EXTRA_MODELS = ("bert", "llama")


def cells(names: list[str]) -> list[tuple[str, str]]:
    """Return every pair of a model and a kind of cut."""
    return [(name, kind) for name in names for kind in KINDS]


def ways_of(name: str, kind: str) -> dict[str, Any]:
    """Return the ways to load this cell, in a process with hf_prune."""
    extra = name in EXTRA_MODELS
    return {**WAYS, **(EXTRAS if extra else {}), **(HUB if extra and kind == "all" else {})}


def tell(*cell: str, value: float | str) -> None:
    """Hand one result to the parent: a line of JSON."""
    print(json.dumps([*cell, value]), flush=True)


def save_all(root: Path, names: list[str]) -> None:
    """Save every cell on this lane; where that cannot be, leave the reason there."""
    environment_without_us(root / f"alone_{LANE}")
    for name, kind in cells(names):
        folder = root / LANE / name / kind
        folder.mkdir(parents=True)
        try:
            reason = save(name, kind, folder, wide=True)
            reason = reason and f"not applicable: {reason}"
        except Exception as error:  # a cell of the matrix, not the end of it
            reason = f"failed: saving raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if reason:
            (folder / REASON).write_text(reason)
        tell(LANE, name, kind, value=reason or 0.0)


def load_all(root: Path, names: list[str]) -> None:
    """Load what every lane saved in every way on this one."""
    for saved_on in LANES:
        for name, kind in cells(names):
            folder = root / saved_on / name / kind
            reason = folder / REASON
            case = None if reason.is_file() else Case(name, folder, torch.load(folder / CELL))
            for label, way in ways_of(name, kind).items():
                value = reason.read_text() if case is None else judge(way, case)
                tell(saved_on, name, kind, label, value=value)


def lines_of(lane: str, verb: str, root: Path, names: list[str]) -> Iterator[list[Any]]:
    """Run a phase on a lane, and yield what it tells; raise with the end of its errors if it stops early."""
    command = [python(lane), __file__, "--worker", verb, str(root), "--only", *names]
    if verb == "alone":  # saving has made the virtualenv
        command = [root / f"alone_{lane}" / python(lane).relative_to(python(lane).parents[1]), ALONE, root, *names]
    settings = {**os.environ, "HF_MODULES_CACHE": str(root / f"modules_{lane}")}
    with (root / f"{lane}_{verb}.err").open("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=settings, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("["):
                    yield json.loads(line)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{verb} on {lane} ended with {process.returncode}: {errors.read()[-2000:]}")


def run_phase(verb: str, count: int, root: Path, names: list[str]) -> dict[str, list[list[Any]]]:
    """Run a phase on both lanes at once, behind a progress bar; return lane -> what it told."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(len(LANES)) as pool:
        bars = {lane: progress.add_task(f"{verb} on {lane}", total=count) for lane in LANES}

        def collect(lane: str) -> list[list[Any]]:
            told = []
            for line in lines_of(lane, verb, root, names):
                told.append(line)
                progress.advance(bars[lane])
            return told

        return dict(zip(LANES, pool.map(collect, LANES)))


def nested(lines: list[list[Any]]) -> dict[str, Any]:
    """Turn [saved_on, model, kind, way, value] into mappings, level by level."""
    result: dict[str, Any] = {}
    for saved_on, name, kind, way, value in lines:
        result.setdefault(saved_on, {}).setdefault(name, {}).setdefault(kind, {})[way] = value
    return result


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Count the cells of one pair of lanes, and return the largest difference among the equal ones."""
    values = [value for kinds in found.values() for ways in kinds.values() for value in ways.values()]
    numbers = [value for value in values if not isinstance(value, str)]
    failed = sum(isinstance(value, str) and value.startswith("failed") for value in values)
    return {
        "cells": len(values),
        "equal": len(numbers),
        "not_applicable": len(values) - len(numbers) - failed,
        "failed": failed,
        "largest_difference": max(numbers, default=0.0),
    }


def show(title: str, found: dict[str, Any]) -> None:
    """Print a table of one pair of lanes: how many kinds of cut are equal, of those that can be."""
    ways = list(dict.fromkeys(way for kinds in found.values() for one in kinds.values() for way in one))
    table = Table("way", *found, title=title)
    for way in ways:
        row = []
        for kinds in found.values():
            values = [one[way] for one in kinds.values() if way in one]
            possible = [value for value in values if not str(value).startswith("not applicable")]
            equal = sum(not isinstance(value, str) for value in possible)
            row.append(f"{equal}/{len(possible)}" if values else "")
        table.add_row(way, *row)
    Console(width=120).print(table)


def main(names: list[str]) -> None:
    """Save, load, write and show."""
    pairs = cells(names)
    count = sum(len(ways_of(*pair)) for pair in pairs)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run_phase("save", len(pairs), root, names)
        loaded = run_phase("load", len(LANES) * count, root, names)
        alone = run_phase("alone", len(LANES) * len(pairs), root, names)
    for loaded_on, lines in loaded.items():
        for saved_on, found in nested([*lines, *alone[loaded_on]]).items():
            record = {"saved_on": saved_on, "loaded_on": loaded_on, **summary(found), "found": found}
            with redirect_stdout(io.StringIO()):  # thousands of cells: the table says it shorter
                add_record("load_matrix", record, key=("saved_on", "loaded_on"))
            show(f"saved on {saved_on}, loaded on {loaded_on}: kinds of cut that are equal / possible", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--worker", nargs=2, metavar=("PHASE", "FOLDER"), help="what the script calls itself with")
    chosen = parser.parse_args()
    if chosen.worker:
        {"save": save_all, "load": load_all}[chosen.worker[0]](Path(chosen.worker[1]), chosen.only)
    else:
        main(chosen.only)
