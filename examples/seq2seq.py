"""Prune an encoder-decoder model that writes summaries; both towers lose heads and neurons.

    python examples/seq2seq.py --tiny                       # offline, made-up data and a tiny random model: seconds
    python examples/seq2seq.py --target_macs 0.6 --num_train_epochs 3
    torchrun --nproc_per_node 2 examples/seq2seq.py --tiny

`--model` and `--dataset` take names on the Hub or local folders.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_prune import PruningArguments, save_pruned


@dataclass
class Script:
    """What to load."""

    model: str = field(default="google-t5/t5-small", metadata={"help": "A name or a folder."})
    dataset: str = field(default="knkarthick/samsum", metadata={"help": "With columns dialogue and summary."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {"target_macs": 0.5, "learning_rate": 3e-4, "output_dir": "runs/seq2seq", "report_to": "none"}
TINY = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "prune_frequency": 5}


def load_tiny() -> tuple[Any, Any, Any, Any]:
    """Make texts of one repeated number; the model has to count on from it."""
    starts = torch.randint(2, 20, (576, 1), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": start.expand(6), "labels": start + torch.arange(1, 5)} for start in starts]
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "vocab_size": 30}
    config = transformers.T5Config(dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return AutoModelForSeq2SeqLM.from_config(config), rows[:512], rows[512:], None


def load_real(script: Script) -> tuple[Any, Any, Any, Any]:
    """Load a model, and texts with their summaries as tokens."""
    from datasets import load_dataset

    data, tokenizer = load_dataset(script.dataset), AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(script.model, dtype=torch.float32)

    def encode(batch: Any) -> Any:
        texts = [f"summarize: {text}" for text in batch["dialogue"]]
        return tokenizer(texts, text_target=batch["summary"], truncation=True, max_length=512)

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    return model, data["train"], data["validation"], tokenizer


def main() -> None:
    parser = HfArgumentParser([Script, PruningArguments, Seq2SeqTrainingArguments])
    parser.set_defaults(**{**DEFAULTS, **(TINY if "--tiny" in sys.argv else {})})
    script, pruning, arguments = parser.parse_args_into_dataclasses()
    transformers.set_seed(arguments.seed)
    model, train, validation, processor = load_tiny() if script.tiny else load_real(script)
    collate = transformers.DataCollatorForSeq2Seq(processor, model) if processor else None
    data = {"train_dataset": train, "eval_dataset": validation, "data_collator": collate}
    callback = pruning.callback()
    trainer = callback.attach(Seq2SeqTrainer(model, arguments, **data))
    trainer.train()
    score = math.exp(trainer.evaluate()["eval_loss"])
    if trainer.is_world_process_zero():
        folder = save_pruned(trainer.model, Path(arguments.output_dir) / "final", tokenizer=processor)
        print(f"{callback.report.table()}\nperplexity {score:.4f} pruned; saved to {folder}")


if __name__ == "__main__":
    main()
