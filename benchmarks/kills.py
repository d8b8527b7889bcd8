"""Kill saves at random moments, and let disks run full: the folder must be the old version or the new one, whole.

    python benchmarks/kills.py            # 200 kills of each way, 40 full disks; some minutes
    python benchmarks/kills.py --kills 20

Two versions of a model of a few MB, one in a single file and one in shards, are saved over one another in turn. Each
save runs in a process of its own that gets a SIGKILL at its moment; moments are spread over 0 to 1.1 times what a save
takes. Afterwards the folder is loaded and compared bit by bit. Ways: ``exchange`` (two folders change places in one
system call), ``rename`` (systems without that call), ``inside`` (the current folder, which cannot be replaced), and
``save_pretrained`` for comparison. Full disks are file systems in memory that have room for a little of the second
version, for half of it, and so on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from common import add_record  # noqa: E402
from killing import Version, fill_disks, kill_saves, two_versions, without_exchange  # noqa: E402

NAME = "kills"
SAVES = {
    "exchange": Version.save,
    "rename": Version.save,
    "inside": Version.save_inside,
    "save_pretrained": Version.save_plainly,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=40)
    parser.add_argument("--ways", nargs="*", choices=SAVES, default=[*SAVES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # of broken folders
    lane = "optimum" if version("transformers").startswith("4.") else "v5"
    with tempfile.TemporaryDirectory() as scratch:
        versions = two_versions(Path(scratch))
        size_mb = sum(path.stat().st_size for path in Path(scratch, "0").iterdir()) / 1e6
        for way in options.ways:
            with without_exchange() if way == "rename" else nullcontext():
                counts = kill_saves(versions, Path(scratch) / way, options.kills, SAVES[way])
            add_record(NAME, {"way": way, "lane": lane, "size_mb": round(size_mb, 1), **counts}, key=("way", "lane"))
        filled = fill_disks(versions, Path(scratch), options.disks) or {"skipped": "no disk may be mounted here"}
        add_record(NAME, {"way": "full disk", "lane": lane, **filled}, key=("way", "lane"))


if __name__ == "__main__":
    main()
