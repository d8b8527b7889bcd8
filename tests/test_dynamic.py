"""Masks that move: drop and grow, phases; by hand on a matrix of eight weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import build_bert, draw_batch, take_step
from torch import nn

from hf_prune import HeadPruner, Pruning, PruningError, Schedule, WeightPruner
from hf_prune.evidence import EVIDENCE
from hf_prune.recipe import load_recipe
from hf_prune.rules import RULES


def start(pruner, schedule, total_steps=8, lr=0.0):
    """Return a model whose weights are 1 to 8, with a gradient of 8 to 1, its optimizer and a session."""
    model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Identity())
    model[0].weight.data = torch.arange(1.0, 9.0)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    pruning = Pruning(model, pruner, schedule, total_steps=total_steps, optimizer=optimizer)
    return model[0].weight, optimizer, pruning


def step(weight, optimizer, pruning, gradient=None):
    weight.grad = torch.arange(8.0, 0.0, -1.0)[None] if gradient is None else torch.tensor([gradient])
    pruning.after_backward()
    optimizer.step()
    return pruning.step()


def stays(weight):
    return [i + 1 for i, one in enumerate(weight[0].tolist()) if one]


def test_rigl_by_hand():
    """Of four, 0.3 at the first exchange and 0.15 half-way are 1, at the end 0; the steepest that is masked grows."""
    schedule = Schedule("constant", begin=1, end=5, frequency=2)
    pruner = WeightPruner(sparsity=0.5, score="l1", rule="rigl", include=["*"])
    weight, optimizer, pruning = start(pruner, schedule)
    step(weight, optimizer, pruning)
    assert stays(weight) == [5, 6, 7, 8]  # the largest
    step(weight, optimizer, pruning)
    step(weight, optimizer, pruning)
    # 5 is the smallest that stays and leaves; 1 has the largest gradient, and begins at zero, without momentum
    assert pruning.masks["0.weight"][0].tolist() == [True, False, False, False, False, True, True, True]
    assert weight[0].tolist() == [0, 0, 0, 0, 0, 6, 7, 8]
    moments = optimizer.state[weight]
    assert moments["exp_avg"][0, :5].tolist() == [0] * 5
    assert moments["exp_avg"][0, 5:].ne(0).all()
    weight.data[0, 0] = 9.0
    step(weight, optimizer, pruning)
    step(weight, optimizer, pruning)
    assert stays(weight) == [1, 6, 7, 8]  # nothing is exchanged at the end
    assert pruning.finished
    assert pruning.logs()["sparsity_weight"] == 0.5


def test_set_grows_others_each_time():
    """2048 stay; 0.256 and 0.15 of them leave, and 0.8 and 0.87 of what grows had not been there."""
    grown = []
    for seed in range(3):
        pruner = WeightPruner(sparsity=0.5, score="l1", rule="set", include=["*"])
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Identity())
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = Schedule("constant", begin=1, end=9, frequency=2)
        pruning = Pruning(model, pruner, schedule, total_steps=9, optimizer=optimizer, seed=seed)
        masks = []
        for _ in range(5):
            model[0].weight.grad = torch.ones(64, 64)
            pruning.after_backward()
            optimizer.step()
            if pruning.step():
                masks.append(pruning.masks["0.weight"].clone())
        grown += [after & ~before for before, after in pairwise(masks)]
    assert [int(one.sum()) for one in grown] == [pytest.approx(418, abs=40), pytest.approx(267, abs=30)] * 3
    assert all((a & b).sum() < 0.5 * a.sum() for i, a in enumerate(grown) for b in grown[i + 1 :])


def test_set_grows_others_each_time_beside_calibration_data():
    """Scores that need no data are drawn anew where all evidence would come from data."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = WeightPruner(sparsity=0.5, score="l1", rule="set", include=["*"])
    schedule = Schedule("constant", begin=1, end=9, frequency=2)
    pruning = Pruning(model, pruner, schedule, total_steps=9, optimizer=optimizer, data=[{"input": torch.ones(1, 64)}])
    masks = []
    for _ in range(9):
        model[0].weight.grad = torch.ones(64, 64)
        optimizer.step()
        if pruning.step():
            masks.append(pruning.masks["0.weight"].clone())
    grown = [int((after & ~before).sum()) for before, after in pairwise(masks)]
    assert grown[:2] == [pytest.approx(418, abs=60), pytest.approx(267, abs=40)]


