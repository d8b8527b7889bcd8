"""Large shapes: finding groups in a 70B Llama on the meta device, and the extra memory of shrinking a 1B one.

python benchmarks/scale.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import add_record

NAME = "scale"
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
ONE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}


def build(device: str, **sizes: Any) -> Any:
    import torch
    import transformers

    config = transformers.LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16 if device == "meta" else torch.float32)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def find_in_seventy_billion() -> None:
    from hf_prune import find_groups

    model = build("meta", **SEVENTY)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        groups = find_groups(model)
        seconds.append(time.perf_counter() - start)
    size = sum(parameter.numel() for parameter in model.parameters())
    told = {"case": "find_groups", "parameters": size, "groups": len(groups), "seconds": round(min(seconds), 3)}
    add_record(NAME, told | {"bar_seconds": 2}, key=("case",))


def shrink_one_billion() -> None:
    """Measure in a process of its own: the peak of resident memory never falls again."""
    command = [sys.executable, __file__, "--child"]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    parameters, before, peak, largest, seconds = map(float, result.stdout.split()[-5:])
    told = {"case": "shrink", "parameters": int(parameters), "resident_mb": round(before / 1e6)}
    told |= {"extra_peak_mb": round((peak - before) / 1e6), "largest_layer_mb": round(largest / 1e6)}
    add_record(NAME, told | {"seconds": round(seconds, 1)}, key=("case",))


def child() -> None:
    from hf_prune import find_groups, shrink

    model = build("cpu", **ONE)
    layer = model.model.layers[0]
    largest = sum(parameter.nbytes for parameter in layer.parameters())
    kept = {g.name: range(0, g.units, 2) for g in find_groups(model, ["neuron", "kv_group"])}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before, start = resident("VmRSS"), time.perf_counter()
    shrink(model, kept)
    seconds = time.perf_counter() - start
    print(sum(p.numel() for p in model.parameters()), before, resident("VmHWM"), largest, seconds)


def resident(what: str) -> int:
    """Return this process' resident memory in bytes: now (VmRSS), or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    if "--child" in sys.argv:
        child()
    else:
        find_in_seventy_billion()
        shrink_one_billion()
