"""Prune the hidden units of an LSTM that reads handwritten digits row by row.

    python examples/lstm_digits.py            # a minute
    python examples/lstm_digits.py --tiny     # seconds

One hidden unit of an LSTM is four rows, one for each gate (input, forget, cell, output): torch stacks the gates, so
gate k's rows start at k * hidden. What reads the unit is the LSTM itself, in the next step of time, and the head.
Weights of zero keep a unit at zero for ever (tanh(0) = 0), so that masked and removed are the same function.
"""

from __future__ import annotations

import argparse
import copy

import torch
from cnn_digits import fit, load, score  # the same digits, loop and figures
from torch import Tensor, nn

from hf_prune import Group, NeuronPruner, Slice, register_architecture
from hf_prune.report import measure_pair


class DigitLstm(nn.Module):
    """An LSTM over the rows of an image, and a head on its last state."""

    def __init__(self, side: int = 8, hidden: int = 96):
        super().__init__()
        self.lstm = nn.LSTM(side, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, 10)`` of images ``(batch, 1, side, side)``."""
        states, _ = self.lstm(images.squeeze(1))
        return self.head(states[:, -1])


@register_architecture("DigitLstm")
def groups_of_digit_lstm(model: DigitLstm) -> list[Group]:
    """Say what a hidden unit owns; the head, which reads it last, measures its Taylor score."""
    hidden = model.lstm.hidden_size
    stacked = [f"lstm.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    gates = [Slice(name, dim=0, per_unit=1, offset=gate * hidden) for name in stacked for gate in range(4)]
    readers = (Slice("lstm.weight_hh_l0", 1, 1), Slice("head.weight", 1, 1))
    return [Group("lstm.neurons", "neuron", hidden, (*gates, *readers))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.3, help="share of the matrices that remains")
    parser.add_argument("--epochs", type=int, default=40, help="of dense training, and of pruning again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer epochs: seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = load(args.seed)
    model = DigitLstm(hidden=32) if args.tiny else DigitLstm()
    epochs = 10 if args.tiny else args.epochs

    fit(model, train, epochs, rate=5e-3)
    dense = copy.deepcopy(model)
    report = fit(model, train, epochs, [NeuronPruner()], args.macs, rate=5e-3)

    before, after = score(dense, test), score(model, test)
    report.metrics = {name: {"dense": before[name], "pruned": after[name]} for name in before}
    report.dense, report.pruned = measure_pair(dense, model, {"images": test[0][:1]})
    print(report.table())


if __name__ == "__main__":
    main()