@pytest.mark.parametrize(("rule", "left"), [("final", [5, 6, 7, 8]), ("rigl", [1, 6, 7, 8])])
def test_an_allocation_that_takes_means_sees_no_infinities(rule, left):
    """What is masked, or stays for certain, is infinite to the selection; the mean of that would decide everything."""

    def by_mean(scores, costs):
        return {name: score / score.mean() for name, score in scores.items()}

    schedule = Schedule(steps=[(1, 0.5), (3, 1)]) if rule == "final" else Schedule("constant", begin=1, end=5)
    pruner = WeightPruner(sparsity=0.5, score="l1", rule=rule, include=["*"], allocation=by_mean)
    weight, optimizer, pruning = start(pruner, schedule)
    for _ in range(3):
        step(weight, optimizer, pruning)
    assert [i + 1 for i, one in enumerate(pruning.masks["0.weight"][0].tolist()) if one] == left


def test_phases_by_hand():
    """Sparse at 1, dense at 3, sparse at 5: what was masked trains again, from zero."""
    schedule = Schedule(steps=[(1, 1), (3, 0), (5, 1)])
    pruner = WeightPruner(sparsity=0.5, score="l1", rule="from_zero", include=["*"])
    weight, optimizer, pruning = start(pruner, schedule)
    step(weight, optimizer, pruning)
    assert stays(weight) == [5, 6, 7, 8]
    step(weight, optimizer, pruning)
    step(weight, optimizer, pruning)
    assert pruning.masks["0.weight"].all()
    assert weight[0].tolist() == [0, 0, 0, 0, 5, 6, 7, 8]
    weight.data[0, 0] = 9.0  # it has learned
    step(weight, optimizer, pruning)
    step(weight, optimizer, pruning)
    assert stays(weight) == [1, 6, 7, 8]
    assert pruning.masking.nbytes == 0


def test_phases_with_the_last_values():
    schedule = Schedule(steps=[(1, 1), (3, 0), (5, 1)])
    weight, optimizer, pruning = start(WeightPruner(sparsity=0.5, score="l1", rule="anew", include=["*"]), schedule)
    for _ in range(3):
        step(weight, optimizer, pruning)
    assert weight[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_growing_sparsity_with_drop_and_grow():
    """GraNet: the schedule takes away, and the rule exchanges."""
    model = build_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = WeightPruner(sparsity=0.6, score="l1", rule="rigl")
    pruning = Pruning(model, pruner, Schedule(begin=1, end=9, frequency=2), total_steps=10, optimizer=optimizer)
    back, seen = 0, []
    for one in range(10):
        before = {name: mask.clone() for name, mask in pruning.masks.items()}
        take_step(model(**draw_batch(model, seed=one)).loss, optimizer, pruning)
        back += sum(int((mask & ~before.get(name, mask)).sum()) for name, mask in pruning.masks.items())
        seen.append(pruning.logs()["sparsity_weight"] if pruning.masks else 0.0)
    assert back > 10
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.6, abs=1e-3)


def test_chance_is_drawn_anew_and_the_same_after_a_resume():
    pruning = start(WeightPruner(sparsity=0.5, score="chance", include=["*"]), Schedule())[2]
    one, weight = pruning.evidence["chance"], pruning.model[0].weight
    first = one.of_weight("chance", "0.weight", weight)
    one.read(pruning.masking, ())
    second = one.of_weight("chance", "0.weight", weight)
    fresh = EVIDENCE["chance"](pruning.live, [], ["0.weight"], 0)
    fresh.load_state_dict(one.state_dict())
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh.of_weight("chance", "0.weight", weight))


def test_a_rule_is_named_by_settings():
    assert WeightPruner(rule="rigl").resolve_rule() is RULES["rigl"]
    assert HeadPruner(rule="anew").resolve_rule() is RULES["anew"]
    recipe = load_recipe("quickstart", ["pruners.weights={sparsity: 0.5, score: l1, rule: set}"])
    assert recipe.pruners.weights.resolve_rule() is RULES["set"]
    with pytest.raises(PruningError, match="rule says what may come back, without reversible. Received: rule='rigl'"):
        WeightPruner(rule="rigl", reversible=False).resolve_rule()
    with pytest.raises(PruningError, match="No rule is named 'rigel'. Did you mean 'rigl'"):
        Pruning(build_bert(), WeightPruner(sparsity=0.5, rule="rigel"), total_steps=4)
    with pytest.raises(PruningError, match="Rule 'rigl' chooses single weights: use WeightPruner"):
        Pruning(build_bert(), HeadPruner(sparsity=0.5, rule="rigl"), total_steps=4)
    both = [HeadPruner(sparsity=0.5, rule="anew"), WeightPruner(sparsity=0.5, score="l1", rule="rigl")]
    with pytest.raises(PruningError, match="need tensors of their own. Received: both of "):
        Pruning(build_bert(), both, total_steps=4)
