"""The quickstart recipe with three seeds: accuracy, MACs and latency, dense against pruned.

python benchmarks/quickstart.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import add_record, load_records

NAME = "quickstart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        run_seed(seed)
    drops = [100 * (r["accuracy"]["dense"] - r["accuracy"]["pruned"]) for r in load_records(NAME)]
    print(f"accuracy lost: {statistics.mean(drops):.2f} points, mean of {len(drops)} seeds")


def run_seed(seed: int) -> None:
    import hf_prune

    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report = hf_prune.run("quickstart", [f"seed={seed}", f"output={Path(folder) / 'run'}"])
    dense, pruned = report.dense, report.pruned
    assert dense is not None
    assert pruned is not None
    record = {"seed": seed, "accuracy": report.metrics["accuracy"], "macs_left": report.settings["macs_left"]}
    record |= {"dense_ms": dense.latency_ms, "pruned_ms": pruned.latency_ms, "batch": dense.batch}
    record |= {"speedup": {name: round(ms / pruned.latency_ms[name], 3) for name, ms in dense.latency_ms.items()}}
    add_record(
        NAME,
        record | {"parameters": [dense.parameters, pruned.parameters], "seconds": round(time.time() - start)},
        key=("seed",),
    )


if __name__ == "__main__":
    main()
