"""Kill training at random moments, resume it until it is done: it must end where a run that was left alone does.

    python benchmarks/resume_kills.py            # 20 kills of each kind of pruning; some minutes
    python benchmarks/resume_kills.py --kills 100 --only weights

A tiny BERT with dropout trains in a real Trainer that saves at every step and keeps two checkpoints. Kinds: ``units``
(heads and neurons by running means of gate gradients), ``weights`` (single ones, by gradients),
``shrink_during_training``, ``projections`` (units, and a wider teacher) and ``projections alone``. Most kills are a
SIGKILL at a random moment; the others (``at_writes``) hit one exact write of a save, and leave that file cut off, that
rename undone or that removal half done. A killed run is started again, and killed again, with
``resume_from_checkpoint=True``. Weights, optimizer moments, masks, running means, kept units and logs are compared bit
by bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from common import add_record  # noqa: E402
from resuming import KINDS, kill_runs  # noqa: E402

NAME = "resume_kills"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    lane = "optimum" if version("transformers").startswith("4.") else "v5"
    for kind in options.only:
        with tempfile.TemporaryDirectory() as scratch:
            counts = kill_runs(kind, Path(scratch), options.kills, options.steps, options.seed)
        add_record(NAME, {"kind": kind, "lane": lane, "steps": options.steps, **counts}, key=("kind", "lane"))


if __name__ == "__main__":
    main()
