# ruff: noqa: E402 (the tests folder has to be on the path first)
"""What exports after uneven pruning, format by family, and what int8 brings: writes results/export_formats.json.

python benchmarks/export_formats.py [--families bert t5] [--formats onnx-int8 openvino]
python benchmarks/export_formats.py --latency      MiniLM's shape, random weights, all files in turn
python benchmarks/export_formats.py --table        what docs/howto/formats.md shows

Models are tiny, with every tensor drawn at random and every layer another number of heads and neurons. Run it on both
lanes, with the extras openvino (and executorch on transformers 5); a format that is not installed is recorded as such.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

import torch
import transformers
from common import add_record, load_records
from models import randomize

from hf_prune import PruningError, export, find_groups, shrink
from hf_prune.exporting import measure_exports
from hf_prune.report import random_inputs

NAME = "export_formats"
LANE = "optimum" if transformers.__version__.startswith("4.") else "v5"
TEXT = {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SEQ2SEQ = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
PARTS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
PICTURE = {"image_size": 16, "patch_size": 8, "num_channels": 1, "num_labels": 5}


def of(config: str, head: str, **settings: Any) -> Callable[[], Any]:
    """Return a function that builds a model; classes by their names, since only those asked for need to be there."""
    return lambda: getattr(transformers, head)(getattr(transformers, f"{config}Config")(**settings))


FAMILIES = {
    "bert": of("Bert", "BertForSequenceClassification", **TEXT, **SIZES),
    "vit": of("ViT", "ViTForImageClassification", **PICTURE, **SIZES),
    "llama": of("Llama", "LlamaForCausalLM", **TEXT, **SIZES, num_key_value_heads=2),
    "t5": of("T5", "T5ForConditionalGeneration", **SEQ2SEQ, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    "distilbert": of(
        "DistilBert", "DistilBertForSequenceClassification", **TEXT, dim=32, n_layers=2, n_heads=4, hidden_dim=64
    ),
    "roberta": of("Roberta", "RobertaForSequenceClassification", **TEXT, **SIZES),
    "gpt2": of("GPT2", "GPT2LMHeadModel", vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "bart": of(
        "Bart",
        "BartForConditionalGeneration",
        **SEQ2SEQ,
        **PARTS,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    ),
    "electra": of("Electra", "ElectraForSequenceClassification", **TEXT, **SIZES, embedding_size=32),
    "albert": of("Albert", "AlbertForSequenceClassification", **TEXT, **SIZES, embedding_size=32),
    "qwen2": of("Qwen2", "Qwen2ForCausalLM", **TEXT, **SIZES, num_key_value_heads=2),
    "opt": of("OPT", "OPTForCausalLM", **TEXT, **{**SIZES, "ffn_dim": 64}, word_embed_proj_dim=32),
    "deit": of("DeiT", "DeiTForImageClassification", **PICTURE, **SIZES),
    "dinov2": of("Dinov2", "Dinov2ForImageClassification", **PICTURE, **SIZES),
    "mbart": of(
        "MBart",
        "MBartForConditionalGeneration",
        **SEQ2SEQ,
        **PARTS,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    ),
}
FORMATS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "onnx-fp16": {"dtype": "fp16"},
    "onnx-int8": {"quantize": "dynamic"},
    "onnx-int8-static": {"quantize": "static"},
    "openvino": {"format": "openvino"},
    "openvino-fp16": {"format": "openvino", "dtype": "fp16"},
    "openvino-int8": {"format": "openvino", "quantize": "dynamic"},
    "openvino-int8-static": {"format": "openvino", "quantize": "static"},
    "executorch": {"format": "executorch"},
}


def cut_unevenly(model: Any) -> Any:
    """Leave each attention another number of heads, and each feed-forward block another width."""
    groups = find_groups(randomize(model))
    plan = {one.name: range(max(1, one.units - 1 - n % 3)) for n, one in enumerate(groups) if one.kind != "branch"}
    return shrink(model, plan).eval()


def attempt(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Export once; say how far it is from torch, or why there is nothing."""
    begun = time.monotonic()
    if settings.get("quantize") == "static":
        settings = {**settings, "data": [random_inputs(model, 8, 8 + n, seed=n) for n in range(8)]}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = export(model, Path(folder) / "here", **settings)
        figures = {"max_difference": float(f"{done.max_difference:.2g}"), "allowed": float(f"{done.atol:.2g}")}
        return {"exports": True, **figures, "seconds": round(time.monotonic() - begun, 1)}
    except PruningError as error:
        return {"exports": False, "why": str(error).split("\n")[0][:300]}


def minilm() -> Any:
    """Return a model of MiniLM-L6's shape, with fresh weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).eval()


def latency(batches: tuple[int, ...] = (1, 8), length: int = 128) -> None:
    """Time every file of one model in turn, and record what each is against fp32 in ONNX Runtime."""
    model = minilm()
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in FORMATS if "fp16" not in name and "static" not in name and name != "executorch"]
        done = [export(model, Path(folder) / name, **FORMATS[name]) for name in names]
        for batch in batches:
            repeats = 20 if batch == 1 else 7
            rows = measure_exports(model, done, random_inputs(model, batch, length), repeats=repeats)
            milliseconds = {row.get("folder", "torch"): round(row["latency_ms"], 2) for row in rows}
            faster = {name: round(milliseconds["onnx"] / value, 2) for name, value in milliseconds.items()}
            size = {row.get("folder", "torch"): round(row["size_mb"], 1) for row in rows}
            figures = {"latency_ms": milliseconds, "faster_than_onnx_fp32": faster, "size_mb": size}
            shape = {"what": "latency", "batch": batch, "length": length, "threads": 1, "repeats": repeats}
            add_record(NAME, {**shape, "lane": LANE, "cpu_has": cpu_has(), **figures}, key=("what", "batch", "lane"))


def table() -> None:
    """Print on which lanes each family exports to each format."""
    versions = {"optimum": "4.57", "v5": "5"}
    done = [one for one in load_records(NAME) if one["what"] == "table" and one["exports"]]
    print(f"| family | {' | '.join(FORMATS)} |\n{'| --- ' * (1 + len(FORMATS))}|")
    for family in FAMILIES:
        lanes = {
            name: [one["lane"] for one in done if (one["family"], one["format"]) == (family, name)] for name in FORMATS
        }
        cells = [", ".join(versions[lane] for lane in versions if lane in lanes[name]) or "-" for name in FORMATS]
        print(f"| {family} | {' | '.join(cells)} |")


def cpu_has() -> list[str]:
    """Return which instructions for int8 the processor has; none: 16-bit products, so that int8 gains less."""
    information = Path("/proc/cpuinfo")
    text = information.read_text("utf-8") if information.is_file() else ""
    return sorted(set(re.findall(r"\b(?:avx512_vnni|avx_vnni|amx_int8|asimddp|i8mm)\b", text)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES], default=[*FAMILIES])
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS], default=[*FORMATS])
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        table()
        return
    if asked.latency:
        latency()
        return
    for family in asked.families:
        model = cut_unevenly(FAMILIES[family]())
        for name in asked.formats:
            record = {"what": "table", "lane": LANE, "family": family, "format": name}
            add_record(NAME, {**record, **attempt(model, FORMATS[name])}, key=("what", "lane", "family", "format"))


if __name__ == "__main__":
    main()
