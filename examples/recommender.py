"""Prune the hidden neurons of a recommender: an MLP that says how much a customer will like an article.

    python examples/recommender.py            # less than a minute
    python examples/recommender.py --tiny     # seconds

The data are made on the spot: what customers and articles are like, and likings that follow from how the two fit. The
MLP is a plain `nn.Sequential` inside a module, and its neurons are declared in three lines: what a layer computes (a
row and a bias) and where the next one reads it (a column). The error is the root of the mean squared error.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_prune import Group, NeuronPruner, Pruning, Schedule, Slice, Target, register_architecture
from hf_prune.report import Report, measure_pair

FEATURES = 12  # of a customer, and of an article


class Recommender(nn.Module):
    """An MLP from what is known of customer and article to one number."""

    def __init__(self, width: int = 256):
        super().__init__()
        layers = [nn.Linear(2 * FEATURES, width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width // 2, 1))

    def forward(self, pairs: Tensor) -> Tensor:
        """Return likings ``(batch,)`` of pairs ``(batch, 2 * FEATURES)``."""
        return self.layers(pairs).squeeze(-1)


@register_architecture("Recommender")
def groups_of_recommender(model: Recommender) -> list[Group]:
    """Say what a neuron of each hidden layer owns."""

    def neurons(this: str, reader: str) -> Group:
        slices = Slice(f"{this}.weight", 0, 1), Slice(f"{this}.bias", 0, 1), Slice(f"{reader}.weight", 1, 1)
        return Group(f"{this}.neurons", "neuron", model.get_submodule(this).out_features, slices)

    return [neurons("layers.0", "layers.2"), neurons("layers.2", "layers.4")]


def make_data(seed: int, customers: int = 400, articles: int = 200) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return pairs ``(n, 2 * FEATURES)`` with likings ``(n,)`` to learn from, and others to be judged by."""
    draw = torch.Generator().manual_seed(seed)
    customer, article = (torch.randn(count, FEATURES, generator=draw) for count in (customers, articles))
    taste = torch.randn(FEATURES, 4, generator=draw) / FEATURES**0.5
    fits = (customer @ taste).tanh() @ (article @ taste).tanh().T  # close tastes match
    likings = fits + 0.3 * torch.randn(customers, articles, generator=draw)
    chosen = torch.randperm(customers * articles, generator=draw)[: customers * articles // 4]  # few pairs are known
    pairs = torch.cat([customer[chosen // articles], article[chosen % articles]], 1)
    cut = len(chosen) * 4 // 5
    return (pairs[:cut], likings.flatten()[chosen[:cut]]), (pairs[cut:], likings.flatten()[chosen[cut:]])


def fit(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, macs: float | None = None) -> Report | None:
    """Train; with `macs`, prune on the way down to that share of the multiply-accumulates."""
    pairs, likings = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    steps = epochs * -(-len(pairs) // 128)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = Schedule(begin=0.05, end=0.6, frequency=20)
    pruning = macs and Pruning(
        model, NeuronPruner(), schedule, target=Target(macs), total_steps=steps, optimizer=optimizer
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(pairs)).split(128):
            functional.mse_loss(model(pairs[batch]), likings[batch]).backward()
            if pruning:
                pruning.after_backward()
            optimizer.step()
            decay.step()
            if pruning:
                pruning.step()
            optimizer.zero_grad()
    return pruning.finish() if pruning else None


@torch.no_grad()
def rmse(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the root of the mean squared error."""
    return functional.mse_loss(model(data[0]), data[1]).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.35, help="share of the multiply-accumulates that remains")
    parser.add_argument("--epochs", type=int, default=20, help="of dense training, and of pruning again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer epochs: seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = make_data(args.seed)
    model = Recommender(width=64) if args.tiny else Recommender()
    epochs = 4 if args.tiny else args.epochs

    fit(model, train, epochs)
    dense = copy.deepcopy(model)
    report = fit(model, train, epochs, args.macs)

    report.metrics = {"RMSE": {"dense": rmse(dense, test), "pruned": rmse(model, test)}}
    report.dense, report.pruned = measure_pair(dense, model, {"pairs": test[0][:200]})  # all articles, one customer
    print(report.table())


if __name__ == "__main__":
    main()
