"""Every method of the registries in two processes: they choose alike, and as one process of twice the batch does.

By a Trainer and by accelerate under DDP; under FSDP2 a method does the same, or is refused before anything is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import build_bert, draw_batch, draw_rows, training_arguments
from test_every_score import ALL, told_of
from test_examples import run_example
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_prune import (
    AccuracyGuard,
    HeadPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    PruningSettings,
    Regularisation,
    Schedule,
    WeightPruner,
)
from hf_prune.evidence import EVIDENCE
from hf_prune.rules import RULES
from hf_prune.scores import SCORES
from hf_prune.session import GUARDS, REGULARISERS
from hf_prune.sharding import whole

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

STEPS, ROWS = 10, 8
EVERY = Schedule("cubic", begin=2, end=9, frequency=2)
LATE = Schedule("oneshot", begin=8, end=8)
LOSSES = {3: 9.0, 4: 9.0, 5: 9.0}  # what evaluations of a loop find after these steps; 1.0 elsewhere
GUARDED = {"accuracy": functools.partial(AccuracyGuard, "loss", max_drop=1.0, patience=2)}
UNITS = [HeadPruner(sparsity=0.5), NeuronPruner(sparsity=0.5)]
LARGE = [HeadPruner(threshold=0.8, relative=True, score="l1"), NeuronPruner(threshold=0.8, relative=True, score="l1")]


def place() -> tuple[int, int]:
    """Return this process' number, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def ours(registry: Any) -> list[str]:
    """Return names of a registry that the library itself has registered."""
    return [
        name for name in registry if getattr(registry[name], "function", registry[name]).__module__[:8] == "hf_prune"
    ]


def of_score(name: str, of: str) -> PruningSettings:
    rank, world = place()
    told = told_of(name, of)
    if told.data is None:
        return told
    mine = range(2) if world == 1 else [rank]
    return dataclasses.replace(told, data=[draw_batch(build_bert(), seed=50 + number) for number in mine])


def of_rule(name: str) -> PruningSettings:
    return PruningSettings(WeightPruner(sparsity=0.6, score="l1", rule=name), EVERY)


def of_guard(name: str, **settings: Any) -> PruningSettings:
    return PruningSettings(UNITS, EVERY, guards=[GUARDED.get(name, GUARDS[name])(**settings)])


def of_regularisation(kind: str) -> PruningSettings:
    pruners = UNITS if REGULARISERS[kind].needs_amount else LARGE
    return PruningSettings(pruners, LATE, regularisation=Regularisation(kind, strength=2.0))


METHODS: dict[str, Callable[[], PruningSettings]] = {
    **{f"{of}s by {name}": functools.partial(of_score, name, of) for name, of in ALL},
    **{f"rule {name}": functools.partial(of_rule, name) for name in ours(RULES)},
    **{f"guard {name}": functools.partial(of_guard, name) for name in ours(GUARDS)},
    "guard accuracy that waits": functools.partial(of_guard, "accuracy", undo=False),
    **{f"regularisation {kind}": functools.partial(of_regularisation, kind) for kind in ours(REGULARISERS)},
}
REFUSED = (  # of sharded models
    "units by loss_without",
    "units by greedy",
    "weights by soft_movement",
    "guard accuracy",
    "regularisation group_lasso",
    "regularisation growing",
)


def facts(pruning: Pruning) -> dict[str, Any]:
    """Return what was masked, and how large the weights are; all processes call it."""
    state = pruning.state_dict()["masking"]
    masks = {**state["alive"], **state["weights"]}
    sizes = [float(whole(one.detach()).abs().sum()) for one in pruning.model.parameters()]
    packed = {name: bytes(numpy.packbits(mask.cpu().numpy())).hex() for name, mask in sorted(masks.items())}
    return {"masks": packed, "masked": sum(int((~mask).sum()) for mask in masks.values()), "size": sum(sizes)}


