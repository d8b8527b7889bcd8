"""What the parts of `gpu.py` share: models of two sizes with random weights, inputs for them, and a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS, TOKENS = 1000, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NeedsGpuError(Exception):
    """A case that this machine cannot run."""


@dataclass(frozen=True)
class Size:
    """How large models are, and how long they train."""

    layers: int
    hidden: int
    heads: int
    groups: int  # of keys and values
    inner: int
    image: int
    batch: int
    steps: int
    learning: int  # steps in which the task of part 5 is learned
    repeats: int
    compiled: tuple[int, ...]  # batches that torch.compile is tried with
    long: tuple[int, int]  # batch and tokens that keep a GPU busy, whatever its host

    @property
    def middle(self) -> Size:
        """A model that learns in seconds."""
        return replace(self, layers=min(self.layers, 4), hidden=min(self.hidden, 256), heads=4, inner=self.inner // 3)


SIZES = {
    "full": Size(
        12, 768, 12, 4, 3072, 224, batch=128, steps=60, learning=400, repeats=30, compiled=(8, 32), long=(128, 512)
    ),
    "small": Size(2, 32, 4, 2, 96, 32, batch=8, steps=12, learning=60, repeats=3, compiled=(8,), long=(8, 64)),
}


def need_gpu(what: str) -> None:
    if DEVICE == "cpu":
        raise NeedsGpuError(f"{what} needs a GPU")


def build(name: str, size: Size) -> Any:
    """Build a model with random weights, norms and biases too: fresh ones hide wrong cuts."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": size.layers, "hidden_size": size.hidden, "num_attention_heads": size.heads}
    shape |= {"intermediate_size": size.inner, "vocab_size": WORDS}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, **quiet))
    elif name == "vit":
        patches = {"image_size": size.image, "patch_size": size.image // 14 or 1}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, **patches))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=size.groups))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def place(model: Any, dtype: torch.dtype) -> Any:
    """Move a model to the device, its parameters in a precision; buffers keep theirs, as in a loaded model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DEVICE, dtype)
    return model.to(DEVICE)


def draw(model: Any, rows: int, seed: int = 0, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Draw a batch for a model, where the model is and in its precision."""
    by = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=by)
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        batch = {"pixel_values": torch.randn(rows, 3, side, side, generator=by).to(model.dtype), "labels": labels}
    else:
        ids = torch.randint(5, WORDS, (rows, tokens), generator=by)
        labels = ids if model.config.model_type == "llama" else labels
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: one.to(model.device) for name, one in batch.items()}


@torch.no_grad()
def graphed(model: Any, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Return what replays a forward as a CUDA graph: without the host's time for each of its kernels."""
    ids, graph = batch["input_ids"], torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):  # what is allocated or chosen once
            model(input_ids=ids)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        model(input_ids=ids)
    return graph.replay


@torch.no_grad()
def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: one for name, one in batch.items() if name != "labels"}).logits


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return forward(model.eval(), batch).float()


def largest(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each, run one after another again and again."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(5 + repeats):
        for name, run in runs.items():
            taken = milliseconds(run)
            times[name] += [taken] if number >= 5 else []
    return {name: round(statistics.median(taken), 3) for name, taken in times.items()}


def milliseconds(run: Callable[[], Any]) -> float:
    """Time one run: on a GPU between two events in its stream."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)
