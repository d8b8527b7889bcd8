"""Prune a model that hears which of several commands was spoken.

    python examples/audio_classification.py --tiny        # offline, made-up data and a tiny random model: seconds
    python examples/audio_classification.py --target_macs 0.4 --num_train_epochs 10
    torchrun --nproc_per_node 2 examples/audio_classification.py --tiny

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
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_prune import PruningArguments, save_pruned
from hf_prune.labels import fit_classes


@dataclass
class Script:
    """What to load."""

    model: str = field(default="facebook/wav2vec2-base", metadata={"help": "A name or a folder."})
    dataset: str = field(default="PolyAI/minds14", metadata={"help": "With columns audio and intent_class."})
    config: str = field(default="en-US", metadata={"help": "Configuration of the data set."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {"target_macs": 0.5, "learning_rate": 5e-5, "output_dir": "runs/audio_classification", "report_to": "none"}
TINY = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "prune_frequency": 5}


def load_tiny() -> tuple[Any, Any, Any, Any]:
    """Make noisy tones of two pitches."""
    draw = torch.Generator().manual_seed(0)
    labels, time = torch.randint(2, (576, 1), generator=draw), torch.arange(160)
    sounds = torch.sin(time * (0.3 + 0.9 * labels)) + 0.3 * torch.randn(576, 160, generator=draw)
    rows = [{"input_values": sound, "labels": label} for sound, label in zip(sounds, labels[:, 0])]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ears = {"conv_dim": (16, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    still = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    config = transformers.Wav2Vec2Config(num_labels=2, classifier_proj_size=32, **sizes, **ears, **still)
    return AutoModelForAudioClassification.from_config(config), rows[:512], rows[512:], None


def load_real(script: Script) -> tuple[Any, Any, Any, Any]:
    """Load a model (with a fresh head where it has not learned these classes), and a second of every recording."""
    from datasets import Audio, load_dataset

    processor = AutoFeatureExtractor.from_pretrained(script.model)
    data = load_dataset(script.dataset, script.config, split="train")
    data = data.cast_column("audio", Audio(processor.sampling_rate)).train_test_split(0.1, seed=0)
    names = getattr(data["train"].features["intent_class"], "names", None) or len(set(data["train"]["intent_class"]))
    classes = fit_classes(AutoConfig.from_pretrained(script.model), names, head="ForAudioClassification", retrain=True)
    model = AutoModelForAudioClassification.from_pretrained(script.model, dtype=torch.float32, **classes.options)
    length = {"max_length": processor.sampling_rate, "padding": "max_length", "truncation": True}

    def prepare(batch: Any) -> Any:
        sounds = [sound["array"] for sound in batch["audio"]]
        found = processor(sounds, sampling_rate=processor.sampling_rate, **length)
        return {
            "input_values": found["input_values"],
            "labels": [classes.numbers[label] for label in batch["intent_class"]],
        }

    data = data.map(prepare, batched=True, batch_size=32, remove_columns=data["train"].column_names)
    return model, data["train"], data["test"], processor


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
