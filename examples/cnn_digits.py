"""Prune the channels of a small CNN of your own on handwritten digits.

    python examples/cnn_digits.py            # less than a minute
    python examples/cnn_digits.py --tiny     # seconds

Of a model that is not from transformers, hf_prune has to be told one thing: which entries of which tensors belong to
one unit. A channel is a filter, its batch norm, and what reads it: one slice of the next convolution or, behind a
flattening, the columns of a whole feature map. From there on masks, scores, schedule and cutting are as for any model.
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from hf_prune import ChannelPruner, Group, NeuronPruner, Pruning, Schedule, Slice, Target, register_architecture
from hf_prune.report import Report, measure_pair


class DigitCnn(nn.Module):
    """Two convolutions with batch norms, a hidden layer and a head, for square images of one colour."""

    def __init__(self, side: int = 8, width: int = 32, hidden: int = 128):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.hidden = nn.Linear(2 * width * (side // 4) ** 2, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, 10)`` of images ``(batch, 1, side, side)``."""
        maps = functional.max_pool2d(self.norm1(self.conv1(images)).relu(), 2)
        maps = functional.max_pool2d(self.norm2(self.conv2(maps)).relu(), 2)
        return self.head(self.hidden(maps.flatten(1)).relu())


@register_architecture("DigitCnn")
def groups_of_digit_cnn(model: DigitCnn) -> list[Group]:
    """Say what a unit owns; the last slice is where it is read, and where its Taylor score is measured."""

    def filters(number: int) -> list[Slice]:
        names = [f"conv{number}.weight", f"conv{number}.bias"]
        names += [f"norm{number}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        return [Slice(name, dim=0, per_unit=1) for name in names]

    first, second, hidden = model.conv1.out_channels, model.conv2.out_channels, model.hidden.out_features
    pixels = model.hidden.in_features // second  # of one feature map when it is flattened
    rows = [Slice("hidden.weight", 0, 1), Slice("hidden.bias", 0, 1)]
    return [
        Group("conv1.channels", "channel", first, (*filters(1), Slice("conv2.weight", 1, 1))),
        Group("conv2.channels", "channel", second, (*filters(2), Slice("hidden.weight", 1, pixels))),
        Group("hidden.neurons", "neuron", hidden, (*rows, Slice("head.weight", 1, 1))),
    ]


def fit(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, pruners=(), macs: float = 1.0, rate=2e-3
) -> Report | None:
    """Train; with pruners, prune on the way down to a share of the weights in the matrices that they cut."""
    inputs, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * -(-len(inputs) // 64)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule, target = Schedule(begin=0.05, end=0.6, frequency=10), Target(macs)
    pruning = pruners and Pruning(
        model, pruners, schedule, target=target, total_steps=steps, optimizer=optimizer, shrink_during_training=True
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(64):
            functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            if pruning:
                pruning.after_backward()
            optimizer.step()
            decay.step()
            if pruning:
                pruning.step()
            optimizer.zero_grad()
    return pruning.finish() if pruning else None


def score(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return accuracy, and recall and F1 as means over the ten digits."""
    inputs, labels = data
    with torch.no_grad():
        found = torch.cat([model.eval()(part).argmax(1) for part in inputs.split(1000)])
    return {
        "accuracy": accuracy_score(labels, found),
        "recall": recall_score(labels, found, average="macro"),
        "F1": f1_score(labels, found, average="macro"),
    }


def load(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1347 digits to learn from and 450 to be judged by, as images of 8 x 8 in [0, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    split = train_test_split(images, torch.tensor(digits.target), stratify=digits.target, random_state=seed)
    return (split[0], split[2]), (split[1], split[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.4, help="share of the matrices that remains")
    parser.add_argument("--epochs", type=int, default=20, help="of dense training, and of pruning again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer epochs: seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = load(args.seed)
    model = DigitCnn(width=8, hidden=32) if args.tiny else DigitCnn()
    epochs = 4 if args.tiny else args.epochs

    fit(model, train, epochs)
    dense = copy.deepcopy(model)
    report = fit(model, train, epochs, [ChannelPruner(), NeuronPruner()], args.macs)

    before, after = score(dense, test), score(model, test)
    report.metrics = {name: {"dense": before[name], "pruned": after[name]} for name in before}
    report.dense, report.pruned = measure_pair(dense, model, {"images": test[0][:1]})
    print(report.table())


if __name__ == "__main__":
    main()
