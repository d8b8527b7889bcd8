"""The ways to load of the matrix: each loads a folder, and says how far the model is from the one that was saved."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from load_alone import ACROSS_LANES, CELL, LANE, digest, own_memory
from load_models import MODELS, ask, build, cut, processors
from safetensors.torch import load_file
from transformers.pipelines import SUPPORTED_TASKS
from zoo import inputs

from hf_prune import PruningError, save_pruned
from hf_prune.selfcheck import output_of, relative_difference

LAYER = re.compile(r"\.\d+\.")  # of a numbered layer
F32 = {"dtype": torch.float32}


class NotApplicableError(Exception):
    """Raised with the reason why a cell cannot exist."""


@dataclass(frozen=True)
class Case:
    """A folder of the matrix, and what the live model that was saved in it answers."""

    name: str
    folder: Path
    told: dict[str, Any]

    @property
    def tolerance(self) -> float:
        """Return the largest difference that passes: none where the model was saved on this lane."""
        return 0.0 if self.told["lane"] == LANE else ACROSS_LANES

    def load(self, part: str = "model", **settings: Any) -> Any:
        """Load a part of the folder by its Auto class, in float32 where nothing else is said."""
        auto = getattr(transformers, MODELS[self.name].auto)
        return auto.from_pretrained(self.folder / part, **{**F32, **settings})

    def difference(self, model: Any) -> float:
        """Return how far a model is from the saved one; on the same lane its tensors must be equal, too."""
        if type(model).__name__ != self.told["class"]:
            raise TypeError(f"is a {type(model).__name__}, and a {self.told['class']} was saved")
        if self.told["lane"] == LANE and digest(model) != self.told["digest"]:
            raise ValueError("tensors differ from those that were saved")
        return relative_difference(self.told["output"], answer(model, self.told["inputs"]))


def answer(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's output, its tensors in memory of their own."""
    own_memory(model)
    return output_of(model, batch)


