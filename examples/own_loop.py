"""Prune a causal language model in a training loop of your own, on accelerate.

    python examples/own_loop.py --tiny                     # offline, made-up data and a tiny random model: seconds
    python examples/own_loop.py --model HuggingFaceTB/SmolLM2-135M --config wikitext-2-raw-v1
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/own_loop.py --tiny

`--model` and `--dataset` take names on the Hub or local folders.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_scheduler

from hf_prune import HeadPruner, NeuronPruner, Pruning, Schedule, Target, save_pruned


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--dataset", default="Salesforce/wikitext")
    parser.add_argument("--config", default=None, help="configuration of the data set")
    parser.add_argument("--text", default="text", help="the column with the text")
    parser.add_argument("--macs", type=float, default=0.7, help="share of the layers' MACs that remains")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="rows per process and step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/own_loop"))
    parser.add_argument("--tiny", action="store_true", help="made-up data and a tiny random model, offline")
    return parser.parse_args()


def load_tiny() -> tuple[Any, list[torch.Tensor], None]:
    """Make texts that count up from a random number; the model has to learn what comes next."""
    starts = torch.randint(0, 60, (256, 1), generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    config = LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return AutoModelForCausalLM.from_config(config), [*((starts + torch.arange(12)) % 60)], None


def load_real(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor], Any]:
    """Load a model, and texts joined and cut into rows of equal length."""
    from datasets import load_dataset

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(args.model),
    )
    texts = load_dataset(args.dataset, args.config, split="train")[args.text]
    tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    return model, [*tokens[: len(tokens) // args.length * args.length].view(-1, args.length)], tokenizer


def main() -> None:
    args = parse()
    set_seed(0)
    model, rows, tokenizer = load_tiny() if args.tiny else load_real(args)
    if args.tiny:
        args.learning_rate, args.epochs = 1e-2, 4
    accelerator = Accelerator(cpu=args.tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(rows, args.batch, shuffle=True))
    total = args.epochs * len(batches)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=total)

    pruning = Pruning(
        model,
        [HeadPruner(), NeuronPruner()],  # heads are whole KV groups in this model
        Schedule("cubic", frequency=5),
        target=Target(args.macs),
        total_steps=total,
        optimizer=optimizer,
        accelerator=accelerator,
        shrink_during_training=True,  # what leaves takes no more time; under DDP too
    )
    model.train()
    for epoch in range(args.epochs):
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            pruning.after_backward()
            optimizer.step()
            scheduler.step()
            pruning.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: perplexity {math.exp(loss.item()):.2f}, {pruning.logs()}")
    report = pruning.finish()

    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / f"kept-{accelerator.process_index}.json"  # every process has decided the same
    kept.write_text(json.dumps(report.kept))
    if accelerator.is_main_process:
        save_pruned(pruning.model, args.output / "final", tokenizer=tokenizer)
        print(report.table())
        print(f"saved to {args.output / 'final'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
