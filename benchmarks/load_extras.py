"""Ways to load that the matrix tries on BERT and Llama only: dtypes, four bits, torchao, the Hub, base models, disk.

Each returns how far the model is from the one that was saved, or from the same treatment of it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from hub_server import HubServer
from load_alone import LANE
from load_models import MODELS
from load_ways import F32, Case, answer, quantized_difference, use_plain_kernels
from torch import nn

from hf_prune import load_pruned, save_pruned
from hf_prune.selfcheck import output_of, relative_difference

ROOT = Path(__file__).resolve().parent.parent
ON_THE_HUB = """
import sys, torch, transformers
from huggingface_hub import HfApi
from hf_prune import load_pruned
folder, auto, out = sys.argv[1:]
api = HfApi()
api.create_repo("tester/matrix")
api.create_branch("tester/matrix", branch="second")
api.upload_folder(repo_id="tester/matrix", folder_path=folder, path_in_repo="inside", revision="second")
where = {"revision": "second", "subfolder": "inside", "dtype": torch.float32}
model = getattr(transformers, auto).from_pretrained("tester/matrix", **where)
assert type(load_pruned("tester/matrix", **where)) is type(model)
model.save_pretrained(out)
"""


def low_memory(case: Case) -> float:
    return case.difference(case.load(low_cpu_mem_usage=True))


def bfloat16(case: Case) -> float:
    """Compare with the saved model's parameters cast one by one: its buffers stay as they are."""
    model, live = case.load(dtype=torch.bfloat16), case.load()
    case.difference(live)
    if {one.dtype for one in model.parameters()} != {torch.bfloat16}:
        raise TypeError(f"has {sorted({str(one.dtype) for one in model.parameters()})}")
    for one in live.parameters():
        one.data = one.data.bfloat16()
    return relative_difference(answer(live, case.told["inputs"]), answer(model, case.told["inputs"]))


def disk_offload(case: Case) -> float:
    """Leave the last layer on the disk: accelerate puts hooks on the modules of a pruned model."""
    names = [path for path, one in case.load().named_modules() if path and not list(one.children())]
    places: dict[str, Any] = dict.fromkeys(names, "cpu")
    numbered = [path for path, one in case.load().named_modules() if path.rpartition(".")[2].isdigit()]
    last = max(numbered, key=lambda path: (-path.count("."), int(path.rpartition(".")[2])))
    places = {path: place for path, place in places.items() if not path.startswith(f"{last}.")} | {last: "disk"}
    with tempfile.TemporaryDirectory() as folder:
        model = case.load(device_map=places, offload_folder=folder)
        if not any(one.is_meta for one in model.parameters()):
            raise ValueError("nothing was left on the disk")
        return relative_difference(case.told["output"], output_of(model, case.told["inputs"]))


def from_the_hub(case: Case) -> float:
    """Push the folder into a folder of a branch, and load it from there: the real client and a Hub of our own."""
    with tempfile.TemporaryDirectory() as home, HubServer() as hub:
        arguments = [str(case.folder / "model"), MODELS[case.name].auto, f"{home}/loaded"]
        environment = hub.environment(Path(home) / "home", token=hub.token) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ON_THE_HUB, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        auto = getattr(transformers, MODELS[case.name].auto)
        return case.difference(auto.from_pretrained(f"{home}/loaded", **F32))


def int8_again(case: Case) -> float:
    return _saved_again(case, *quantized_difference(case, {"load_in_8bit": True}))


def int4(case: Case) -> float:
    return quantized_difference(case, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})[0]


def int4_again(case: Case) -> float:
    return _saved_again(case, *quantized_difference(case, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))


def torchao_int8(case: Case) -> float:
    """Let torchao quantize while loading; compare with its own function on the same layers of the live model."""
    return _torchao(case)[0]


def torchao_int8_again(case: Case) -> float:
    """Save what torchao quantized, too. Transformers 4 can only pickle it, and reads pickles only where told to."""
    return _saved_again(case, *_torchao(case), pickled=LANE == "optimum")


def _torchao(case: Case) -> tuple[float, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = case.load(quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))
    live = case.load()
    case.difference(live)
    names = {path for path, one in model.named_modules() if _is_torchao(one)}
    if not any(path.rpartition(".")[0] for path in names):
        raise ValueError("nothing was quantized")
    quantize_(live, Int8WeightOnlyConfig(), filter_fn=lambda _, path: path in names)
    batch = case.told["inputs"]
    return relative_difference(output_of(live, batch), output_of(model, batch)), model


def _is_torchao(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and "torchao" in type(weight.data).__module__


def _saved_again(case: Case, difference: float, model: Any, *, pickled: bool = False) -> float:
    """Save a quantized model, load it, and compare; quantizing itself must have been right."""
    if difference > case.tolerance:
        return difference
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **({"safe_serialization": False} if pickled else {}))
        auto = getattr(transformers, MODELS[case.name].auto)
        again = auto.from_pretrained(folder, **F32, **({"use_safetensors": False} if pickled else {}))
        use_plain_kernels(again)
        batch = case.told["inputs"]
        if not getattr(again, "is_quantized", False):
            raise ValueError("came back without its quantization")
        return relative_difference(output_of(model, batch), output_of(again, batch))


def base_and_heads(case: Case) -> float:
    """Load the folder as a base model, save that, load it as two head classes, and one of them as a base again."""
    names = {"bert": ("BertModel", "BertForTokenClassification", "BertForQuestionAnswering")}
    names["llama"] = ("LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification")
    base, *heads = (getattr(transformers, name) for name in names[case.name])
    whole = case.load()
    case.difference(whole)
    wanted = _body(whole)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(base.from_pretrained(case.folder / "model", **F32), f"{folder}/base")
        for head in heads:
            model = load_pruned(f"{folder}/base", model_class=head, **F32)
            _check_same(wanted, _body(model))
        save_pruned(model, f"{folder}/head")
        _check_same(wanted, _body(base.from_pretrained(f"{folder}/head", **F32), inside=True))
    return 0.0


def _body(model: Any, *, inside: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of the layers, by their names in the base model."""
    body = model if inside else model.base_model
    return {name: tensor for name, tensor in body.state_dict().items() if "layer" in name}


def _check_same(wanted: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    different = [name for name in wanted if name not in got or not torch.equal(wanted[name], got[name])]
    if different or wanted.keys() != got.keys():
        raise ValueError(f"other tensors: {different[:3]}")


EXTRAS: dict[str, Callable[[Case], float]] = {
    "low_cpu_mem_usage": low_memory,
    "bf16": bfloat16,
    "disk_offload": disk_offload,
    "bnb_8bit_reloaded": int8_again,
    "bnb_4bit": int4,
    "bnb_4bit_reloaded": int4_again,
    "torchao_int8": torchao_int8,
    "torchao_int8_reloaded": torchao_int8_again,
    "base_and_heads": base_and_heads,
}
HUB: dict[str, Callable[[Case], float]] = {"revision_and_subfolder": from_the_hub}  # ten seconds each
