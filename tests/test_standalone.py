"""Standalone folders: they load where hf_prune is not installed, and everywhere else as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from models import BUILD, PLANS, assert_same_outputs, assert_same_weights, build_bert, draw_batch, logits_of

from hf_prune import PruningError, load_pruned, save_pruned, shrink
from hf_prune.checkpoint import own_code
from hf_prune.checkpoint.standalone import FILE

AUTO = {"bert": "SequenceClassification", "vit": "ImageClassification", "llama": "CausalLM"}
REMOTE = {"trust_remote_code": True, "dtype": torch.float32}
EMPTY = {"layers.0.attention.branch": [], "layers.1.mlp.neurons": []}
KINDS = {
    "uneven": lambda name: PLANS[name],
    "emptied": lambda name: {**{key: kept for key, kept in PLANS[name].items() if ".1.attention" in key}, **EMPTY},
    "layers": lambda name: {"layers": [1], "layers.1.mlp.neurons": [3, 5], "layers.1.attention.branch": []},
}
ALONE = """
import json, sys, torch, transformers
try:
    from hf_prune import shrink  # of an editable install a folder of data files may be seen, and no code
except ImportError:
    pass
else:
    raise SystemExit("hf_prune is installed here, so that loading would prove nothing")
for name, auto in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True, dtype=torch.float32).eval()
    batch, expected = torch.load(f"{name}.pt")
    with torch.no_grad():
        logits = model(**batch).logits
    print(name, "equal" if torch.equal(logits, expected) else f"differs by {(logits - expected).abs().max()}")
    if "CausalLM" in auto:
        model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    model.save_pretrained(f"{name}_again")
    try:
        getattr(transformers, auto).from_pretrained(name, trust_remote_code=False)
        print(name, "loads without its file")
    except (RuntimeError, ValueError):
        pass
"""


def python_without_us(folder: Path) -> Path:
    """Make an environment with this lane's packages; an editable install is not found through a path file."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    (packages / "lane.pth").write_text(str(Path(torch.__file__).parent.parent))
    return next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Let transformers copy the files of folders to a place of this test alone."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_folders_load_where_hf_prune_is_not_installed(tmp_path):
    autos = {}
    for name in ("bert", "vit", "llama"):
        for kind, plan in KINDS.items():
            model = shrink(BUILD[name](), plan(name))
            save_pruned(model, tmp_path / f"{name}_{kind}", standalone=True)
            batch = {key: value for key, value in draw_batch(model).items() if key != "labels"}
            torch.save((batch, logits_of(model, batch)), tmp_path / f"{name}_{kind}.pt")
            autos[f"{name}_{kind}"] = f"AutoModelFor{AUTO[name]}"
    command = [python_without_us(tmp_path / "alone"), "-c", ALONE, json.dumps(autos)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} equal" for name in autos]
    for name in autos:
        assert (tmp_path / f"{name}_again" / FILE).read_bytes() == (tmp_path / name / FILE).read_bytes()
        first, again = (load_pruned(tmp_path / one, dtype=torch.float32) for one in (name, f"{name}_again"))
        assert_same_weights(first, again)
        assert_same_outputs(first, again, atol=0)


FAMILIES = {
    "gpt2": ("causal_lm", {"layers.0.attention.heads": [1, 2], "layers.1.mlp.branch": []}),
    "qwen3": ("causal_lm", {"layers.0.attention.kv_groups": [1], "layers.1.attention.branch": []}),
    "t5": ("seq2seq_lm", {"decoder.attention.heads": [1], "encoder.layers.1.mlp.neurons": [*range(7)]}),
    "whisper": ("speech_seq2seq", {"decoder.layers.0.cross_attention.heads": [2], "encoder.layers.1.mlp.branch": []}),
    "mpnet": ("sequence_classification", {"layers.0.attention.heads": [0, 3]}),
    "bloom": ("causal_lm", {"layers.1.attention.heads": [0, 3]}),
    "mixtral": ("causal_lm", {"layers.1.experts": [0, 3]}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, tmp_path):
    task, plan = FAMILIES[name]
    model = zoo.build(name, task, **({"num_key_value_heads": 2} if name == "qwen3" else {}))
    batch = zoo.inputs(model)
    save_pruned(shrink(model, plan), tmp_path / name, standalone=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / name)
    auto = next(auto for auto, value in config.auto_map.items() if value.endswith(f".{type(model).__name__}"))
    again = getattr(transformers, auto).from_pretrained(tmp_path / name, **REMOTE).eval()
    assert "transformers_modules" in type(again).__module__
    assert torch.equal(zoo.outputs(again, batch), zoo.outputs(model, batch))


def test_with_hf_prune_nothing_is_cut_twice(tmp_path):
    model = shrink(build_bert(), PLANS["bert"])
    save_pruned(model, tmp_path, standalone=True)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **REMOTE)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(stock) is type(model) is not type(own)
    assert_same_weights(model, own)
    assert_same_weights(model, stock)
    assert_same_outputs(stock, own, atol=0)


