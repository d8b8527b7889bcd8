"""What other packages add in one file each is saved, resumed bit for bit, cut, shared and refused like our own."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extensions import learned_gates, two_of_four  # noqa: F401  what they register
from extensions.accuracy_guard import FloorGuard
from extensions.bottlenecks import BottleneckPruner, Squeeze
from extensions.drop_and_grow import RigL
from extensions.entry_budget import EntryTarget
from models import build_bert, draw_batch, take_step
from test_examples import run_example

from hf_prune import (
    AccuracyGuard,
    Guard,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    PruningSettings,
    Regularisation,
    Schedule,
    Target,
    WeightPruner,
    prune,
)
from hf_prune.evidence import EVIDENCE
from hf_prune.kinds import KINDS
from hf_prune.packing import pack
from hf_prune.patterns import PATTERNS
from hf_prune.pruners import PRUNERS
from hf_prune.resume import read_state, write_state
from hf_prune.rules import RULES
from hf_prune.scores import SCORES
from hf_prune.session import BUDGETS, GUARDS

STEPS = 10
EARLY = Schedule("cubic", begin=1, end=9, frequency=2)
LEARNED = Schedule("cubic", begin=2, end=9, frequency=2)  # a score that is learned has learned nothing before
SPARSE = Schedule("linear", begin=1, end=9, frequency=2, initial=0.9)
LOW = {3: 0.7, 4: 0.7, 5: 0.7, 6: 0.9}  # what evaluations find after these steps; 0.9 elsewhere
CONSTANT = Schedule("constant", begin=1, end=9, frequency=2)
PHASES = Schedule(steps=[(2, 1), (4, 0), (6, 1), (7, 0), (9, 1)])
UNITS = [HeadPruner(sparsity=0.5), NeuronPruner(sparsity=0.5)]


def dynamic(rule: str) -> WeightPruner:
    return WeightPruner(sparsity=0.6, score="l1", rule=rule)


CASES: dict[str, Callable[..., PruningSettings]] = {
    "evidence": lambda **more: PruningSettings(WeightPruner(sparsity=0.5, score="sure"), EARLY, **more),
    "rule": lambda **more: PruningSettings(RigL(sparsity=0.6, score="l1"), SPARSE, **more),
    "rigl": lambda **more: PruningSettings(dynamic("rigl"), CONSTANT, **more),
    "set": lambda **more: PruningSettings(dynamic("set"), CONSTANT, **more),
    "phases": lambda **more: PruningSettings(dynamic("from_zero"), PHASES, **more),
    "guard": lambda **more: PruningSettings(UNITS, EARLY, guards=[FloorGuard()], **more),
    "accuracy": lambda **more: PruningSettings(UNITS, EARLY, guards=[AccuracyGuard(dense=0.9, patience=2)], **more),
    "budget": lambda **more: PruningSettings([HeadPruner(), NeuronPruner()], EARLY, EntryTarget(entries=0.7), **more),
    "pattern": lambda **more: PruningSettings(WeightPruner(sparsity=0.5, score="l1", pattern="2:4"), EARLY, **more),
    "kind": lambda **more: PruningSettings(BottleneckPruner(sparsity=0.5), EARLY, **more),
    "l0": lambda **more: PruningSettings(
        [HeadPruner(score="l0"), NeuronPruner(score="l0")], LEARNED, Target(macs=0.5), **more
    ),
    "soft movement": lambda **more: PruningSettings(
        WeightPruner(sparsity=0.5, score="soft_movement", reversible=False), LEARNED, **more
    ),
    "movement by Adam": lambda **more: PruningSettings(
        [
            NeuronPruner(sparsity=0.5, score="movement_adam", reversible=False),
            WeightPruner(sparsity=0.3, score="movement_adam", reversible=False),
        ],
        LEARNED,
        **more,
    ),
    "regularisation": lambda **more: PruningSettings(
        [HeadPruner(threshold=0.8, relative=True, score="l1"), NeuronPruner(threshold=0.8, relative=True, score="l1")],
        EARLY,
        regularisation=Regularisation("group_lasso"),
        **more,
    ),
}
LIVE = {  # beside what is masked, units leave physically
    "evidence": lambda: PruningSettings(
        [WeightPruner(sparsity=0.5, score="sure"), *UNITS], EARLY, shrink_during_training=True
    ),
    "budget": lambda: CASES["budget"](shrink_during_training=True),
    "pattern": lambda: PruningSettings(
        [WeightPruner(sparsity=0.5, score="l1", pattern="2:4"), NeuronPruner(sparsity=0.5, multiple_of=4)],
        EARLY,
        shrink_during_training=True,
    ),
    "kind": lambda: CASES["kind"](shrink_during_training=True),
    "l0": lambda: CASES["l0"](shrink_during_training=True),
    "soft movement": lambda: PruningSettings(
        [WeightPruner(sparsity=0.5, score="soft_movement", reversible=False), *UNITS],
        LEARNED,
        shrink_during_training=True,
    ),
    "movement by Adam": lambda: CASES["movement by Adam"](shrink_during_training=True),
    "regularisation": lambda: CASES["regularisation"](shrink_during_training=True),
}


def build(case: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Squeeze() if case == "kind" else build_bert(seed=seed)


def batch_of(model: Any, seed: int) -> dict[str, Any]:
    if isinstance(model, Squeeze):
        draw = torch.Generator().manual_seed(seed)
        return {"inputs": torch.randn(8, 8, generator=draw), "labels": torch.randn(8, 8, generator=draw)}
    return draw_batch(model, seed=seed)


def start(case: str, seed: int = 0, told: PruningSettings | None = None, wrap: Any = None) -> Any:
    """Return model, optimizer, session, and a function that takes steps."""
    model = build(case, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = Pruning(model, told or CASES[case](), total_steps=STEPS, optimizer=optimizer)
    call = wrap(model) if wrap else model

    def go(first: int, last: int) -> Iterator[bool]:
        for step in range(first, last):
            yield take_step(call(**batch_of(model, step)).loss, optimizer, pruning)
            pruning.observe({"eval_accuracy": LOW.get(step, 0.9) if case in ("guard", "accuracy") else 1.0})

    return model, optimizer, pruning, lambda first, last: list(go(first, last))


def same(first: Any, second: Any) -> bool:
    """Whether two sessions hold the same, bit for bit."""
    (plain, tensors), (other, others) = (pack(one.state_dict()) for one in (first, second))
    return (
        plain == other
        and tensors.keys() == others.keys()
        and all(torch.equal(one, others[name]) for name, one in tensors.items())
        and all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    )


@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("case", CASES)
def test_an_extension_resumes_bit_for_bit(case, stop, tmp_path):
    model, optimizer, pruning, go = start(case)
    go(0, stop)
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    write_state(pruning.state_dict(), tmp_path / "state.safetensors")
    go(stop, STEPS)
    other, moments, resumed, again = start(case, seed=1)
    assert not same(pruning, resumed)
    other.load_state_dict(held[0])
    moments.load_state_dict(held[1])
    resumed.load_state_dict(read_state(tmp_path / "state.safetensors"))
    again(stop, STEPS)
    assert same(pruning, resumed)


@pytest.mark.parametrize("case", LIVE)
def test_an_extension_follows_a_cut(case):
    sizes, model = [], build(case)
    for live in (False, True):
        told = LIVE[case]()
        told = dataclasses.replace(told, shrink_during_training=live)
        model, _, pruning, go = start(case, told=told)
        go(0, STEPS)
        report = pruning.finish()
        sizes.append((report.kept, sum(one.numel() for one in model.parameters())))
        dense = sum(one.numel() for one in build(case).parameters())
        assert sizes[-1][1] < dense
    assert sizes[0][1] == sizes[1][1]


def test_learned_gates_choose_what_the_loss_wants_kept():
    _, _, pruning, go = start("evidence")
    go(0, STEPS)
    logits = torch.cat([one.flatten() for one in pruning.evidence["sure"].logits.values()]).detach()
    kept = torch.cat([mask.flatten() for mask in pruning.masks.values()])
    assert pruning.logs()["sparsity_weight"] == pytest.approx(0.5, abs=1e-3)
    assert logits[kept].mean() > logits[~kept].mean()


def test_dropped_weights_grow_again_at_the_density_that_was_asked_for():
    _, _, pruning, go = start("rule")
    back = 0
    for step in range(STEPS):
        before = {name: mask.clone() for name, mask in pruning.masks.items()}
        go(step, step + 1)
        back += sum(int((mask & ~before.get(name, mask)).sum()) for name, mask in pruning.masks.items())
    assert back > 50
    assert pruning.logs()["sparsity_weight"] == pytest.approx(0.6, abs=1e-3)


def test_a_guard_holds_changes_back_and_undoes_the_last_one():
    _, _, pruning, go = start("guard")
    told = []
    for step in range(STEPS):
        (changed,) = go(step, step + 1)
        told.append((pruning.clock.steps, pruning.clock.position, changed, pruning.logs()["sparsity_head"]))
    steps, positions, changes, sparsities = zip(*told)
    assert steps == tuple(range(1, STEPS + 1))
    # evaluations behind steps 4, 5, 6 are bad: the change due at step 5 waits twice, is then undone, and made again
    assert positions == (1, 2, 3, 4, 4, 4, 2, 3, 4, 5)
    assert changes == (True, False, True, False, False, False, False, True, False, True)
    assert sparsities[2] > sparsities[6] == sparsities[0]


class Scripted(Guard):
    """Say what a plan says at each change that is due, by its number."""

    goes_back = True

    def __init__(self, plan):
        self.plan, self.asked = plan, 0

    def verdict(self):
        self.asked += 1
        return self.plan.get(self.asked, "go")

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_masked_layers_run_again_after_a_resumed_run_went_back(tmp_path):
    told = PruningSettings(LayerPruner(sparsity=0.5), EARLY, guards=[Scripted({3: "back"})])
    model, optimizer, pruning, go = start("guard", told=told)
    go(0, 4)
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    write_state(pruning.state_dict(), tmp_path / "state.safetensors")
    go(4, STEPS)
    other, moments, resumed, again = start("guard", seed=1, told=told)
    other.load_state_dict(held[0])
    moments.load_state_dict(held[1])
    resumed.load_state_dict(read_state(tmp_path / "state.safetensors"))
    again(4, STEPS)
    assert same(pruning, resumed)


def test_what_was_kept_to_go_back_to_is_given_back_with_the_last_change():
    weights = WeightPruner(sparsity=0.3, score="movement")
    told = PruningSettings([*UNITS, weights], EARLY, guards=[FloorGuard()])
    model, _, pruning, go = start("evidence", told=told)
    go(0, 8)
    assert pruning.masking.remembers
    assert pruning.guarding.state_dict()["good"]
    go(8, STEPS)
    assert pruning.finished
    assert not pruning.masking.remembers
    assert sum(one.nbytes for one in pruning.evidence.values()) == 0
    assert pruning.guarding.state_dict()["good"] is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_settings_with_guards_can_be_used_again():
    told = CASES["guard"]()
    runs = [start("guard", told=told) for _ in range(2)]
    for _, _, pruning, go in runs:
        go(0, 6)  # in the midst of bad evaluations
        assert pruning.clock.position == 4
    assert told.guards[0].bad == 0
    assert same(runs[0][2], runs[1][2])


def test_going_back_twice_restores_the_same_model():
    told = PruningSettings(UNITS, EARLY, guards=[Scripted({4: "back", 5: "back"})])
    model, _, pruning, go = start("guard", told=told)
    held = {}
    for step in range(8):
        if step == 4:
            held = {name: one.clone() for name, one in model.state_dict().items()}  # before the third change
        go(step, step + 1)
        if step in (6, 7):  # asked the fourth time, and the fifth
            assert pruning.clock.position == 4
            assert pruning.logs()["sparsity_head"] == pytest.approx(0.5 * EARLY.fraction(3, STEPS), abs=0.13)
    assert held


def test_a_learning_rate_does_not_go_back():
    _, optimizer, pruning, go = start("guard")
    go(0, 6)
    optimizer.param_groups[0]["lr"] = 1e-3
    go(6, 7)
    assert pruning.clock.position == 2  # it went back
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_state_of_other_guards_is_refused():
    first = start("guard")[2]
    told = PruningSettings(UNITS, EARLY, guards=[FloorGuard(), FloorGuard(floor=0.1)])
    with pytest.raises(
        PruningError, match="of these guards: accuracy_floor, accuracy_floor 2. Received: accuracy_floor"
    ):
        start("guard", told=told)[2].load_state_dict(first.state_dict())


def test_given_masks_follow_a_cut():
    model = build("evidence")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    given = {name: torch.arange(256).view(16, 16) % 3 > 0}
    told = PruningSettings(
        [HeadPruner(sparsity=0.5), WeightPruner(sparsity=0.5, score="l1")], EARLY, shrink_during_training=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = Pruning(model, told, total_steps=STEPS, optimizer=optimizer, masks=given)
    for step in range(STEPS):
        take_step(model(**batch_of(model, step)).loss, optimizer, pruning)
    assert pruning.finished
    assert len(model.get_parameter(name)) < 16
    assert not (pruning.masks[name] & ~pruning.masking.given[name]).any()


def test_a_guard_that_says_something_else_is_an_error():
    class Lost(FloorGuard):
        def verdict(self):
            return "stop"

    _, _, _, go = start("guard", told=PruningSettings(UNITS, EARLY, guards=[Lost()]))
    with pytest.raises(PruningError, match="must be 'go', 'wait' or 'back'. Received: 'stop'"):
        go(0, 2)


def test_two_of_four_leave():
    model, _, pruning, go = start("pattern")
    go(0, STEPS)
    for name in pruning.masks:
        assert ((model.get_parameter(name).reshape(-1, 4) == 0).sum(1) == 2).all()


def test_a_target_in_parameters_is_reached():
    model, _, pruning, go = start("budget")
    dense = sum(one.numel() for one in model.parameters())
    go(0, STEPS)
    pruning.finish()
    assert 0.68 < sum(one.numel() for one in model.parameters()) / dense <= 0.7


def test_a_target_in_parameters_means_the_dense_model_again():
    model = build("budget")
    dense = sum(one.numel() for one in model.parameters())
    prune(model, [HeadPruner(), NeuronPruner()], target=EntryTarget(entries=0.9), data=[batch_of(model, 0)])
    prune(model, [HeadPruner(), NeuronPruner()], target=EntryTarget(entries=0.7), data=[batch_of(model, 0)])
    assert 0.68 < sum(one.numel() for one in model.parameters()) / dense <= 0.7


def test_a_target_that_was_missed_is_told_in_what_it_counts(caplog):
    told = PruningSettings([HeadPruner(), NeuronPruner(min_kept=20)], EARLY, EntryTarget(entries=0.2))
    _, _, pruning, go = start("budget", told=told)
    go(0, STEPS)
    pruning.finish()
    assert "target.entries=0.2 was not reached, 0." in caplog.text


def test_settings_say_all():
    with pytest.raises(PruningError, match="PruningSettings say all: nothing is given beside them. Received: "):
        Pruning(build_bert(), CASES["kind"](), EARLY, total_steps=STEPS)
    with pytest.raises(PruningError, match="PruningSettings say all"):
        PruningCallback(CASES["guard"](), seed=3)
    assert PruningCallback(told := CASES["guard"]()).settings is told


def test_units_of_a_new_kind_leave():
    model, _, pruning, go = start("kind")
    go(0, STEPS)
    assert pruning.logs()["sparsity_bottleneck"] == 0.5
    pruning.finish()
    assert sum(len(down.bias) for down in model.down) == 6


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (lambda: CASES["rule"](shrink_during_training=True), "must not be reversible"),
        (lambda: CASES["rigl"](shrink_during_training=True), "must not be reversible"),
        (
            lambda: CASES["guard"](shrink_during_training=True),
            "A guard that goes back needs masks.*shrink_during_training",
        ),
        (lambda: PruningSettings(Returning(sparsity=0.5)), "Rule 'drop_and_grow' chooses single weights"),
        (
            lambda: PruningSettings(NeuronPruner(sparsity=0.5, score="sure")),
            "follows single weights: use WeightPruner",
        ),
        (lambda: PruningSettings(BottleneckPruner(sparsity=0.5)), "finds no groups of kind bottleneck"),
    ],
)
def test_what_cannot_be_is_refused(told, message):
    with pytest.raises(PruningError, match=message):
        Pruning(build_bert(), told(), total_steps=STEPS)


class Returning(NeuronPruner):
    """A pruner of units with a rule of weights."""

    def resolve_rule(self):
        return RULES["drop_and_grow"]


def share(out: Path) -> None:
    """Train under two processes with DDP; under FSDP what needs whole parameters is refused."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    told = {}
    for case in CASES:
        _, _, pruning, go = start(case, wrap=torch.nn.parallel.DistributedDataParallel)
        go(0, STEPS)
        plain, tensors = pack(pruning.state_dict())
        told[case] = [
            str(plain["clock"]),
            pruning.logs(),
            {name: float(one.double().sum()) for name, one in tensors.items()},
        ]
    for case in ("l0", "movement by Adam", "soft movement"):
        rank = torch.distributed.get_rank()
        _, _, pruning, go = start(case, wrap=torch.nn.parallel.DistributedDataParallel)
        go(20 * rank, 20 * rank + STEPS)  # each on batches of its own
        tensors = pack({name: one.state_dict() for name, one in pruning.evidence.items()})[1]
        told[f"{case} on other data"] = {name: float(one.double().sum()) for name, one in tensors.items()}
    for case in ("evidence", "pattern", "guard", "soft movement", "regularisation"):
        model = build(case)
        fully_shard(model)
        with pytest.raises(PruningError) as refused:
            Pruning(model, CASES[case](), total_steps=STEPS)
        told[f"{case} under FSDP"] = str(refused.value)
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(told))


