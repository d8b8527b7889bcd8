"""Zero single weights of a model that guesses how listeners rate songs, going on from masks that torch made.

    python examples/song_ratings.py            # less than a minute
    python examples/song_ratings.py --tiny     # seconds

A WeightPruner needs no declared groups: it takes every Linear, convolution and recurrent weight but the head's, and an
embedding where a pattern names it. Here half of the listeners' table was masked before by `torch.nn.utils.prune`: those
masks are taken over, stay, and count. Zeros make files smaller, not models faster. The ratings are made on the spot.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

from hf_prune import Pruning, Schedule, WeightPruner, adopt_torch_masks
from hf_prune.report import Report, measure_pair

LISTENERS, SONGS = 500, 250


class SongRatings(nn.Module):
    """A table of listeners and one of songs, and an MLP on what stands there: a rating from 1 to 5."""

    def __init__(self, size: int = 8, width: int = 128):
        super().__init__()
        self.listeners, self.songs = nn.Embedding(LISTENERS, size), nn.Embedding(SONGS, size)
        for table in (self.listeners, self.songs):
            nn.init.normal_(table.weight, std=0.1)  # torch's own 1.0 is slow to forget
        self.hidden1, self.hidden2 = nn.Linear(2 * size, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, listener: Tensor, song: Tensor) -> Tensor:
        """Return stars ``(batch,)`` for numbers of listeners and songs, ``(batch,)`` each."""
        both = torch.cat([self.listeners(listener), self.songs(song)], -1)
        hidden = self.hidden2(self.hidden1(both).relu()).relu()
        return 3 + self.head(hidden).squeeze(-1)


def make_ratings(seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Return listeners, songs and ratings ``(n,)`` to learn from, and others to be judged by."""
    draw = torch.Generator().manual_seed(seed)
    tempo, energy, mood = torch.randn(3, SONGS, generator=draw)
    likes = torch.randn(LISTENERS, 3, generator=draw)
    stars = (
        3 + likes @ torch.stack([tempo, energy, mood]) / 3**0.5 + 0.4 * torch.randn(LISTENERS, SONGS, generator=draw)
    )
    heard = torch.randperm(LISTENERS * SONGS, generator=draw)[: LISTENERS * SONGS // 4]
    rows = heard // SONGS, heard % SONGS, stars.flatten()[heard].round().clamp(1, 5)
    cut = len(heard) * 4 // 5
    return tuple(row[:cut] for row in rows), tuple(row[cut:] for row in rows)


def fit(model: nn.Module, data: tuple[Tensor, ...], epochs: int, sparsity: float = 0, masks=None) -> Report | None:
    """Train; with a sparsity, prune on the way, starting from masks that are there."""
    listeners, songs, ratings = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.3)
    steps = epochs * -(-len(ratings) // 256)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = WeightPruner(sparsity, score="l1", include=["hidden*.weight", "listeners.weight", "songs.weight"])
    schedule = Schedule(begin=0.05, end=0.6, frequency=20)
    pruning = sparsity and Pruning(model, pruner, schedule, total_steps=steps, optimizer=optimizer, masks=masks)
    for _ in range(epochs):
        for batch in torch.randperm(len(ratings)).split(256):
            functional.mse_loss(model(listeners[batch], songs[batch]), ratings[batch]).backward()
            if pruning:
                pruning.after_backward()
            optimizer.step()
            decay.step()
            if pruning:
                pruning.step()
            optimizer.zero_grad()
    return pruning.finish() if pruning else None


@torch.no_grad()
def rmse(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    """Return the root of the mean squared error, in stars."""
    return functional.mse_loss(model(data[0], data[1]), data[2]).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.6, help="share of the weights and tables that goes")
    parser.add_argument("--epochs", type=int, default=20, help="of dense training, and of pruning again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer epochs: seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = make_ratings(args.seed)
    model = SongRatings(width=32) if args.tiny else SongRatings()
    epochs = 4 if args.tiny else args.epochs

    fit(model, train, epochs)
    dense = copy.deepcopy(model)
    torch_prune.l1_unstructured(model.listeners, "weight", amount=0.5)  # as someone may have done before
    masks = adopt_torch_masks(model)
    report = fit(model, train, epochs, args.sparsity, masks)

    assert not model.listeners.weight[~masks["listeners.weight"]].any()  # what torch has masked has stayed so
    report.metrics = {"RMSE": {"dense": rmse(dense, test), "pruned": rmse(model, test)}}
    one = {"listener": test[0][:1].expand(SONGS), "song": torch.arange(SONGS)}  # every song, for one listener
    report.dense, report.pruned = measure_pair(dense, model, one)
    print(report.table())


if __name__ == "__main__":
    main()
