"""Training that drives weights and units to zero, and thresholds instead of a sparsity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import TINY_RECIPE, build_bert, draw_batch, draw_rows, take_step, training_arguments
from torch import nn
from transformers import Trainer

from hf_prune import (
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningArguments,
    PruningCallback,
    PruningError,
    PruningSettings,
    Regularisation,
    Schedule,
    Target,
    WeightPruner,
    prune,
    register_regularisation,
    run,
)
from hf_prune.resume import read_state, write_state
from hf_prune.session import REGULARISERS

STEPS = 8
LATE = Schedule("oneshot", begin=6, end=6)
UNITS = [HeadPruner(threshold=0.8, relative=True, score="l1"), NeuronPruner(threshold=0.8, relative=True, score="l1")]
HALF = [HeadPruner(sparsity=0.5, score="l1"), NeuronPruner(sparsity=0.5, score="l1")]


def one_neuron_in_four() -> Any:
    """A feed-forward block whose four neurons have L1 norms 0.5, 1, 2 and 4 over two weights and a bias each."""
    model = build_bert(num_hidden_layers=1, hidden_size=4, num_attention_heads=1, intermediate_size=4)
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        for part in (layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight):
            part.zero_()
        layer.intermediate.dense.weight[:, 0] = torch.tensor([0.5, 1.0, 2.0, 4.0])
    return model


@pytest.mark.parametrize(
    ("amount", "kept"),
    [
        ({"threshold": 0.0}, [0, 1, 2, 3]),
        ({"threshold": 0.5}, [1, 2, 3]),
        ({"threshold": 1.5}, [2, 3]),
        ({"threshold": 0.25, "relative": True}, [2, 3]),  # of 4: what scores 1 or less
        ({"threshold": 0.24, "relative": True}, [1, 2, 3]),
        ({"threshold": 100.0}, [3]),  # min_kept
        (
            {"threshold": 1.5, "multiple_of": 3},
            [1, 2, 3],
        ),  # the other three can only leave together, and are worth more
    ],
)
def test_a_threshold_removes_units_that_score_so_much_or_less(amount, kept):
    report = prune(one_neuron_in_four(), NeuronPruner(score="l1", **amount))
    assert report.kept["layers.0.mlp.neurons"] == kept
    assert report.sparsities["layers.0.mlp.neurons"] == 1 - len(kept) / 4
    assert report.sparsities["layers.0.attention.heads"] == 0
    assert report.settings["sparsity_neuron"] == 1 - len(kept) / 4


@pytest.mark.parametrize(
    ("amount", "gone"),
    [({"threshold": 0.2}, [3, 2]), ({"threshold": 0.5, "relative": True}, [5, 2]), ({"threshold": 0.0}, [1, 0])],
)
def test_a_threshold_masks_weights_tensor_by_tensor(amount, gone):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 2, bias=False), nn.Linear(2, 2, bias=False)])

    model = Two()
    model.layers[0].weight.data = torch.tensor([[0.0, 0.1, -0.2, 0.3, 0.5], [-0.6, 0.7, 0.8, 0.9, 1.0]])
    model.layers[1].weight.data = torch.tensor([[0.1, 0.2], [-0.3, 0.4]])
    report = prune(model, WeightPruner(score="l1", **amount))
    assert list(report.masked.values()) == [gone[0] / 10, gone[1] / 4]
    assert report.settings["sparsity_weight"] == pytest.approx(sum(gone) / 14, abs=1e-6)


NOTHING = "=0.01 of {} has removed nothing: every score is above it"


@pytest.mark.parametrize(
    ("pruner", "told"),
    [
        (NeuronPruner(score="l1", threshold=0.01), NOTHING.format("NeuronPruner")),
        (NeuronPruner(score="l1", threshold=0.01, relative=True), NOTHING.format("NeuronPruner") + "."),
        (NeuronPruner(score="l1", threshold=9.0), "leaves no more than must stay of layers.0.mlp.neurons."),
        (WeightPruner(score="l1", threshold=0.01, include=["*intermediate*"]), None),  # zeros of the block itself
        (
            WeightPruner(score="l1", threshold=9.0, include=["*intermediate*"]),
            "leaves nothing of bert.encoder",
        ),
        (NeuronPruner(score="l1", threshold=1.5), None),
    ],
)
def test_a_threshold_that_takes_all_or_nothing_says_so(pruner, told, caplog):
    report = prune(one_neuron_in_four(), pruner)
    assert report.settings.get("warnings", []) == [record.getMessage() for record in caplog.records]
    assert [told in warning for warning in report.settings.get("warnings", [])] == [True] * (told is not None)
    assert not pruner.relative or "relative" not in caplog.text  # it is already


def test_a_threshold_rises_with_the_schedule():
    model = one_neuron_in_four()
    told = PruningSettings(NeuronPruner(score="l1", threshold=2.0), Schedule("linear", begin=1, end=5, frequency=2))
    pruning, left = Pruning(model, told, total_steps=5), []
    for _ in range(5):
        pruning.step()
        left.append(int(pruning.alive["layers.0.mlp.neurons"].sum()))
    assert left == [4, 4, 2, 2, 1]  # thresholds 0, 1, 2 at steps 1, 3, 5


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: NeuronPruner(sparsity=0.5, threshold=0.1),
            "a sparsity or a threshold, not both. Received: sparsity=0.5",
        ),
        (lambda: NeuronPruner(threshold=-1.0), "threshold: .*greater than or equal to 0.*Received: -1"),
        (lambda: NeuronPruner(relative=True), r"relative=True takes a threshold in \[0, 1\).*Received: threshold=None"),
        (lambda: NeuronPruner(threshold=1.0, relative=True), "Received: threshold=1.0"),
        (
            lambda: Pruning(build_bert(), [NeuronPruner(threshold=1.0)], target=Target(macs=0.5), total_steps=1),
            "leaves threshold and schedule to it. Received: threshold=1.0",
        ),
        (lambda: Regularisation(strength=0.0), "strength: .*greater than 0"),
        (lambda: PruningSettings(UNITS, regularisation="l1"), "regularisation must be a Regularisation"),
    ],
)
def test_amounts_that_contradict_each_other_are_refused(made, message):
    with pytest.raises(PruningError, match=message):
        made()


def step_once(told: Regularisation, pruners: Any, model: Any, target: Target | None = None) -> None:
    """Take one step of which only the regularisation moves anything."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = PruningSettings(pruners, LATE, target, regularisation=told)
    pruning = Pruning(model, settings, total_steps=STEPS, optimizer=optimizer)
    optimizer.step()
    pruning.step()