def test_two_processes_agree_and_sharded_models_are_refused_where_parts_cannot_tell(tmp_path):
    run_example(Path(__file__), tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for case in CASES:
        alone = start(case)
        alone[-1](0, STEPS)
        assert first[case][1] == pytest.approx(alone[2].logs())
    assert "Learned gates need whole parameters" in first["evidence under FSDP"]
    assert "Pattern '2:4' needs whole parameters" in first["pattern under FSDP"]
    assert "A guard that goes back needs masks of whole parameters" in first["guard under FSDP"]
    assert "Soft movement needs whole parameters" in first["soft movement under FSDP"]
    assert "'group_lasso' needs whole parameters" in first["regularisation under FSDP"]


def test_any_keys_of_a_state_come_back_each_with_its_own_tensor(tmp_path):
    told = {1: torch.ones(1), "1": torch.zeros(1), ("a", 2): 3, "a/b": torch.ones(2), "a": {"b": torch.zeros(2)}}
    write_state({"clock": {"steps": 1}, "evidence.mine": told}, tmp_path / "state.safetensors")
    read = read_state(tmp_path / "state.safetensors")["evidence.mine"]
    assert read.keys() == told.keys()
    assert [read[1].tolist(), read["1"].tolist(), read["a/b"].tolist()] == [[1], [0], [1, 1]]
    assert read["a"]["b"].tolist() == [0, 0]


# the contract of everything that is registered
@pytest.mark.parametrize("need", list(EVIDENCE))
def test_evidence_keeps_its_contract(need):
    score = next((f for name in SCORES for f in SCORES[name].values() if need in f.needs), None)
    if score is None:
        pytest.skip("no score needs it")
    kind, data = EVIDENCE[need], [draw_batch(build_bert())]
    made = WeightPruner if score.of == "weight" else LayerPruner if need == "block_influence" else NeuronPruner
    schedule = Schedule("oneshot", begin=3, end=3) if kind.at_once else LEARNED
    told = PruningSettings(made(sparsity=0.5, score=score.name), schedule, data=data if kind.takes == "data" else None)
    model, _, pruning, go = start("evidence", told=told)
    (one,) = {id(pruning.evidence[EVIDENCE[n].name]): pruning.evidence[EVIDENCE[n].name] for n in score.needs}.values()
    go(0, 4)
    state = copy.deepcopy(one.state_dict())
    pack(state)
    fresh = type(one)(pruning.live, one.groups, one.weights, 0)
    fresh.load_state_dict(state)
    assert pack(fresh.state_dict())[0] == pack(state)[0]
    units = [group for group in pruning.groups if group.name in one.groups]
    if units:
        assert fresh.of_units(need, units[0]).shape == (units[0].units,)
        assert torch.equal(fresh.of_units(need, units[0]), one.of_units(need, units[0]))
    elif need != "gradient":  # of the step that is over
        weight = model.get_parameter(one.weights[0])
        assert torch.equal(fresh.of_weight(need, one.weights[0], weight), one.of_weight(need, one.weights[0], weight))
    one.settle()
    assert one.nbytes == 0 or not one.heavy


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_keeps_its_contract(name):
    rule = RULES[name]
    scores = {"a": torch.arange(8.0).view(2, 4), "b": torch.arange(8.0, 12.0)}
    old = {"a": torch.tensor([[True, False] * 2] * 2)}

    def select(values, among, *, fewer=0.0):
        from hf_prune.allocation import select_weights

        open_ = {n: v.masked_fill(~among[n], -torch.inf) if n in among else v for n, v in values.items()}
        return select_weights(open_, round(6 * (1 - fewer)))

    masks = rule.function(scores, old, select, **dict.fromkeys(rule.also, scores))
    assert {n: (m.shape, m.dtype) for n, m in masks.items()} == {n: (s.shape, torch.bool) for n, s in scores.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == 6
    if not rule.returns:
        assert not (masks["a"] & ~old["a"]).any()


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_pattern_keeps_its_contract(name):
    values = {"a": torch.rand(4, 8, generator=torch.Generator().manual_seed(0)), "b": torch.arange(16.0).view(4, 4)}
    for keep in (48, 40, 24):
        masks = PATTERNS[name].function(values, keep)
        assert {n: m.shape for n, m in masks.items()} == {n: v.shape for n, v in values.items()}
        assert sum(int(mask.sum()) for mask in masks.values()) == keep


@pytest.mark.parametrize("name", list(BUDGETS))
def test_a_budget_keeps_its_contract(name):
    pruning = Pruning(build_bert(), UNITS, total_steps=STEPS)
    target, units = Target(speedup=2, runtime="torch", length=16), pruning.masking.units  # times are measured
    chosen = [group for group in pruning.groups if group.kind in ("head", "neuron")]
    budget = BUDGETS[name](pruning.live, target, [group.name for group in chosen])
    costs = budget.costs(units, chosen)
    assert set(costs) == {group.name for group in chosen}
    assert all(cost > 0 for cost in costs.values())
    assert budget.left(units) == budget.dense
    neurons = "layers.0.mlp.neurons"
    fewer = units.keep({neurons: range(1, units.by_name[neurons].units)})
    assert budget.left(units) - budget.left(fewer) == pytest.approx(costs[neurons], abs=1e-6)
    fresh = BUDGETS[name](pruning.live, target, [group.name for group in chosen])
    fresh.load_state_dict(budget.state_dict())
    assert fresh.dense == budget.dense


@pytest.mark.parametrize("name", list(GUARDS))
def test_a_guard_keeps_its_contract(name):
    guard = GUARDS[name]()
    assert guard.verdict() in ("go", "wait", "back")
    guard.observe({"eval_accuracy": 0.0, "eval_loss": 9.0})
    assert guard.verdict() in ("go", "wait", "back")
    fresh = GUARDS[name]()
    fresh.load_state_dict(guard.state_dict())
    assert fresh.verdict() == guard.verdict()


@pytest.mark.parametrize("name", list(PRUNERS))
def test_a_pruner_keeps_its_contract(name):
    sort = PRUNERS[name]
    pruner = sort.made(sparsity=0.5, **sort.settings)
    assert pruner == sort.made(sparsity=0.5, **sort.settings)
    assert pruner.resolve_rule() in [RULES[rule] for rule in RULES]
    if hasattr(pruner, "kinds"):
        assert set(pruner.kinds([])) <= set(KINDS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    share(Path.cwd())
