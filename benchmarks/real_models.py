"""Real models: masked, shrunk and reloaded give the same numbers, the same text and the same transcript.

python benchmarks/real_models.py [--models FOLDER] [--only NAME ...]

FOLDER holds what ../shared/models/build.py builds (default: runs/models); two small ones lie beside it as they are.
A tenth of all heads (or KV groups) and a fifth of all neurons go, evenly spread, and an attention branch in the middle.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import add_record

NAME = "real_models"
SHARED = Path("../shared/models")
TEXT = "The quick brown fox jumps over the lazy dog, and then"
SECONDS_OF_SOUND = 4
# folder -> class that loads it
CLASSES = {
    "all-minilm-l6-v2": "AutoModel",
    "smollm2-135m-instruct": "AutoModelForCausalLM",
    "dinov2-small": "AutoModel",
    "whisper-tiny-en": "WhisperForConditionalGeneration",
    "stories260k": "AutoModelForCausalLM",
    "rxnmapper-albert": "AutoModel",
}


def load(folder: Path, name: str) -> Any:
    import torch
    import transformers

    return getattr(transformers, CLASSES[name]).from_pretrained(folder, dtype=torch.float32).eval()


def inputs(folder: Path, name: str, model: Any) -> dict[str, Any]:
    """Return real text through the model's own tokenizer where it has one; a synthetic sound or picture elsewhere."""
    import torch
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    draw = torch.Generator().manual_seed(0)
    if name == "dinov2-small":
        return {"pixel_values": torch.randn(2, 3, 224, 224, generator=draw)}
    if name == "whisper-tiny-en":
        time_axis = torch.arange(16000 * SECONDS_OF_SOUND) / 16000
        sound = (time_axis * 440 * (1 + time_axis)).mul(2 * torch.pi).sin() * (time_axis * 3).sin()
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
        features = extractor(sound.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        return {"input_features": features, "decoder_input_ids": torch.tensor([[50257, 50362, 50363]])}
    if name == "rxnmapper-albert":
        ids = torch.randint(5, model.config.vocab_size, (2, 32), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return dict(AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt"))


def plan(model: Any) -> dict[str, list[int]]:
    from hf_prune import find_groups

    groups = find_groups(model)
    grouped = {group.place for group in groups if group.kind == "kv_group"}
    kept = {}
    for group in groups:
        every = 5 if group.kind == "neuron" else 10
        if group.kind in ("neuron", "kv_group") or (group.kind == "head" and group.place not in grouped):
            gone = {u for u in range(group.units) if u % every == 3}
            kept[group.name] = [u for u in range(group.units) if u not in gone]
    branches = [g for g in groups if g.kind == "branch" and g.name.endswith("attention.branch")]
    if len(branches) > 2:
        kept[branches[len(branches) // 2].name] = []
    return kept


def said(model: Any, batch: dict[str, Any]) -> list[int] | None:
    """Return the tokens that a model generates, greedily and with its cache."""
    if not model.can_generate():
        return None
    given = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=40, do_sample=False)[0].tolist()


def check(folder: Path, name: str) -> None:
    import torch

    from hf_prune import load_pruned, mask_units, save_pruned, shrink
    from hf_prune.selfcheck import output_of, relative_difference

    start, model = time.monotonic(), load(folder, name)
    batch = inputs(folder, name, model)
    kept, before = plan(model), sum(parameter.numel() for parameter in model.parameters())
    dense_said, dense = said(model, batch), output_of(model, batch)
    mask_units(model, kept)
    masked, masked_said = output_of(model, batch), said(model, batch)
    shrink(model, kept)
    shrunk, shrunk_said = output_of(model, batch), said(model, batch)
    with tempfile.TemporaryDirectory() as out:
        again = load_pruned(save_pruned(model, out), model_class=type(model), dtype=torch.float32).eval()
        reloaded, reloaded_said = output_of(again, batch), said(again, batch)
    record = {
        "model": name,
        "groups_cut": len(kept),
        "parameters": [before, sum(p.numel() for p in model.parameters())],
    }
    record |= {"effect": relative_difference(dense, masked), "masked_shrunk": relative_difference(masked, shrunk)}
    record |= {"shrunk_reloaded": relative_difference(shrunk, reloaded)}
    if masked_said is not None:
        record |= {"tokens": len(masked_said), "same_tokens": masked_said == shrunk_said == reloaded_said}
        record |= {"differs_from_dense": masked_said != dense_said}
    add_record(NAME, record | {"seconds": round(time.monotonic() - start, 1)}, key=("model",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--only", nargs="+", default=list(CLASSES))
    options = parser.parse_args()
    for name in options.only:
        check(next(f for f in (options.models / name, SHARED / name) if f.is_dir()), name)


if __name__ == "__main__":
    main()
