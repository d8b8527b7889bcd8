"""Stock transformers without hf_prune loads a folder rightly, or raises: never as another model, nothing drawn anew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_checkpoint import run_python

from hf_prune import PruningError, WeightPruner, find_groups, mask_units, prune, save_pruned, shrink
from hf_prune.selfcheck import random_plan

MODELS = {  # type -> (task, auto class)
    "bert": ("sequence_classification", "AutoModelForSequenceClassification"),
    "distilbert": ("token_classification", "AutoModelForTokenClassification"),
    "gpt2": ("causal_lm", "AutoModelForCausalLM"),
    "llama": ("causal_lm", "AutoModelForCausalLM"),
    "mixtral": ("causal_lm", "AutoModelForCausalLM"),
    "t5": ("seq2seq_lm", "AutoModelForSeq2SeqLM"),
    "bart": ("seq2seq_lm", "AutoModelForSeq2SeqLM"),
    "vit": ("image_classification", "AutoModelForImageClassification"),
    "resnet": ("image_classification", "AutoModelForImageClassification"),
    "whisper": ("speech_seq2seq", "AutoModelForSpeechSeq2Seq"),
}
KINDS = ("head", "kv_group", "neuron", "expert", "channel", "branch", "layer")
ZEROS = ("head", "kv_group", "neuron", "channel", "branch")  # whose masks are zeros, so that any file can hold them

# tells of every folder: loaded rightly, loaded as something else, or refused; and what it said
LOAD = """
import json, pathlib, sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
told = {}
for folder in sorted(path for path in pathlib.Path(".").iterdir() if path.is_dir()):
    auto = getattr(transformers, (folder / "auto").read_text())
    try:
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        told[folder.name] = ["refused", f"{type(error).__name__}: {error}"]
        continue
    drawn = [name for key in ("missing_keys", "mismatched_keys") for name in info[key]]
    with torch.no_grad():
        outputs = model.eval()(**torch.load(folder / "batch"))
    same = torch.equal(outputs.logits, torch.load(folder / "logits"))
    told[folder.name] = ["right" if same and not drawn else "wrong", str(drawn)]
assert "hf_prune" not in sys.modules
print(json.dumps(told))
"""


def cuts(name: str, seeds: int = 1, places: int = 2) -> dict[str, Any]:
    """Return models of one type: each kind cut unevenly, evenly, all of a group, masked, or single weights zeroed."""
    made: dict[str, Any] = {"dense": build(name)}
    groups = find_groups(made["dense"])
    for kind in KINDS:
        mine = [group for group in groups if group.kind == kind]
        for seed in range(seeds):
            plan = random_plan(made["dense"], mine, seed)
            add(made, f"{kind}_{seed}", name, plan)
            if plan and kind in ZEROS:
                made[f"{kind}_{seed}_masked"] = mask_units(build(name), plan)
        for i, group in enumerate(mine[:places] if kind not in ("layer", "expert") else ()):
            add(made, f"{kind}_none_{i}", name, {group.name: []})
        add(made, f"{kind}_half", name, {group.name: range(group.units // 2) for group in mine})
        add(made, f"{kind}_one", name, {group.name: range(1, group.units) for group in mine[:1]})
    if any(group.name == "layers" for group in groups):
        add(made, "layer_and_neuron", name, {"layers": [1], "layers.1.mlp.neurons": [0, 3]})
    made["weights"] = build(name)
    prune(made["weights"], [WeightPruner(sparsity=0.5, score="l1")])
    return made


def build(name: str) -> Any:
    return zoo.build(name, MODELS[name][0], layers=3 if name != "resnet" else 2)


def add(made: dict[str, Any], key: str, name: str, plan: dict[str, Any]) -> None:
    if plan:
        with suppress(PruningError):  # not for this model
            made[key] = shrink(build(name), plan)


def save(model: Any, name: str, folder: Path) -> bool:
    """Save a model with a batch and its logits; return whether the config says that stock transformers can load it."""
    save_pruned(model, folder)
    (folder / "auto").write_text(MODELS[name][1])
    batch = zoo.inputs(model)
    torch.save(batch, folder / "batch")
    with torch.no_grad():
        torch.save(model.eval()(**batch).logits, folder / "logits")
    return json.loads((folder / "config.json").read_text()).get("pruning_config", {}).get("stock", True)


@pytest.mark.parametrize("names", [("bert", "gpt2", "llama", "mixtral", "vit"), ("t5", "whisper", "resnet")])
def test_stock_transformers_loads_rightly_or_refuses(names, tmp_path):
    assert faults(names, tmp_path) == {}


def faults(names: Sequence[str], scratch: Path, **how_many: int) -> dict[str, Any]:
    """Return what stock transformers, in one process, made of folders that it should have loaded, or refused."""
    stock = {}
    for name in names:
        for key, model in cuts(name, **how_many).items():
            stock[f"{name}-{key}"] = save(model, name, scratch / f"{name}-{key}")
    told = json.loads(run_python(LOAD, scratch).splitlines()[-1])
    assert told.keys() == stock.keys()
    assert {True, False} == set(stock.values())
    return {key: (stock[key], *told[key]) for key in stock if told[key][0] != ("right" if stock[key] else "refused")}
