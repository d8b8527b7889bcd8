"""Prune a causal language model, its KV groups and neurons, while it goes on learning.

    python examples/causal_lm.py --tiny                   # offline, made-up data and a tiny random model: seconds
    python examples/causal_lm.py --target_macs 0.7 --prune_frequency 20
    torchrun --nproc_per_node 2 examples/causal_lm.py --tiny

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
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_prune import PruningArguments, save_pruned


@dataclass
class Script:
    """What to load."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A name or a folder."})
    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "With a column text."})
    config: str = field(default="wikitext-2-raw-v1", metadata={"help": "Configuration of the data set."})
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {"target_macs": 0.7, "learning_rate": 1e-4, "output_dir": "runs/causal_lm", "report_to": "none"}
TINY = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "prune_frequency": 5}


def load_tiny() -> tuple[Any, Any, Any, Any]:
    """Make texts that count up from a random number; the model has to learn what comes next."""
    starts = torch.randint(0, 60, (576, 1), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(12)) % 60]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return AutoModelForCausalLM.from_config(config), rows[:512], rows[512:], None


def load_real(script: Script) -> tuple[Any, Any, Any, Any]:
    """Load a model, and texts joined and cut into rows of equal length."""
    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype=torch.float32)
    data = load_dataset(script.dataset, script.config)

    def join(batch: Any) -> Any:
        tokens = [token for text in batch["text"] for token in tokenizer(text)["input_ids"]]
        rows = [tokens[at : at + script.length] for at in range(0, len(tokens) - script.length + 1, script.length)]
        return {"input_ids": rows, "labels": rows}

    data = data.map(join, batched=True, remove_columns=data["train"].column_names)
    return model, data["train"], data["validation"], tokenizer


def main() -> None:
    parser = HfArgumentParser([Script, PruningArguments, TrainingArguments])
    parser.set_defaults(**{**DEFAULTS, **(TINY if "--tiny" in sys.argv else {})})
    script, pruning, arguments = parser.parse_args_into_dataclasses()
    transformers.set_seed(arguments.seed)
    model, train, validation, processor = load_tiny() if script.tiny else load_real(script)
    data = {"train_dataset": train, "eval_dataset": validation}
    callback = pruning.callback()
    trainer = callback.attach(Trainer(model, arguments, **data))
    trainer.train()
    score = math.exp(trainer.evaluate()["eval_loss"])
    if trainer.is_world_process_zero():
        folder = save_pruned(trainer.model, Path(arguments.output_dir) / "final", tokenizer=processor)
        print(f"{callback.report.table()}\nperplexity {score:.4f} pruned; saved to {folder}")


if __name__ == "__main__":
    main()