def test_l1_takes_learning_rate_times_strength_from_each_weight():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    model[0].weight.data = torch.tensor([[1.0, -0.5, 0.15]])
    before = model[1].weight.clone()
    step_once(Regularisation("l1", strength=2.0), WeightPruner(threshold=0.0, score="l1", include=["0.*"]), model)
    torch.testing.assert_close(model[0].weight, torch.tensor([[0.8, -0.3, 0.0]]))  # 0.1 * 2
    assert model[0].weight[0, 2] == 0
    assert torch.equal(model[1].weight, before)  # not pruned


def test_group_lasso_takes_learning_rate_times_strength_from_each_units_norm():
    model = one_neuron_in_four()
    layer, others = model.bert.encoder.layer[0], copy.deepcopy(model.state_dict())
    layer.intermediate.dense.bias.data[1] = 0.75  # the norm of neuron 1 is sqrt(1 + 0.75^2) = 1.25
    step_once(Regularisation("group_lasso", strength=5.0), NeuronPruner(threshold=0.0, score="l1"), model)
    # 0.1 * 5 leaves each norm; a neuron that had no more is exactly zero
    torch.testing.assert_close(layer.intermediate.dense.weight[:, 0], torch.tensor([0.0, 1 * 0.75 / 1.25, 1.5, 3.5]))
    assert layer.intermediate.dense.weight[0, 0] == 0
    torch.testing.assert_close(layer.intermediate.dense.bias[1], torch.tensor(0.75 * 0.75 / 1.25))
    attention = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.get_parameter(attention), others[attention])


