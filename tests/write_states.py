"""Write pruning states that every later version must resume: `python tests/write_states.py`, once a format.

What lies under `tests/states` stands for checkpoints on people's disks: it is added to, and never written again.
Only how `returning` goes on was, when a sparsity of weights began to leave out those of masked units.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import build_bert, build_llama, draw_batch, take_step
from safetensors.torch import save_file

from hf_prune import HeadPruner, NeuronPruner, Pruning, Schedule, Target, WeightPruner
from hf_prune.resume import write_state

STATES = Path(__file__).parent / "states"
FORMAT = "parts"  # of what is written now; "flat" states were written before sessions had parts
SCHEDULE, HALF, STEPS = Schedule(begin=1, end=7, frequency=2), 4, 8
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Target | None]] = {
    "units": (build_llama, lambda: [HeadPruner(), NeuronPruner()], Target(macs=0.5)),
    "returning": (
        build_bert,
        lambda: [
            HeadPruner(sparsity=0.5, reversible=True),
            NeuronPruner(sparsity=0.5),
            WeightPruner(sparsity=0.5, score="l1", reversible=True),
        ],
        None,
    ),
    "movement": (build_bert, lambda: WeightPruner(sparsity=0.6, score="movement"), None),
    "leaking": (lambda: build_bert(hidden_act="sigmoid"), lambda: NeuronPruner(sparsity=0.5), None),
}


def start(case: str) -> tuple[Any, Pruning, Callable[[int, int], None]]:
    """Return a model, its session, and a function that trains from one step to another, without momentum."""
    build, pruners, target = CASES[case]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruning = Pruning(model, pruners(), SCHEDULE, target=target, total_steps=STEPS, optimizer=optimizer)

    def go(first: int, last: int) -> None:
        for step in range(first, last):
            take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)

    return model, pruning, go


def main() -> None:
    for case in CASES:
        folder = STATES / f"{FORMAT}-{case}"
        folder.mkdir(parents=True)
        model, pruning, go = start(case)
        go(0, HALF)
        save_file({name: one.clone() for name, one in model.state_dict().items()}, folder / "model.safetensors")
        write_state(pruning.state_dict(), folder / "pruning_state.safetensors")
        go(HALF, STEPS)
        masks = {f"masks/{name}": one for name, one in {**pruning.alive, **pruning.masks}.items()}
        weights = {f"weights/{name}": one.clone() for name, one in model.state_dict().items()}
        save_file({**masks, **weights}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
