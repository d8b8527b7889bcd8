"""Push a 500 MB model in parts to the local Hub of the tests, through failures, read it back and compare.

    python benchmarks/hub_push.py                # once on each lane
    python benchmarks/hub_push.py --hidden 128   # small, to try the script

The real Hub client runs in a process of its own; the server fails one part by status, one by a cut connection, cuts the
commit's answer and the download. Noted are seconds and peak memory of both sides, and that every byte came back.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from common import add_record  # noqa: E402
from hub_server import HubServer  # noqa: E402
from hub_storage import Blob, digest  # noqa: E402

NAME, REPO = "hub_push", "tester/large"
CLIENT = """
import json, resource, sys, time
from hf_prune import push_pruned
start = time.time()
done = push_pruned(sys.argv[1], sys.argv[2], private=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print("RESULT " + json.dumps({"seconds": time.time() - start, "peak_mb": peak, "oid": done.oid}))
"""
MAKE = """
import sys, torch
from transformers import BertConfig, BertForMaskedLM
from hf_prune import save_pruned, shrink
torch.manual_seed(0)
hidden = int(sys.argv[2])
config = BertConfig(hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
                    num_hidden_layers=16)
model = BertForMaskedLM(config)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
save_pruned(shrink(model, {"layers.0.attention.heads": [0], "layers.3.mlp.neurons": [1, 2, 5]}), sys.argv[1])
"""


def push(folder: Path, hub: HubServer, home: Path) -> dict[str, Any]:
    """Push in a process of its own, and return what it tells."""
    command = [sys.executable, "-c", CLIENT, str(folder), REPO]
    done = subprocess.run(command, env=hub.environment(home, hub.token), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.token not in done.stdout + done.stderr
    return dict(json.loads(done.stdout.rpartition("RESULT ")[2]))


def expect_one_whole_commit(hub: HubServer, oid: str, sizes: dict[str, int], weights: Path) -> Blob:
    """Check that one commit holds everything, and that what the server has is what was saved."""
    commits = hub.repos[REPO].branches["main"]
    assert [commit.oid for commit in commits[1:]] == [oid]
    assert set(sizes) <= set(commits[-1].files)
    stored = commits[-1].files["model.safetensors"]
    assert isinstance(stored, Blob)
    assert stored.size == sizes["model.safetensors"]
    assert digest(stored.path) == digest(weights)
    assert 206 in [request.status for request in hub.requests if request.path.startswith("/lfs/")]
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--chunk-mb", type=float, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, HubServer(chunk_size=int(options.chunk_mb * 1e6)) as hub:
        folder = Path(work) / "model"
        subprocess.run([sys.executable, "-c", MAKE, str(folder), str(options.hidden)], check=True, capture_output=True)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        hub.fail("PUT", "/2", 503)
        hub.fail("PUT", "/3", how="break")
        hub.fail("POST", "/commit/", how="lose")
        hub.fail("GET", "/lfs/", how="break")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.time()
        told = push(folder, hub, Path(work) / "home")
        stored = expect_one_whole_commit(hub, told["oid"], sizes, folder / "model.safetensors")
        parts = {r.path for r in hub.requests if r.method == "PUT" and r.status == 200}
    record = {
        "client": f"huggingface_hub {version('huggingface_hub')}",
        "size_mb": round(stored.size / 1e6, 1),
        "part_mb": options.chunk_mb,
        "parts": len(parts),
        "commits": 1,
        "failures": ["part 503", "part cut off", "commit's answer lost", "download cut off"],
        "every_file_equal": True,
        "seconds": round(time.time() - start, 1),
        "client_peak_mb": round(told["peak_mb"]),
        "server_start_mb": round(before / 1e3),
        "server_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }
    add_record(NAME, record, key=("client", "size_mb"))


if __name__ == "__main__":
    main()
