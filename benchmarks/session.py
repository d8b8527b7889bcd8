"""What a change, a held step and the end of a session cost, before and after the house was rebuilt inside.

python benchmarks/session.py --before TREE      TREE: a checkout of an earlier commit; both are timed in turn

BERT-base's shapes, one thread, no optimizer: only what the session does itself is timed. Ratios within one run count,
the machines are noisy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "session.json"
COUNTED = ("keep_vectors", "live_shapes", "find_groups")
CHANGES = 6


def build(act: str, layers: int) -> Any:
    """Return a BERT with base shapes."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, hidden_act=act, vocab_size=1000))


def count_calls(counts: dict[str, int]) -> None:
    """Count calls of what a change should do once, wherever it was imported to."""

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in COUNTED:
        counts[name] = 0
        modules = [one for key, one in sys.modules.items() if key.startswith("hf_prune") and name in vars(one)]
        made = {id(function): counting(name, function) for function in {vars(one)[name] for one in modules}}
        for one in modules:
            setattr(one, name, made[id(vars(one)[name])])


def time_session(act: str, layers: int) -> dict[str, Any]:
    """Time changes, held steps and the end of one session, and count what a change does."""
    import torch

    from hf_prune import HeadPruner, NeuronPruner, Pruning, Schedule, Target

    torch.set_num_threads(1)
    model, counts = build(act, layers), dict[str, int]()
    schedule = Schedule("linear", begin=2, end=2 * CHANGES, frequency=2, initial=0.3)
    pruners = [HeadPruner(score="random"), NeuronPruner(score="random")]
    pruning: Any = Pruning(model, pruners, schedule, target=Target(macs=0.5), total_steps=2 * CHANGES)
    count_calls(counts)
    spent: dict[str, list[float]] = {"change": [], "held": []}
    for step in range(1, 2 * CHANGES + 1):
        model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
        pruning.after_backward()
        before = dict(counts)
        start = time.perf_counter()
        changed = pruning.step()
        spent["change" if changed else "held"].append(1000 * (time.perf_counter() - start))
        if changed:
            calls = {name: counts[name] - before[name] for name in counts}
        assert changed == (step % 2 == 0)
        model.zero_grad()
    before = dict(counts)
    start = time.perf_counter()
    pruning.finish()
    finish = 1000 * (time.perf_counter() - start)
    at_end = {name: counts[name] - before[name] for name in counts}
    return {
        "change_ms": round(statistics.median(spent["change"]), 2),
        "held_ms": round(statistics.median(spent["held"][1:]), 2),  # before the first change nothing is held
        "finish_ms": round(finish, 2),
        "calls_in_a_change": calls,
        "calls_in_finish": at_end,
    }


def run_in(tree: Path, act: str, layers: int) -> dict[str, Any]:
    """Run `time_session` of this file on another tree's library, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--one", act, "--layers", str(layers)]
    told = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    return dict(json.loads(told.stdout.splitlines()[-1]))


def least(many: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the least time of each, and the counts, which are the same in all."""
    times = {key: min(one[key] for one in many) for key in many[0] if key.endswith("_ms")}
    return {**many[0], **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", metavar="ACT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(time_session(options.one, options.layers)))
        return
    trees = {"after": ROOT, **({"before": options.before.resolve()} if options.before else {})}
    found: dict[str, dict[str, list[Any]]] = {}
    for _ in range(options.repeats):
        for act in ("gelu", "sigmoid"):  # masked neurons of a sigmoid get gradients: they are held after each step
            for name, tree in trees.items():
                found.setdefault(act, {}).setdefault(name, []).append(run_in(tree, act, options.layers))
    best = {act: {name: least(many) for name, many in both.items()} for act, both in found.items()}
    commit = [
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()
        for tree in trees.values()
    ]
    result = {
        "command": f"python benchmarks/session.py --before TREE --layers {options.layers} --repeats {options.repeats}",
        "commits": dict(zip(trees, commit)),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "seed": 0,
        "date": datetime.date.today().isoformat(),
        "shapes": f"BERT-base, {options.layers} layers; the least of {options.repeats} runs in turn",
        "activations": best,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(best, indent=1))


if __name__ == "__main__":
    main()
