"""Search for the smallest model that is good enough, killed twice on the way: front, wall time, does each point reload?

    python benchmarks/search.py                                # quickstart: digits, no files needed, about 10 minutes
    python benchmarks/search.py --recipe minilm_sst2 --max-drop 0.01 --set model.name=FOLDER data.name=FOLDER \
        data.train_limit=16000 dense.epochs=2 train.epochs=2

The search runs as `hf-prune search` in a process of its own, which is killed (SIGKILL) in its second and fourth trial
and started again. Then every model of the front is loaded and evaluated anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
from common import add_record

NAME = "search"
TOLD = ("trial", "asked", "metric", "drop", "good", "parameters", "size_mb", "latency_ms", "begun_from", "seconds")
KEY = ("recipe", "max_drop", "overrides")


def running_trial(storage: str) -> int | None:
    """Return which model is being made by now, counted from 1; what was killed before does not count."""
    try:
        (summary,) = optuna.get_all_study_summaries(storage)
        trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials(deepcopy=False)
    except Exception:  # it is not there yet
        return None
    ended = sum(one.state.is_finished() and one.state.name != "FAIL" for one in trials)
    return ended + 1 if any(one.state.name == "RUNNING" for one in trials) else None


def run_once(command: list[str], storage: str, kill_in: int | None) -> bool:
    """Run the command; kill it once this trial has run for two seconds. Return whether it came to its end."""
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None:
            time.sleep(1)
            if kill_in is not None and running_trial(storage) == kill_in:
                time.sleep(2)
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode >= 0


def evaluated(found: dict, recipe: str, overrides: list[str], output: Path) -> list[dict]:
    """Load every model of the front, and say by how much its metric differs from what the search stored."""
    from hf_prune import load_pruned, workflow
    from hf_prune.recipe import load_recipe

    job = workflow.prepare(load_recipe(recipe, [*overrides, f"output={output}"]))
    rows = []
    for one in (one for one in found["candidates"] if one["front"]):
        again = workflow.evaluate(job, load_pruned(one["folder"]))[found["metric"]]
        told = {
            key: one[key] for key in ("trial", "asked", "metric", "drop", "good", "parameters", "size_mb", "latency_ms")
        }
        share = one["macs"] / found["dense"]["macs"]
        rows.append({**told, "macs_left": round(share, 4), "again": again, "difference": abs(again - one["metric"])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--kill-in", type=int, nargs="*", default=[2, 4], help="trials in which it is killed")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--output", type=Path, default=Path("runs/search"))
    parser.add_argument("--dry", action="store_true", help="show the record, and write none")
    options = parser.parse_args()
    storage = f"sqlite:///{options.output.absolute() / 'trials.db'}"
    limits = ["--max-drop", str(options.max_drop), "--trials", str(options.trials), "--output", str(options.output)]
    command = [sys.executable, "-m", "hf_prune.cli", "search", options.recipe, *options.set, *limits]
    start, killed = time.time(), 0
    for kill_in in [*options.kill_in, None]:
        if run_once(command, storage, kill_in):
            break
        killed += 1
    seconds = round(time.time() - start)
    found = json.loads((options.output / "search.json").read_text())
    record = {"recipe": options.recipe, "max_drop": options.max_drop, "overrides": options.set, "killed": killed}
    record |= {"seconds": seconds, "trials": len(found["candidates"]), "best": found["best"], "dense": found["dense"]}
    record["dense"].pop("folder")
    record["front"] = evaluated(found, options.recipe, options.set, options.output)
    if options.dry:
        print(json.dumps(record, indent=1))
    else:
        add_record(NAME, record, key=KEY)


if __name__ == "__main__":
    main()