def by_trainer(told: PruningSettings, folder: Path) -> dict[str, Any]:
    """Let a Trainer train, under DDP where there are several processes."""
    model, callback = build_bert().double(), PruningCallback(told, shrink_at_end=False)
    often = {"eval_strategy": "steps", "eval_steps": 1} if told.guards else {}
    often["average_tokens_across_devices"] = False  # else a Trainer multiplies BERT's loss, a mean, by the processes
    sizes = {"per_device_train_batch_size": ROWS // place()[1], "max_steps": STEPS, "logging_steps": STEPS}
    data = {"train_dataset": draw_rows(model, ROWS * STEPS), "eval_dataset": draw_rows(model, ROWS, seed=1)}
    callback.attach(Trainer(model, training_arguments(folder, **sizes, **often), **data)).train()
    assert callback.pruning is not None
    return facts(callback.pruning)


def by_accelerate(told: PruningSettings, folder: Path) -> dict[str, Any]:
    """Train in a loop of accelerate's, under DDP where there are several processes."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator, model = Accelerator(cpu=True, kwargs_handlers=[unused]), build_bert().double()
    rows = DataLoader(draw_rows(model, ROWS * STEPS), ROWS // place()[1])
    model, optimizer, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rows)
    pruning = Pruning(model, told, total_steps=STEPS, optimizer=optimizer, accelerator=accelerator)
    return loop(model, batches, optimizer, pruning, accelerator.backward)


def by_shards(told: PruningSettings, folder: Path) -> dict[str, Any]:
    """Train in a loop under FSDP2, or whole in one process."""
    from torch.distributed.fsdp import fully_shard

    (rank, world), model = place(), build_bert().double()
    if world > 1:
        for part in (*model.bert.encoder.layer, model):
            fully_shard(part)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    batches = [{key: one[mine] for key, one in draw_batch(model, ROWS, seed).items()} for seed in range(STEPS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = Pruning(model, told, total_steps=STEPS, optimizer=optimizer)
    return loop(model, batches, optimizer, pruning, lambda loss: loss.backward())


def loop(model: Any, batches: Iterable[Any], optimizer: Any, pruning: Pruning, backward: Any) -> dict[str, Any]:
    """Take all steps."""
    for step, batch in enumerate(batches):
        backward(model(**batch).loss)
        pruning.after_backward()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()
        pruning.observe({"eval_loss": LOSSES.get(step, 1.0)})
    pruning.finish(shrink=False)
    return facts(pruning)


WAYS = {"trainer": by_trainer, "accelerate": by_accelerate, "fsdp": by_shards}


def train(way: str, name: str, folder: Path) -> dict[str, Any]:
    """Train by one method; return what came of it, or what refused it."""
    try:
        return WAYS[way](METHODS[name](), folder)
    except PruningError as refused:
        return {"refused": str(refused)}


@pytest.fixture(scope="module", params=WAYS)
def seen(request, tmp_path_factory):
    """Return a way to train, what one process saw, and what each of two did."""
    folder, way = tmp_path_factory.mktemp("ranks"), request.param
    for processes in (1, 2):
        run_example(Path(__file__), folder, way, processes=processes)
    return way, *(json.loads((folder / f"seen-{name}.json").read_text()) for name in ("0-of-1", "0-of-2", "1-of-2"))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_choose_what_one_does(name, seen):
    way, one, first, second = seen[0], *(each[name] for each in seen[1:])
    assert first == second
    if way == "fsdp" and name in REFUSED:
        assert "Received: a model sharded by FSDP" in first["refused"]
        return
    assert one["masked"] > 0
    assert first["masks"] == one["masks"]
    assert first["size"] == pytest.approx(one["size"], rel=1e-6)


def test_every_evidence_is_among_them():
    needed = {need for name, of in ALL for need in SCORES[name][of].needs}
    assert {EVIDENCE[need].name for need in ours(EVIDENCE)} == {EVIDENCE[need].name for need in needed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # each Trainer collects garbage, and there is much that is none
    (rank, of), here = place(), Path.cwd()
    if of > 1:
        torch.distributed.init_process_group("gloo")
    found = {name: train(sys.argv[1], name, here / f"out-{of}") for name in METHODS}
    (here / f"seen-{rank}-of-{of}.json").write_text(json.dumps(found))
