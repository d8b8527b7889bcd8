"""Prune a vision transformer while it learns to tell pictures apart.

    python examples/image_classification.py --tiny        # offline, made-up data and a tiny random model: seconds
    python examples/image_classification.py --target_macs 0.4 --prune heads neurons branches
    torchrun --nproc_per_node 2 examples/image_classification.py --tiny

`--model` and `--dataset` take names on the Hub or local folders.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_prune import PruningArguments, save_pruned
from hf_prune.labels import fit_classes


@dataclass
class Script:
    """What to load."""

    model: str = field(default="google/vit-base-patch16-224-in21k", metadata={"help": "A name or a folder."})
    dataset: str = field(default="ethz/food101", metadata={"help": "With columns image and label."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {
    "target_macs": 0.5,
    "learning_rate": 5e-5,
    "output_dir": "runs/image_classification",
    "report_to": "none",
    "remove_unused_columns": False,
}
TINY = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "prune_frequency": 5}


def load_tiny() -> tuple[Any, Any, Any, Any]:
    """Make noisy pictures with one bright quarter; the class is which."""
    draw = torch.Generator().manual_seed(0)
    labels, pictures = torch.randint(4, (576,), generator=draw), torch.randn(576, 1, 16, 16, generator=draw)
    for picture, label in zip(pictures, labels.tolist()):
        picture[0, 8 * (label // 2) :, 8 * (label % 2) :][:8, :8] += 2
    rows = [{"pixel_values": picture, "labels": label} for picture, label in zip(pictures, labels)]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=4, **sizes)
    return AutoModelForImageClassification.from_config(config), rows[:512], rows[512:], None


def load_real(script: Script) -> tuple[Any, Any, Any, Any]:
    """Load a model (with a fresh head where it has not learned these classes), and pictures."""
    from datasets import load_dataset

    data, processor = load_dataset(script.dataset), AutoImageProcessor.from_pretrained(script.model)
    names = getattr(data["train"].features["label"], "names", None) or len(set(data["train"]["label"]))
    classes = fit_classes(AutoConfig.from_pretrained(script.model), names, head="ForImageClassification", retrain=True)
    model = AutoModelForImageClassification.from_pretrained(script.model, dtype=torch.float32, **classes.options)

    def prepare(batch: Any) -> Any:
        pictures = [picture.convert("RGB") for picture in batch["image"]]
        return {
            **processor(pictures, return_tensors="pt"),
            "labels": [classes.numbers[label] for label in batch["label"]],
        }

    data = data.with_transform(prepare)
    return model, data["train"], data["validation"], processor


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    parser = HfArgumentParser([Script, PruningArguments, TrainingArguments])
    parser.set_defaults(**{**DEFAULTS, **(TINY if "--tiny" in sys.argv else {})})
    script, pruning, arguments = parser.parse_args_into_dataclasses()
    transformers.set_seed(arguments.seed)
    model, train, validation, processor = load_tiny() if script.tiny else load_real(script)
    data = {"train_dataset": train, "eval_dataset": validation}
    callback = pruning.callback()
    trainer = callback.attach(Trainer(model, arguments, compute_metrics=accuracy, **data))
    trainer.train()
    score = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        folder = save_pruned(trainer.model, Path(arguments.output_dir) / "final", tokenizer=processor)
        print(f"{callback.report.table()}\naccuracy {score:.4f} pruned; saved to {folder}")


if __name__ == "__main__":
    main()
