"""Fine-tune a text classifier, then prune it with the Trainer while it learns from its dense self.

    python examples/text_classification.py --tiny          # offline, made-up data and a tiny random model: seconds
    python examples/text_classification.py --model sentence-transformers/all-MiniLM-L6-v2 --dataset stanfordnlp/sst2
    torchrun --nproc_per_node 2 examples/text_classification.py --tiny

`--model` and `--dataset` take names on the Hub or local folders.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_prune import DistillationTrainer, HeadPruner, NeuronPruner, PruningCallback, Schedule, Target, save_pruned
from hf_prune.labels import fit_classes

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--dataset", default="stanfordnlp/sst2")
    parser.add_argument("--text", default="sentence", help="the column with the text")
    parser.add_argument("--label", default="label", help="the column with the class")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the encoder's MACs that remains")
    parser.add_argument("--dense-epochs", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=32, help="rows per process and step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--output", type=Path, default=Path("runs/text_classification"))
    parser.add_argument("--tiny", action="store_true", help="made-up data and a tiny random model, offline")
    return parser.parse_args()


def load_tiny() -> tuple[Any, Any, Any, None]:
    """Make sentences of ten words out of 59; the class is whether the first word is one of the first 29."""
    words = torch.randint(1, 60, (640, 10), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": int(row[0] < 30)} for row in words]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=60, max_position_embeddings=16, **sizes, **NO_DROPOUT)
    return AutoModelForSequenceClassification.from_config(config), rows[:512], rows[512:], None


def load_real(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Load a model (with a fresh head where it has not learned these classes), and a data set as tokens."""
    from datasets import load_dataset

    data, tokenizer = load_dataset(args.dataset), AutoTokenizer.from_pretrained(args.model)
    if "string" in data["train"].features[args.label].dtype:
        data = data.class_encode_column(args.label)
    names = getattr(data["train"].features[args.label], "names", None) or len(set(data["train"][args.label]))
    classes = fit_classes(AutoConfig.from_pretrained(args.model), names, head="ForSequenceClassification", retrain=True)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32, **classes.options)

    def encode(batch: Any) -> Any:
        tokens = tokenizer(batch[args.text], truncation=True, max_length=128)
        return {**tokens, "labels": [classes.numbers[label] for label in batch[args.label]]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    return model, data["train"], data["validation"], tokenizer


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    args = parse()
    set_seed(0)
    model, train, validation, tokenizer = load_tiny() if args.tiny else load_real(args)
    if args.tiny:
        args.learning_rate, args.dense_epochs, args.epochs = 3e-3, 6.0, 3.0

    def arguments(epochs: float) -> TrainingArguments:
        return TrainingArguments(
            str(args.output),
            num_train_epochs=epochs,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            weight_decay=0.01,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
        )

    common = {
        "train_dataset": train,
        "eval_dataset": validation,
        "compute_metrics": accuracy,
        "data_collator": DataCollatorWithPadding(tokenizer) if tokenizer else None,
    }
    dense = Trainer(model, arguments(args.dense_epochs), **common)
    dense.train()
    before = dense.evaluate()["eval_accuracy"]

    pruning = PruningCallback(
        [HeadPruner(), NeuronPruner()],
        Schedule("cubic", frequency=5),
        target=Target(args.macs),
        shrink_during_training=True,  # what leaves takes no more time; in several processes too
    )
    trainer = pruning.attach(DistillationTrainer(model, arguments(args.epochs), teacher="self", **common))
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / f"kept-{trainer.args.process_index}.json"  # every process has decided the same
    kept.write_text(json.dumps(pruning.report.kept))
    if trainer.is_world_process_zero():
        save_pruned(trainer.model, args.output / "final", tokenizer=tokenizer)
        print(pruning.report.table())
        print(f"accuracy {before:.4f} dense, {after:.4f} pruned; saved to {args.output / 'final'}")


if __name__ == "__main__":
    main()