def save(name: str, kind: str, folder: Path, *, wide: bool) -> str:
    """Build, cut and save one model in every form that the ways need; say why where it cannot be cut so."""
    model = build(name, wide=wide)
    reason = cut(model, kind)
    if reason:
        return reason
    batch = inputs(model)
    made = processors(name, model)
    save_pruned(model, folder / "model")
    for one in made.values():
        one.save_pretrained(folder / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    save_pruned(model, folder / "sharded", max_shard_size=min(1_000_000, size // 3))
    told = {"lane": LANE, "auto": MODELS[name].auto, "class": type(model).__name__, "digest": digest(model)}
    told |= {"inputs": batch, "output": answer(model, batch), "standalone": save_standalone(model, folder)}
    if MODELS[name].pipeline in SUPPORTED_TASKS:
        told["asked"] = ask(name, transformers.pipeline(MODELS[name].pipeline, model=model, **made))
    told["adapted"] = save_adapter(copy.deepcopy(model), batch, folder / "adapter")
    torch.save(told, folder / CELL)
    return ""


def save_standalone(model: Any, folder: Path) -> str | None:
    """Save the model so that it loads without hf_prune, with a file of code where that needs one; or say why not."""
    try:
        save_pruned(model, folder / "standalone", standalone=True)
    except PruningError as error:
        return str(error)
    return None


def save_adapter(model: Any, batch: dict[str, torch.Tensor], folder: Path) -> torch.Tensor | str:
    """Put LoRA on a model, train it for two steps, save the adapter; return the output, or the error's text."""
    import peft

    try:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-2)
        for _ in range(2):
            adapted(**batch).logits.pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(folder)
        return answer(adapted, batch)
    except Exception as error:  # a cell of the matrix, not the end of it
        return f"{type(error).__name__}: {error}"


def load_auto(case: Case) -> float:
    return case.difference(case.load())


def load_pipeline(case: Case) -> float:
    """Ask a pipeline that was given nothing but the folder's name.

    Transformers 5 names a class of tokenizers that transformers 4 does not have: there the tokenizer is handed over.
    """
    task = MODELS[case.name].pipeline
    if task not in SUPPORTED_TASKS:
        raise NotApplicableError(f"transformers {transformers.__version__} has no {task} pipeline")
    if "asked" not in case.told:
        raise NotApplicableError(
            f"saved where transformers has no {task} pipeline, so there is nothing to compare with"
        )
    given = processors(case.name, case.load()) if LANE == "optimum" and case.told["lane"] == "v5" else {}
    pipe = transformers.pipeline(task, model=str(case.folder / "model"), **given, **F32)
    case.difference(pipe.model)
    got, expected = ask(case.name, pipe), case.told["asked"]
    if [type(one) for one in got] != [type(one) for one in expected]:
        raise ValueError(f"answers {got[:6]}, expected {expected[:6]}")
    if [one for one in got if isinstance(one, str)] != [one for one in expected if isinstance(one, str)]:
        raise ValueError(f"answers {got[:6]}, expected {expected[:6]}")
    numbers = [torch.tensor([one for one in ones if not isinstance(one, str)] or [1.0]) for ones in (expected, got)]
    return relative_difference(*numbers)


def load_device_map(case: Case) -> float:
    return case.difference(case.load(device_map="auto"))


def load_int8(case: Case) -> float:
    """Let bitsandbytes quantize while loading; compare with quantizing the loaded model's own layers one by one."""
    return quantized_difference(case, {"load_in_8bit": True})[0]


def quantized_difference(case: Case, settings: dict[str, Any]) -> tuple[float, Any]:
    """Return how far quantizing at loading is from quantizing the live model, and the quantized model."""
    config = transformers.BitsAndBytesConfig(**settings)
    model, live = case.load(quantization_config=config), case.load()
    case.difference(live)
    names = quantize(live, model)
    use_plain_kernels(model)
    use_plain_kernels(live)
    spared = model._keep_in_fp32_modules or ()  # T5's `wo`
    missed = [name for name, one in model.named_modules() if type(one) is torch.nn.Linear and one.weight.numel()]
    missed = [name for name in missed if LAYER.search(name) and not name.endswith(tuple(spared))]
    if missed or not names:
        raise ValueError(f"not quantized: {missed[:4] or 'anything'}")
    batch = case.told["inputs"]
    difference = relative_difference(output_of(live, batch), output_of(model, batch))
    if difference > case.tolerance:
        return difference, model
    if torch.equal(output_of(model, batch), case.told["output"]):
        raise ValueError("quantizing changed nothing")
    return difference, model


def use_plain_kernels(model: Any) -> None:
    """Keep bitsandbytes from its 4 bit kernel for CPUs with AVX512-BF16.

    That one raises unless a layer has a multiple of 32 rows and of 64 columns, in dense models as in pruned ones.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantize(live: Any, model: Any) -> list[str]:
    """Quantize those layers of the live model that bitsandbytes quantized in the other; return their names."""
    import bitsandbytes as bnb

    names = [name for name, one in model.named_modules() if isinstance(one, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))]
    for name in names:
        parent, _, last = name.rpartition(".")
        new = _quantized(model.get_submodule(name), live.get_submodule(name))
        setattr(live.get_submodule(parent), last, new)
    return names


def _quantized(theirs: Any, old: Any) -> Any:
    """Quantize one layer as bitsandbytes' own documentation does: a layer of its class is given the weight."""
    import bitsandbytes as bnb

    weight = old.weight.data.T.contiguous() if type(old).__name__ == "Conv1D" else old.weight.data.clone()
    shape = (weight.shape[1], weight.shape[0], old.bias is not None)
    if isinstance(theirs, bnb.nn.Linear8bitLt):
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=theirs.state.threshold)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    else:
        new = bnb.nn.Linear4bit(*shape, compute_dtype=theirs.compute_dtype)
        settings = {key: getattr(theirs.weight, key) for key in ("quant_type", "blocksize", "compress_statistics")}
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **settings)
    new.weight = new.weight.to("cpu")
    new.bias = old.bias
    return new


def load_adapter(case: Case) -> float:
    """Put the adapter that was trained on the live model on the one that was loaded."""
    import peft

    expected = case.told["adapted"]
    if isinstance(expected, str):
        raise ValueError(f"on the live model already: {expected}")
    model = peft.PeftModel.from_pretrained(case.load(), case.folder / "adapter")
    if relative_difference(case.told["output"], expected) < 1e-3:
        raise ValueError("training changed nothing")
    files = set(load_file(case.folder / "adapter" / "adapter_model.safetensors"))
    strange = sorted(files ^ set(peft.get_peft_model_state_dict(model)))
    if strange:
        raise NotApplicableError(f"PEFT calls this otherwise on the other lane, in dense models too: {strange[0]}")
    return relative_difference(expected, answer(model, case.told["inputs"]))


def load_shards(case: Case) -> float:
    files = len(list((case.folder / "sharded").glob("*.safetensors")))
    if files < 2:
        raise ValueError(f"saved in {files} file")
    return case.difference(case.load("sharded"))


WAYS: dict[str, Callable[[Case], float]] = {
    "auto": load_auto,
    "pipeline": load_pipeline,
    "device_map": load_device_map,
    "bitsandbytes": load_int8,
    "peft": load_adapter,
    "shards": load_shards,
}


def judge(way: Callable[[Case], float], case: Case) -> float | str:
    """Return the difference of a cell, or what went wrong, or why the cell cannot exist."""
    try:
        value = way(case)
    except NotApplicableError as reason:
        return f"not applicable: {reason}"
    except Exception as error:  # a cell of the matrix, not the end of it
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return value if value <= case.tolerance else f"failed: differs by {value:.1e}"
