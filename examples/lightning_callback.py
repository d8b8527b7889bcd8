"""Prune in Lightning: a callback of thirty lines, whose state is a part of Lightning's checkpoints.

    pip install lightning
    python examples/lightning_callback.py --tiny          # offline, made-up data and a tiny random model: seconds
    python examples/lightning_callback.py --model google-bert/bert-base-uncased --dataset stanfordnlp/sst2

`--model` and `--dataset` take names on the Hub or local folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, DataCollatorWithPadding

from hf_prune import HeadPruner, NeuronPruner, Pruning, Schedule, Target, save_pruned


class Classifier(LightningModule):
    """A transformers model, as Lightning trains it."""

    def __init__(self, model: Any, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return what trains the model."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class PruningOfLightning(Callback):
    """Prunes the `model` of a module while it trains; a run that goes on from a checkpoint prunes on."""

    def __init__(self, pruners: Any, schedule: Schedule, target: Target | None = None) -> None:
        self.told, self.saved, self.pruning, self.report = (pruners, schedule, target), None, None, None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin to prune, or go on."""
        pruners, schedule, target = self.told
        steps = int(trainer.estimated_stepping_batches)
        self.pruning = Pruning(
            module.model, pruners, schedule, target=target, total_steps=steps, optimizer=trainer.optimizers[0]
        )
        if self.saved is not None:
            self.pruning.load_state_dict(self.saved)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Read gradients: they are complete."""
        self.pruning.after_backward()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Count the optimizer's steps; not while gradients accumulate."""
        if trainer.global_step > self.pruning.steps:
            self.pruning.step()
            module.log_dict(self.pruning.logs())

    def on_train_end(self, *_: Any) -> None:
        """Remove the units."""
        self.report = self.pruning.finish()

    def on_exception(self, *_: Any) -> None:
        """Leave no hooks behind."""
        if self.pruning is not None:
            self.pruning.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {} if self.pruning is None else self.pruning.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self.saved = state


def load_tiny() -> tuple[Any, DataLoader, None]:
    """Make sentences of numbers; the label says whether a certain one is among them."""
    ids = torch.randint(2, 60, (256, 12), generator=torch.Generator().manual_seed(0))
    ids[::2, 3] = 1
    rows = [{"input_ids": row, "labels": torch.tensor(number % 2)} for number, row in enumerate(ids)]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=60, **sizes))
    return model, DataLoader(rows, batch_size=16, shuffle=True), None


def load_real(args: argparse.Namespace) -> tuple[Any, DataLoader, Any]:
    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32)
    rows = load_dataset(args.dataset, split="train")
    tokens = rows.map(lambda batch: tokenizer(batch[args.text], truncation=True, max_length=128), batched=True)
    kept = tokens.select_columns([*tokenizer.model_input_names, "label"])
    return model, DataLoader(kept, 32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--dataset", default="stanfordnlp/sst2")
    parser.add_argument("--text", default="sentence", help="the column with the text")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the layers' MACs that remains")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--tiny", action="store_true", help="made-up data and a tiny random model, offline")
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    model, batches, tokenizer = load_tiny() if args.tiny else load_real(args)
    if args.tiny:
        args.learning_rate, args.epochs = 3e-3, 8
    callback = PruningOfLightning([HeadPruner(), NeuronPruner()], Schedule(frequency=5), Target(macs=args.macs))
    accelerator = {"accelerator": "cpu"} if args.tiny else {}
    trainer = Trainer(
        max_epochs=args.epochs, callbacks=[callback], default_root_dir=args.output, gradient_clip_val=1.0, **accelerator
    )
    trainer.fit(Classifier(model, args.learning_rate), batches)
    print(callback.report.table())
    save_pruned(callback.pruning.model, args.output / "final", tokenizer=tokenizer)
    print(f"saved to {args.output / 'final'}")


if __name__ == "__main__":
    main()
