"""Prune a model that finds the answer to a question in a text.

    python examples/question_answering.py --tiny          # offline, made-up data and a tiny random model: seconds
    python examples/question_answering.py --target_macs 0.3 --num_train_epochs 3
    torchrun --nproc_per_node 2 examples/question_answering.py --tiny

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
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_prune import PruningArguments, save_pruned


@dataclass
class Script:
    """What to load."""

    model: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "A name or a folder."})
    dataset: str = field(default="rajpurkar/squad", metadata={"help": "With columns question, context and answers."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {"target_macs": 0.5, "learning_rate": 5e-5, "output_dir": "runs/question_answering", "report_to": "none"}
TINY = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "prune_frequency": 5}


def load_tiny() -> tuple[Any, Any, Any, Any]:
    """Make texts in which word 1 begins the answer and word 2 ends it."""
    words = torch.randint(3, 60, (576, 12), generator=torch.Generator().manual_seed(0))
    places = torch.rand(576, 12, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :2].sort(1).values
    words.scatter_(1, places, torch.tensor([[1, 2]]).expand(576, 2))
    rows = [{"input_ids": row, "start_positions": a, "end_positions": b} for row, (a, b) in zip(words, places)]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=16, **sizes)
    return AutoModelForQuestionAnswering.from_config(config), rows[:512], rows[512:], None


def load_real(script: Script) -> tuple[Any, Any, Any, Any]:
    """Load a model, and questions with the tokens between which their answer lies (the first one where it is cut)."""
    from datasets import load_dataset

    data, tokenizer = load_dataset(script.dataset), AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForQuestionAnswering.from_pretrained(script.model, dtype=torch.float32)
    length = {"max_length": 384, "padding": "max_length", "truncation": "only_second"}

    def encode(row: Any) -> Any:
        tokens = tokenizer(row["question"], row["context"], **length)
        begin, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
        places = [tokens.char_to_token(at, sequence_index=1) or 0 for at in (begin, begin + len(text) - 1)]
        return {**tokens, "start_positions": places[0], "end_positions": places[1]}

    data = data.map(encode, remove_columns=data["train"].column_names)
    return model, data["train"], data["validation"], tokenizer


def exact(prediction: Any) -> dict[str, float]:
    """Return how often both ends are right."""
    right = [found.argmax(-1) == label for found, label in zip(prediction.predictions, prediction.label_ids)]
    return {"exact": float(np.mean(right[0] & right[1]))}


def main() -> None:
    parser = HfArgumentParser([Script, PruningArguments, TrainingArguments])
    parser.set_defaults(**{**DEFAULTS, **(TINY if "--tiny" in sys.argv else {})})
    script, pruning, arguments = parser.parse_args_into_dataclasses()
    transformers.set_seed(arguments.seed)
    model, train, validation, processor = load_tiny() if script.tiny else load_real(script)
    data = {"train_dataset": train, "eval_dataset": validation}
    callback = pruning.callback()
    trainer = callback.attach(Trainer(model, arguments, compute_metrics=exact, **data))
    trainer.train()
    score = trainer.evaluate()["eval_exact"]
    if trainer.is_world_process_zero():
        folder = save_pruned(trainer.model, Path(arguments.output_dir) / "final", tokenizer=processor)
        print(f"{callback.report.table()}\naccuracy {score:.4f} pruned; saved to {folder}")


if __name__ == "__main__":
    main()