def test_what_costs_more_shrinks_more():
    model = build_bert(num_hidden_layers=1)  # a head has 4 * 4 * 16 = 256 entries of matrices, a neuron 2 * 16 = 32
    mean = (4 * 256 + 24 * 32) / 28
    norms = []
    for by_cost in (True, False):
        one = copy.deepcopy(model)
        neuron, query = one.bert.encoder.layer[0].intermediate.dense, one.bert.encoder.layer[0].attention.self.query
        kept = [neuron.weight[0].clone(), query.weight[:4].clone()]
        step_once(Regularisation("l1", strength=0.01, by_cost=by_cost), UNITS, one)
        norms.append(
            [(before - now).abs().max().item() for before, now in zip(kept, (neuron.weight[0], query.weight[:4]))]
        )
    assert norms[0] == pytest.approx([0.001 * 32 / mean, 0.001 * 256 / mean], rel=1e-3)
    assert norms[1] == pytest.approx([0.001, 0.001], rel=1e-3)


def test_sensitivity_decays_what_the_loss_does_not_mind():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    model[0].weight.data = torch.ones(1, 3)
    model[0].weight.grad = torch.tensor([[0.0, 0.4, -2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = PruningSettings(
        WeightPruner(threshold=0.1, score="l1", include=["0.*"]), LATE, regularisation=Regularisation("sensitivity")
    )
    pruning = Pruning(model, told, total_steps=STEPS, optimizer=optimizer)
    optimizer.step()
    pruning.step()
    torch.testing.assert_close(model[0].weight, torch.tensor([[1.0 * 0.9, 0.96 * 0.94, 1.2]]))


def test_growing_fades_the_smallest_units_of_as_many_as_are_to_leave():
    model, told = one_neuron_in_four(), Regularisation("growing", strength=6.0)
    step_once(told, NeuronPruner(sparsity=0.5, score="l1"), model)
    # behind step 1 of 6: 1 - 0.1 * 6 / 6
    torch.testing.assert_close(
        model.bert.encoder.layer[0].intermediate.dense.weight[:, 0], torch.tensor([0.45, 0.9, 2.0, 4.0])
    )
    other = one_neuron_in_four()
    step_once(told, NeuronPruner(score="l1"), other, target=Target(macs=0.25))
    torch.testing.assert_close(
        other.bert.encoder.layer[0].intermediate.dense.weight[:, 0], torch.tensor([0.45, 0.9, 1.8, 4.0])
    )


def test_growing_fades_the_smallest_weights_of_as_many_as_are_to_leave():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1))
    model[0].weight.data = torch.tensor([[1.0, -0.5, 0.2, -2.0]])
    step_once(Regularisation("growing", strength=6.0), WeightPruner(sparsity=0.5, score="l1", include=["0.*"]), model)
    torch.testing.assert_close(model[0].weight, torch.tensor([[1.0, -0.45, 0.18, -2.0]]))


def test_growing_grows():
    model, sizes = one_neuron_in_four(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = PruningSettings(NeuronPruner(sparsity=0.25, score="l1"), LATE, regularisation=Regularisation("growing", 6.0))
    pruning = Pruning(model, told, total_steps=STEPS, optimizer=optimizer)
    for _ in range(3):
        optimizer.step()
        pruning.step()
        sizes.append(model.bert.encoder.layer[0].intermediate.dense.weight[0, 0].item())
    assert sizes == pytest.approx([0.5 * 0.9, 0.5 * 0.9 * 0.8, 0.5 * 0.9 * 0.8 * 0.7])


def start(kind: str, seed: int = 0, **more: Any) -> Any:
    model = build_bert(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    units = HALF if REGULARISERS[kind].needs_amount else UNITS
    told = PruningSettings(units, LATE, regularisation=Regularisation(kind, strength=5.0), **more)
    return model, optimizer, Pruning(model, told, total_steps=STEPS, optimizer=optimizer)


def train(run: Any, first: int, last: int) -> None:
    model, optimizer, pruning = run
    for step in range(first, last):
        take_step(model(**draw_batch(model, seed=step)).loss, optimizer, pruning)


@pytest.mark.parametrize("kind", list(REGULARISERS))
def test_a_regularisation_resumes_bit_for_bit_and_shrinks_live(kind, tmp_path):
    run = start(kind)
    train(run, 0, 4)
    held = copy.deepcopy((run[0].state_dict(), run[1].state_dict()))
    write_state(run[2].state_dict(), tmp_path / "state.safetensors")
    train(run, 4, STEPS)
    again = start(kind, seed=1)
    again[0].load_state_dict(held[0])
    again[1].load_state_dict(held[1])
    again[2].load_state_dict(read_state(tmp_path / "state.safetensors"))
    train(again, 4, STEPS)
    assert all(map(torch.equal, run[0].state_dict().values(), again[0].state_dict().values()))
    live = start(kind, shrink_during_training=True)
    train(live, 0, STEPS)
    masked, cut = run[2].finish(), live[2].finish()
    assert masked.kept == cut.kept
    assert masked.settings["sparsity_neuron"] > 0


def test_nothing_shrinks_after_the_last_change():
    model, optimizer, pruning = start("l1")
    train((model, optimizer, pruning), 0, 6)
    assert pruning.finished
    before = {name: one.clone() for name, one in model.state_dict().items()}
    optimizer.zero_grad()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    pruning.step()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("pruners", "kind", "optimized", "message"),
    [
        (UNITS, "l1", False, "goes by an optimizer's learning rate: optimizer=. Received: none"),
        (WeightPruner(sparsity=0.5), "group_lasso", True, "shrinks units: single weights take 'l1'"),
        (LayerPruner(sparsity=0.5), "l1", True, "no layers and no experts"),
        (UNITS, "growing", True, "by how much is to leave, a sparsity or a target. Received: a threshold"),
    ],
)
def test_a_regularisation_that_cannot_be_is_refused(pruners, kind, optimized, message):
    model = build_bert()
    optimizer = torch.optim.AdamW(model.parameters()) if optimized else None
    told = PruningSettings(pruners, LATE, regularisation=Regularisation(kind))
    with pytest.raises(PruningError, match=message):
        Pruning(model, told, total_steps=STEPS, optimizer=optimizer)


def test_a_mistyped_regularisation_is_refused_where_it_is_written():
    with pytest.raises(PruningError, match="No regularisation is named 'growning'. Did you mean 'growing'?"):
        Regularisation("growning")


def test_a_trainer_and_its_arguments_take_a_regularisation(tmp_path):
    line = {"prune_threshold": 0.0, "prune_score": "l1", "prune_begin": 6.0, "prune_end": 6.0}
    callback = PruningArguments(
        prune=["neurons"], prune_schedule="oneshot", prune_regularisation="group_lasso", prune_strength=2.8, **line
    ).callback()
    assert callback.settings.regularisation == Regularisation("group_lasso", strength=2.8)
    model = build_bert()
    arguments = training_arguments(tmp_path, max_steps=8, learning_rate=1e-1, lr_scheduler_type="constant", optim="sgd")
    Trainer(model, arguments, train_dataset=draw_rows(model, 16), callbacks=[callback]).train()
    assert isinstance(callback, PruningCallback)
    assert 0.1 < callback.report.settings["sparsity_neuron"] < 0.9  # 6 * 0.1 * 2.8 of norms of 1 to 2


def test_a_regularisation_of_ones_own():
    @register_regularisation("halving")
    def halving(told):
        for name in told.by_tensor:
            told.tensors[name].mul_(0.5)

    try:
        model = one_neuron_in_four()
        step_once(Regularisation("halving"), NeuronPruner(threshold=0.3, score="l1"), model)
        assert model.bert.encoder.layer[0].intermediate.dense.weight[:, 0].tolist() == [0.25, 0.5, 1.0, 2.0]
    finally:
        del REGULARISERS._entries["halving"]


def test_a_recipe_may_regularise(tmp_path):
    told = ["regularisation={kind: l1, strength: 1.0}", "schedule={kind: oneshot, begin: 0.6, end: 0.6}"]
    pruners = "pruners={heads: {score: l1}, neurons: {score: l1}}"
    report = run("quickstart", [*TINY_RECIPE, *told, pruners, f"output={tmp_path / 'run'}"])
    assert report.pruned.parameters < report.dense.parameters
