"""int8 on top of a pruned model: how fast each exported file is against the dense one in fp32, and how accurate.

    python benchmarks/int8.py --dense FOLDER --pruned FOLDER --data FOLDER

Dense and pruned models as `equal_time.py` or `half_point.py` leave them; the data are SST-2's. Each is exported to ONNX
in fp32 and in int8 (dynamic), and to OpenVINO where that is installed; all files are timed in turn (one thread, 128
tokens). Accuracy and cross-entropy are those of validation and test together, by the exported file. Writes
results/int8.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import equal_time
import torch
from common import add_record
from export_formats import cpu_has
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from hf_prune import export, load_pruned
from hf_prune.exporting import open_exported
from hf_prune.exporting.feeding import feed
from hf_prune.report import compare_latency, random_inputs

FORMATS = {
    "onnx": {"format": "onnx"},
    "onnx int8": {"format": "onnx", "quantize": "dynamic"},
    "openvino": {"format": "openvino"},
    "openvino int8": {"format": "openvino", "quantize": "dynamic"},
}


def export_all(models: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Export to what there are libraries for, and open it."""
    here = {name: settings for name, settings in FORMATS.items() if "onnx" in name or find_spec("nncf")}
    pairs = [(which, name) for which in models for name in here]
    return {
        f"{which} {name}": open_exported(export(models[which], folder / f"{which} {name}", **here[name]))
        for which, name in pairs
    }


def quality(run: Any, tokenizer: Any, data: Path) -> dict[str, float]:
    logits, labels = equal_time.logits(run, tokenizer, data)
    right = (logits.argmax(-1) == labels).double().mean()
    return {"accuracy": round(float(right), 5), "cross_entropy": round(float(cross_entropy(logits, labels)), 5)}


def as_model(graph: Any) -> Any:
    """Return a function that is called as a model is."""

    def run(**batch: Any) -> Any:
        return argparse.Namespace(logits=graph.run(feed(batch, graph.inputs))["logits"])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {"dense": load_pruned(options.dense).eval(), "pruned": load_pruned(options.pruned).eval()}
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    with tempfile.TemporaryDirectory() as folder:
        graphs = export_all(models, Path(folder))
        for batch in (1, 8):
            inputs = random_inputs(models["dense"], batch, 128)
            feeds = {name: feed(inputs, graph.inputs) for name, graph in graphs.items()}
            runs = {name: lambda graph=graph, fed=feeds[name]: graph.run(fed) for name, graph in graphs.items()}
            times = compare_latency(runs, repeats=40 if batch == 1 else 12)
            faster = {name: round(times["dense onnx"] / time, 3) for name, time in times.items()}
            note = {"what": "speed", "batch": batch, "length": 128, "threads": 1, "cpu_has": cpu_has()}
            add_record("int8", {**note, "faster_than_dense_onnx": faster}, key=("what", "batch"))
        for name, graph in graphs.items():
            told = quality(as_model(graph), tokenizer, options.data)
            add_record("int8", {"what": "quality", "file": name, **told}, key=("what", "file"))


if __name__ == "__main__":
    main()
