"""Which widths lose least in a given time: a knapsack, exactly (but for the grid of times), by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TICKS = 4096  # what the time is divided into


@dataclass(frozen=True)
class Option:
    """One width of one group.

    Args:
        loss: What is lost by it: the scores of the units that leave.
        time: What is left of the group's time.
    """

    loss: float
    time: float


def choose_widths(groups: Sequence[Sequence[Option]], time: float) -> list[int]:
    """Choose one option of each group, so that all together take at most this time and lose least.

    ZipLM (Kurtic, Frantar and Alistarh 2023, arXiv:2302.04089) chooses so between layers' widths.

    Args:
        groups: Options of each group, at least one.
        time: For all of them; where even the fastest need more, these are chosen.

    Returns:
        The number of the option, for each group.

    Example:
        >>> choose_widths([[Option(0, 2), Option(5, 1)], [Option(0, 2), Option(1, 1)]], time=3)
        [0, 1]
    """
    fastest = [min(range(len(options)), key=lambda i: (options[i].time, options[i].loss)) for options in groups]
    spare = time - sum(options[i].time for options, i in zip(groups, fastest))
    if spare <= 0:
        return fastest
    tick = spare / _TICKS
    best, choices = np.zeros(_TICKS + 1), list[NDArray[np.int64]]()  # least loss within so many ticks
    for options, least in zip(groups, fastest):
        more = [int(np.ceil((one.time - options[least].time) / tick - 1e-9)) for one in options]
        lost = np.stack([_shifted(best, ticks) + one.loss for one, ticks in zip(options, more)])
        choices.append(lost.argmin(0))
        best = lost.min(0)
    left, chosen = _TICKS, list[int]()
    for options, least, choice in zip(reversed(groups), reversed(fastest), reversed(choices)):
        chosen.append(int(choice[left]))
        left -= int(np.ceil((options[chosen[-1]].time - options[least].time) / tick - 1e-9))
    return chosen[::-1]


def _shifted(best: NDArray[np.float64], ticks: int) -> NDArray[np.float64]:
    """Return the least loss of the groups before where this one takes so many ticks."""
    found = np.full_like(best, np.inf)
    if ticks < len(best):
        found[ticks:] = best[: len(best) - ticks]
    return found
