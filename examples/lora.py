"""Fine-tune a pruned language model with LoRA, merge the adapters and keep it as small, and every zero a zero.

    python examples/lora.py --tiny                         # offline, made-up data and a tiny random model: seconds
    python examples/lora.py --model runs/causal_lm/final --dataset Salesforce/wikitext
    torchrun --nproc_per_node 2 examples/lora.py --tiny

`--model` takes a pruned folder or its name on the Hub, `--dataset` a name or a local folder.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_prune import HeadPruner, NeuronPruner, Target, load_pruned, merge_adapters, prune, save_pruned


@dataclass
class Script:
    """What to load."""

    model: str = field(default="runs/causal_lm/final", metadata={"help": "A pruned folder, or its name on the Hub."})
    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "With a column text."})
    config: str = field(default="wikitext-2-raw-v1", metadata={"help": "Configuration of the data set."})
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    rank: int = field(default=8, metadata={"help": "Of the adapters."})
    tiny: bool = field(default=False, metadata={"help": "Made-up data and a tiny random model, offline."})


DEFAULTS = {"learning_rate": 2e-4, "output_dir": "runs/lora", "report_to": "none"}
TINY = {"use_cpu": True, "learning_rate": 2e-2, "per_device_train_batch_size": 32}


def load_tiny() -> tuple[Any, Any, None]:
    """Make a small model of a random one, and texts that count up from a random number."""
    starts = torch.randint(0, 60, (512, 1), generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    prune(model, [HeadPruner(score="l1"), NeuronPruner(score="l1")], target=Target(macs=0.5))
    return model, [{"input_ids": row, "labels": row} for row in (starts + torch.arange(12)) % 60], None


def load_real(script: Script) -> tuple[Any, Any, Any]:
    """Load a pruned model, and texts joined and cut into rows of equal length."""
    from datasets import load_dataset

    model, tokenizer = load_pruned(script.model, dtype=torch.float32), AutoTokenizer.from_pretrained(script.model)
    texts = load_dataset(script.dataset, script.config, split="train")["text"]
    tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = tokens[: len(tokens) // script.length * script.length].view(-1, script.length)
    return model, [{"input_ids": row, "labels": row} for row in rows], tokenizer


def main() -> None:
    parser = HfArgumentParser([Script, TrainingArguments])
    parser.set_defaults(**{**DEFAULTS, **(TINY if "--tiny" in sys.argv else {})})
    script, arguments = parser.parse_args_into_dataclasses()
    transformers.set_seed(arguments.seed)
    model, rows, tokenizer = load_tiny() if script.tiny else load_real(script)
    adapters = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=script.rank)
    trainer = Trainer(get_peft_model(model, adapters), arguments, train_dataset=rows, eval_dataset=rows[:64])
    before = math.exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = math.exp(trainer.evaluate()["eval_loss"])
    if trainer.is_world_process_zero():
        folder = save_pruned(merge_adapters(trainer.model), Path(arguments.output_dir) / "final", tokenizer=tokenizer)
        print(f"perplexity {before:.4f} before, {after:.4f} after; saved to {folder}")


if __name__ == "__main__":
    main()
