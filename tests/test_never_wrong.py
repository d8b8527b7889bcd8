"""Stock transformers without hf_prune loads a folder rightly, or raises: never something else, nothing drawn at random."""

from __future__ import annotations

import json
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


def cuts(name: str) -> dict[str, Any]:
    """Return models of one type: each kind cut unevenly, all of a group, masked, or with single weights zeroed."""
    made: dict[str, Any] = {"dense": build(name)}
    groups = find_groups(made["dense"])
    for kind in KINDS:
        mine = [group for group in groups if group.kind == kind]
        for seed in range(3):
            if mine and (plan := random_plan(made["dense"], mine, seed)):
                made[f"{kind}{seed}"] = shrink(build(name), plan)
                made |= {f"{kind}{seed}_masked": mask_units(build(name), plan)} if kind in ZEROS else {}
        for i, group in enumerate(mine if kind not in ("layer", "expert") else ()):  # one place, and all of it
            add(made, f"{kind}_none{i}", name, {group.name: []})
        add(made, f"{kind}_first", name, {group.name: range(group.units // 2) for group in mine})
        add(made, f"{kind}_one", name, {group.name: range(1, group.units) for group in mine[:1]})
    if kv_groups := [group for group in groups if group.kind == "layer"]:
        add(made, "layer_and_neuron", name, {kv_groups[0].name: [1], "layers.1.mlp.neurons": [0, 3]})
    made["weights"] = build(name)
    prune(made["weights"], [WeightPruner(sparsity=0.5, score="l1")])
    return made


def build(name: str) -> Any:
    return zoo.build(name, MODELS[name][0], layers=3 if name != "resnet" else 2)


def add(made: dict[str, Any], key: str, name: str, plan: dict[str, Any]) -> None:
    try:
        made[key] = shrink(build(name), plan) if plan else None
    except PruningError:  # not for this model
        made[key] = None
    if made[key] is None:
        del made[key]


def save(model: Any, name: str, folder: Path) -> bool:
    """Save a model with a batch and its logits; return whether the config says that stock transformers can load it."""
    save_pruned(model, folder)
    (folder / "auto").write_text(MODELS[name][1])
    batch = zoo.inputs(model)
    torch.save(batch, folder / "batch")
    with torch.no_grad():
        torch.save(model.eval()(**batch).logits, folder / "logits")
    return json.loads((folder / "config.json").read_text()).get("pruning_config", {}).get("stock", True)


@pytest.mark.parametrize(
    "names", [("bert", "distilbert", "gpt2", "llama", "mixtral"), ("t5", "bart", "vit", "resnet", "whisper")]
)
def test_stock_transformers_loads_rightly_or_refuses(names, tmp_path):
    stock = {}
    for name in names:
        for key, model in cuts(name).items():
            stock[f"{name}-{key}"] = save(model, name, tmp_path / f"{name}-{key}")
    told = json.loads(run_python(LOAD, tmp_path).splitlines()[-1])
    assert told.keys() == stock.keys()
    unlike = {key: (stock[key], *told[key]) for key in stock if told[key][0] != ("right" if stock[key] else "refused")}
    assert unlike == {}
