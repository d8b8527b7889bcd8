"""The contract of every registered score: resumed bit for bit, alike in two processes, live shrinking or a refusal."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_outputs, build_bert, draw_batch, take_step
from test_examples import run_example
from test_extensions import LEARNED, STEPS, same, start

from hf_prune import (
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningError,
    PruningSettings,
    Schedule,
    WeightPruner,
    prune,
)
from hf_prune.evidence import EVIDENCE
from hf_prune.packing import pack
from hf_prune.resume import read_state, write_state
from hf_prune.scores import SCORES, Score

ALL = [  # ours; those of tests/extensions are held by tests/test_extensions.py
    (name, of) for name in SCORES for of, one in SCORES[name].items() if one.function.__module__ == "hf_prune.scores"
]
TRAINED = ("l0", "movement_adam", "soft_movement")  # one shot has nothing to learn from
ONCE = Schedule("oneshot", begin=6, end=6)


def has(score: Score, attribute: str, value: Any = True) -> bool:
    """Whether evidence that a score needs says this of itself."""
    return any(getattr(EVIDENCE[need], attribute) == value for need in score.needs)


def pruners_of(name: str, of: str) -> Any:
    if of == "weight":
        return WeightPruner(sparsity=0.5, score=name)
    if name == "block_influence":
        return LayerPruner(sparsity=0.5, score=name)
    heads, measures = HeadPruner(sparsity=0.4, score=name), has(SCORES[name][of], "takes", "data")
    return heads if measures else [heads, NeuronPruner(sparsity=0.5, score=name)]


def told_of(name: str, of: str, rank: int = 0, **more: Any) -> PruningSettings:
    """Return settings for a score; calibration data where it must have them, of each process its own."""
    score = SCORES[name][of]
    if has(score, "takes", "data"):
        more["data"] = [draw_batch(build_bert(), seed=50 + rank)]
    schedule = ONCE if has(score, "at_once") else LEARNED
    return PruningSettings(more.pop("pruners", pruners_of(name, of)), schedule, **more)


def train(model: Any, told: PruningSettings, wrap: Any = None, rank: int = 0) -> Pruning:
    """Take all steps, in each process with batches of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = Pruning(model, told, total_steps=STEPS, optimizer=optimizer)
    call = wrap(model) if wrap else model
    for step in range(STEPS):
        take_step(call(**draw_batch(model, seed=2 * step + rank)).loss, optimizer, pruning)
    return pruning


@pytest.mark.parametrize(("name", "of"), ALL)
def test_a_score_resumes_bit_for_bit(name, of, tmp_path):
    model, optimizer, pruning, go = start("evidence", told=told_of(name, of))
    go(0, 4)
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    write_state(pruning.state_dict(), tmp_path / "state.safetensors")
    go(4, STEPS)
    other, moments, resumed, again = start("evidence", seed=1, told=told_of(name, of))
    other.load_state_dict(held[0])
    moments.load_state_dict(held[1])
    resumed.load_state_dict(read_state(tmp_path / "state.safetensors"))
    again(4, STEPS)
    assert same(pruning, resumed)
    assert pruning.finished
    if has(SCORES[name][of], "from_data"):
        assert pack(pruning.state_dict())[1].keys() == pack(resumed.state_dict())[1].keys()


@pytest.mark.parametrize(("name", "of"), ALL)
def test_a_score_shrinks_live_as_it_masks_or_refuses(name, of):
    """Beside single weights neurons leave, so that their masks and what they are scored by have to follow."""
    more = [NeuronPruner(sparsity=0.5, score="l1")] if of == "weight" else []
    pruners = pruners_of(name, of)
    pruners = [*(pruners if isinstance(pruners, list) else [pruners]), *more]
    settings = [told_of(name, of, pruners=pruners, shrink_during_training=live) for live in (False, True)]
    if SCORES[name][of].reversible:
        with pytest.raises(PruningError, match="removes for good"):
            start("evidence", told=settings[1])
        return
    models, kept = [], []
    for told in settings:
        models.append(build_bert().double())
        pruning = train(models[-1], told)
        kept.append(pruning.finish().kept)
        assert all(mask.shape == models[-1].get_parameter(name).shape for name, mask in pruning.masks.items())
    if of == "unit" and name != "random":  # which is drawn for as many as there are
        assert kept[0] == kept[1]
        assert_same_outputs(*models)
    else:  # single weights of what has left no longer count for a mask's share, so that later choices may differ
        assert sum(map(len, kept[0].values())) == sum(map(len, kept[1].values()))


@pytest.mark.parametrize(("name", "of"), ALL)
def test_a_score_prunes_once_and_leaves_nothing_behind(name, of):
    model = build_bert().train()
    before = sum(int(one.count_nonzero()) for one in model.parameters())
    data, learned = [draw_batch(model, seed=seed) for seed in range(2)], name in TRAINED
    with pytest.raises(PruningError, match="that have learned") if learned else contextlib.nullcontext():
        prune(model, pruners_of(name, of), data=data)
    after = sum(int(one.count_nonzero()) for one in model.parameters())
    assert after == before if learned else after < before
    assert all(parameter.grad is None and not parameter._backward_hooks for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize("need", list(EVIDENCE))
def test_each_evidence_says_what_it_takes(need):
    assert EVIDENCE[need].takes in ("gradients", "forwards", "data")
    assert EVIDENCE[need].name in EVIDENCE


def share(out: Path) -> None:
    """Train under two processes with DDP, by each score."""
    torch.distributed.init_process_group("gloo")
    wrap = functools.partial(torch.nn.parallel.DistributedDataParallel, find_unused_parameters=True)
    rank, told = torch.distributed.get_rank(), {}
    for name, of in ALL:
        pruning = train(build_bert(), told_of(name, of, rank), wrap, rank)
        pruning.synchronize()
        plain, tensors = pack(pruning.state_dict())
        told[f"{name} of {of}"] = [str(plain), {key: float(one.double().sum()) for key, one in tensors.items()}]
    (out / f"{rank}.json").write_text(json.dumps(told))


def test_two_processes_hold_and_choose_the_same_by_each_score(tmp_path):
    """Masks are compared by the library itself, which raises where processes have chosen differently."""
    run_example(Path(__file__), tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(ALL)
    assert first == second


if __name__ == "__main__":
    torch.set_num_threads(1)
    share(Path.cwd())
