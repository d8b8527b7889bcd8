"""Prune a model that finds names in sentences, while it is fine-tuned.

    python examples/token_classification.py --tiny         # offline, made-up data and a tiny random model: seconds
    python examples/token_classification.py --target_macs 0.3 --prune_frequency 20 --num_train_epochs 3
    torchrun --nproc_per_node 2 examples/token_classification.py --tiny

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
    AutoModelForTokenClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_prune import PruningArguments, save_pruned
from hf_prune.labels import fit_classes


@dataclass
class Script:
    """What to load."""

    model: str = field(default="distilbert/distilbert-base-cased", metadata={"help": "A name or a folder."})
    dataset: str = field(default="unimelb-nlp/wikiann", metadata={"help": "With columns tokens and ner_tags."})
    config: str = field(default="en", metadata={"help": "Configuration of the data set."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {"target_macs": 0.5, "learning_rate": 5e-5, "output_dir": "runs/token_classification", "report_to": "none"}
TINY = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "prune_frequency": 5}


def load_tiny() -> tuple[Any, Any, Any, Any]:
    """Make sentences of words that are one of three sorts each."""
    words = torch.randint(1, 60, (576, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row // 20} for row in words]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=16, num_labels=3, **sizes)
    return AutoModelForTokenClassification.from_config(config), rows[:512], rows[512:], None


def load_real(script: Script) -> tuple[Any, Any, Any, Any]:
    """Load a model (with a fresh head where it has not learned these tags), and words as tokens.

    The first token of each word has its label.
    """
    from datasets import load_dataset

    data, tokenizer = load_dataset(script.dataset, script.config), AutoTokenizer.from_pretrained(script.model)
    count = 1 + max(max(tags, default=0) for tags in data["train"]["ner_tags"])
    names = getattr(data["train"].features["ner_tags"].feature, "names", None) or count
    classes = fit_classes(AutoConfig.from_pretrained(script.model), names, head="ForTokenClassification", retrain=True)
    model = AutoModelForTokenClassification.from_pretrained(script.model, dtype=torch.float32, **classes.options)

    def encode(row: Any) -> Any:
        tokens = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=128)
        words = tokens.word_ids()
        first = [word is not None and word != before for word, before in zip(words, [None, *words])]
        tags = [classes.numbers[tag] for tag in row["ner_tags"]]
        return {**tokens, "labels": [tags[word] if new else -100 for word, new in zip(words, first)]}

    data = data.map(encode, remove_columns=data["train"].column_names)
    return model, data["train"], data["validation"], tokenizer


def accuracy(prediction: Any) -> dict[str, float]:
    counts = prediction.label_ids != -100
    return {"accuracy": float(np.mean((prediction.predictions.argmax(-1) == prediction.label_ids)[counts]))}


def main() -> None:
    parser = HfArgumentParser([Script, PruningArguments, TrainingArguments])
    parser.set_defaults(**{**DEFAULTS, **(TINY if "--tiny" in sys.argv else {})})
    script, pruning, arguments = parser.parse_args_into_dataclasses()
    transformers.set_seed(arguments.seed)
    model, train, validation, tokenizer = load_tiny() if script.tiny else load_real(script)
    collate = transformers.DataCollatorForTokenClassification(tokenizer) if tokenizer else None
    data = {"train_dataset": train, "eval_dataset": validation, "data_collator": collate}
    callback = pruning.callback()
    trainer = callback.attach(Trainer(model, arguments, compute_metrics=accuracy, **data))
    trainer.train()
    score = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        folder = save_pruned(trainer.model, Path(arguments.output_dir) / "final", tokenizer=tokenizer)
        print(f"{callback.report.table()}\naccuracy {score:.4f} pruned; saved to {folder}")


if __name__ == "__main__":
    main()