def test_base_model_of_the_folder(tmp_path):
    model = shrink(build_bert(), PLANS["bert"])
    save_pruned(model, tmp_path, standalone=True)
    base = transformers.AutoModel.from_pretrained(tmp_path, **REMOTE)
    assert_same_weights(model.bert, base)


def test_a_model_of_such_a_folder_is_pruned_further_and_saved_as_ever(tmp_path):
    save_pruned(shrink(build_bert(), PLANS["bert"]), tmp_path / "first", standalone=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "first", **REMOTE)
    shrink(model, {"layers.0.mlp.neurons": [3, 6]}).save_pretrained(tmp_path / "second")
    for arguments in (REMOTE, {"dtype": torch.float32}):
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "second", **arguments)
        assert_same_weights(model, again)


def test_the_live_model_and_folders_without_the_file_do_not_speak_of_it(tmp_path):
    model = shrink(build_bert(), PLANS["bert"])
    save_pruned(model, tmp_path / "with", standalone=True)
    assert not hasattr(model.config, "auto_map")
    load_pruned(tmp_path / "with").save_pretrained(tmp_path / "without")
    save_pruned(model, tmp_path / "with")
    for folder in ("with", "without"):
        config = json.loads((tmp_path / folder / "config.json").read_text("utf-8"))
        assert "auto_map" not in config
        assert "standalone" not in config["pruning_config"]
        assert not (tmp_path / folder / FILE).exists()


def test_what_stock_transformers_loads_needs_no_file(tmp_path):
    save_pruned(build_bert(), tmp_path / "dense", standalone=True)
    save_pruned(shrink(build_bert(), {"layers": [1]}), tmp_path / "layers", standalone=True)
    assert not [*tmp_path.glob(f"*/{FILE}")]


def test_the_file_is_short_and_imports_little(tmp_path):
    text = (save_pruned(shrink(build_bert(), PLANS["bert"]), tmp_path, standalone=True) / FILE).read_text("utf-8")
    assert len(text.splitlines()) < 160
    lines = [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert lines == ["__future__", "copy", "functools", "inspect", "typing", "torch", "transformers"]


def test_what_the_file_cannot_say_is_refused(tmp_path):
    model = shrink(zoo.build("levit", "image_classification"), {"stages.0.layers.1.mlp.branch": []})
    with pytest.raises(PruningError, match="A standalone folder cannot say all of this LevitForImageClassification"):
        save_pruned(model, tmp_path / "new", standalone=True)
    assert not (tmp_path / "new").exists()
    save_pruned(model, tmp_path / "new")


# code of strangers
EVIL = {
    "AutoConfig": "evil/code--conf.Cfg",
    "AutoModel": "conf.M",
    "AutoModelForSequenceClassification": "evil--conf.M",
}


@pytest.mark.parametrize("standalone", [True, False])
def test_entries_that_lead_to_a_strangers_code_are_not_saved(standalone, tmp_path):
    build_bert().save_pretrained(tmp_path / "dense")
    edit(tmp_path / "dense", auto_map=EVIL)
    model = shrink(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense"), PLANS["bert"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "conf.py").write_text("raise SystemExit")  # it lay there before
    save_pruned(model, tmp_path / "model", standalone=standalone, digest=True)
    mapped = json.loads((tmp_path / "model" / "config.json").read_text()).get("auto_map", {})
    assert {value.split(".")[0] for value in mapped.values()} == ({Path(FILE).stem} if standalone else set())
    assert "AutoConfig" not in mapped
    transformers.AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert_same_weights(model, load_pruned(tmp_path / "model", dtype=torch.float32))


def test_a_tokenizers_entries_too(tmp_path):
    class Tokenizer:
        def save_pretrained(self, path):
            told = {
                "auto_map": {"AutoTokenizer": ["evil--tok.Slow", None], "AutoX": "mine.Y", "AutoZ": ["mine.Z", None]}
            }
            (Path(path) / "tokenizer_config.json").write_text(json.dumps(told))
            (Path(path) / "mine.py").write_text("")

    save_pruned(build_bert(), tmp_path, tokenizer=Tokenizer())
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told == {"auto_map": {"AutoX": "mine.Y", "AutoZ": ["mine.Z", None]}}


@pytest.mark.parametrize("value", ["a/b--m.C", "m.C", "../m.C", "m", "sub.m.C", "link.C", 5, {}, ["m.C", "x.D"], None])
def test_an_entry_is_own_where_its_file_lies_in_the_folder(value, tmp_path):
    (tmp_path / "m.py").write_text("")
    (tmp_path / "link.py").symlink_to(Path(__file__))
    own = own_code({"auto_map": {"AutoModel": value}, "x": 1}, tmp_path)
    expected = {"a/b--m.C": "m.C", "m.C": "m.C"}.get(value) if isinstance(value, str) else None
    expected = ["m.C", None] if isinstance(value, list) else expected
    assert own == {"x": 1, **({"auto_map": {"AutoModel": expected}} if expected else {})}


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
