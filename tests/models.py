"""Tiny models, inputs and checks that tests share. Every tensor is random: fresh norms and biases hide wrong cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_prune import find_groups

TINY_RECIPE = (  # what makes the quickstart a matter of seconds
    "model.config.hidden_size=32",
    "model.config.num_attention_heads=4",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "data.train_limit=256",
)
TEXT = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
BERT_LIKE = {**TEXT, **SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {f"layers.{i}.attention.heads": 4 for i in range(2)}
KV_GROUPS = {f"layers.{i}.attention.kv_groups": 2 for i in range(2)}
NEURONS = {f"layers.{i}.mlp.neurons": 24 for i in range(2)}
UNITS = {  # of what lies inside a layer's branches
    "bert": {**HEADS, **NEURONS},
    "vit": {**HEADS, **NEURONS},
    "llama": {**KV_GROUPS, **HEADS, **NEURONS},
    "llama_mha": {**HEADS, **NEURONS},
}
BRANCHES = {f"layers.{i}.{place}.branch": 1 for i in range(2) for place in ("attention", "mlp")}
LAYERS = {"layers": 2}
INNER = ("head", "kv_group", "neuron")
UNEVEN = {
    "layers.0.attention.heads": [0, 2, 3],
    "layers.1.attention.heads": [1],
    "layers.0.mlp.neurons": [*range(0, 24, 3)],
    "layers.1.mlp.neurons": [*range(5, 18)],
}
UNEVEN_LLAMA = {
    "layers.0.attention.kv_groups": [1],
    "layers.0.attention.heads": [3],
    "layers.1.attention.heads": [0, 2],
    "layers.0.mlp.neurons": [*range(0, 24, 3)],
    "layers.1.mlp.neurons": [*range(5, 18)],
}
PLANS = {"bert": UNEVEN, "vit": UNEVEN, "llama": UNEVEN_LLAMA, "llama_mha": UNEVEN}


def randomize(model: Any, seed: int = 0) -> Any:
    """Draw every parameter at random, norms and biases too, and switch to evaluation."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval()


def build_bert(head: str = "ForSequenceClassification", seed: int = 0, **changes: Any) -> Any:
    config = transformers.BertConfig(**{**BERT_LIKE, "num_labels": 3, **changes})
    return randomize(getattr(transformers, f"Bert{head}")(config), seed)


def build_vit(seed: int = 0) -> Any:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_channels=1, num_labels=3)
    return randomize(transformers.ViTForImageClassification(config), seed)


def build_llama(seed: int = 0, head: str = "ForCausalLM", **changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**TEXT, **SIZES, "num_key_value_heads": 2, **changes})
    return randomize(getattr(transformers, f"Llama{head}")(config), seed)


def build_llama_mha(seed: int = 0) -> Any:
    return build_llama(seed, num_key_value_heads=4)


BUILD: dict[str, Callable[..., Any]] = {
    "bert": build_bert,
    "vit": build_vit,
    "llama": build_llama,
    "llama_mha": build_llama_mha,
}


def units_of(model: Any, kinds: Any = INNER) -> dict[str, int]:
    """Return how many units each group of these kinds has; those inside branches where none are named."""
    return {group.name: group.units for group in find_groups(model, kinds=kinds)}


def draw_batch(model: Any, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Draw inputs and labels for a model; texts have different lengths, and what is padding has the label -100."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=draw)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 1, 16, 16, generator=draw), "labels": labels}
    ids = torch.randint(1, 60, (rows, 9), generator=draw)
    lengths = torch.randint(4, 10, (rows, 1), generator=draw)
    mask = (torch.arange(9) < lengths).long()
    if model.config.model_type == "llama":
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def draw_rows(model: Any, rows: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Draw a data set for a Trainer: one dict a row."""
    batch = draw_batch(model, rows, seed)
    return [{key: value[i] for key, value in batch.items()} for i in range(rows)]


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return logits in evaluation mode; a base model's last hidden state."""
    output = copy.deepcopy(model).eval()(**{key: value for key, value in batch.items() if key != "labels"})
    return output.logits if "logits" in output else output.last_hidden_state


def assert_same_outputs(first: Any, second: Any, atol: float = 1e-5) -> None:
    """Check that two models give the same outputs, and that they are not simply constant."""
    batch = draw_batch(first)
    expected = logits_of(first, batch)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits_of(second, batch), expected, atol=atol, rtol=0)


def assert_same_weights(first: Any, second: Any, atol: float = 0.0) -> None:
    """Check that two models have the same tensors under the same names, bitwise where `atol` is 0."""
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def take_step(loss: Tensor, optimizer: Any, pruning: Any, clip: float | None = None) -> bool:
    """Take one step of a loop of one's own; return whether masks changed."""
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(pruning.model.parameters(), clip)
    pruning.after_backward()
    optimizer.step()
    changed = pruning.step()
    optimizer.zero_grad()
    return bool(changed)


def training_arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    """Return arguments for a short, quiet, repeatable run on the CPU."""
    settings = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 0,
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **changes})
