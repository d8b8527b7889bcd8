"""Prune a causal language model whose parameters are sharded by FSDP2, in a training loop of your own.

    torchrun --nproc_per_node 2 examples/fsdp2.py --tiny   # offline, made-up data and a tiny random model: seconds
    torchrun --nproc_per_node 8 examples/fsdp2.py --model HuggingFaceTB/SmolLM2-1.7B --config wikitext-2-raw-v1
    python examples/fsdp2.py --tiny                        # one process, which holds all shards

`--model` and `--dataset` take names on the Hub or local folders. examples/launch has lines for several machines.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

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
    parser.add_argument("--output", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--tiny", action="store_true", help="made-up data and a tiny random model, offline")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor], Any]:
    """Load a model, and rows of tokens of equal length."""
    if args.tiny:  # texts that count up from a random number
        starts = torch.randint(0, 60, (128, 1), generator=torch.Generator().manual_seed(0))
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 32}
        config = LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)
        return AutoModelForCausalLM.from_config(config), [*((starts + torch.arange(12)) % 60)], None
    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_dataset(args.dataset, args.config, split="train")[args.text]
    tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), [*rows], tokenizer


def start() -> torch.device:
    """Join the other processes; without a launcher there are none."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl")
    return torch.device("cuda", torch.cuda.current_device())


def shard(model: Any, device: torch.device) -> None:
    """Shard each layer, and then what is around them."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if device.type == "cuda" else None)
    for layer in model.base_model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def main() -> None:
    args, device = parse(), start()
    torch.manual_seed(0)  # the same model in every process
    model, rows, tokenizer = load(args)
    if args.tiny:
        args.learning_rate, args.epochs = 1e-2, 3
    shard(model.to(device), device)
    batches = DataLoader(rows, args.batch, sampler=(sampler := DistributedSampler(rows)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    total = args.epochs * len(batches)
    pruners = [HeadPruner(), NeuronPruner()]  # heads are whole KV groups in this model
    schedule = Schedule("cubic", frequency=5)
    pruning = Pruning(model, pruners, schedule, target=Target(args.macs), total_steps=total, optimizer=optimizer)
    first = torch.distributed.get_rank() == 0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss = model(input_ids=batch.to(device), labels=batch.to(device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            pruning.after_backward()
            optimizer.step()
            pruning.step()
            optimizer.zero_grad()
        if first:
            print(f"epoch {epoch + 1}: loss {loss.item():.2f}, {pruning.logs()}")
    report = pruning.finish()  # gathers: pruning.model is now whole, shrunk and on the CPU of every process

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"kept-{torch.distributed.get_rank()}.json").write_text(json.dumps(report.kept))
    if first:
        save_pruned(pruning.model, args.output / "final", tokenizer=tokenizer)
        print(report.table())
        print(f"saved to {args.output / 'final'}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
