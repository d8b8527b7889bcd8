"""Scores in numbers worked by hand, and the gate gradient against a gate that is really there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import BUILD, build_bert, draw_batch, take_step
from torch import Tensor, nn, tensor

from hf_prune import (
    HeadPruner,
    NeuronPruner,
    PruningError,
    Schedule,
    WeightPruner,
    find_groups,
    prune,
    register_score,
    shrink,
)
from hf_prune.evidence import Gates, backward_all
from hf_prune.live import LiveModel
from hf_prune.scores import SCORES, get_score
from hf_prune.session import Pruning
from hf_prune.session.scoring import Scorer
from hf_prune.structure import Group

WEIGHT = tensor([[1.0, -2], [3, 0]])


def test_l1_and_l2_by_hand():
    assert get_score("l1", "weight").function(WEIGHT).tolist() == [[1, 2], [3, 0]]
    assert get_score("l2", "weight").function(WEIGHT).tolist() == [[1, 4], [9, 0]]


def test_taylor_of_weights_by_hand():
    score = get_score("taylor", "weight")
    assert score.needs == ("gradient",)
    assert score.function(WEIGHT, gradient=tensor([[2.0, 2], [-1, 7]])).tolist() == [[2, 4], [3, 0]]


def test_scores_of_units_are_running_means_of_gates():
    assert get_score("taylor", "unit").needs == ("gate_square",)
    assert get_score("gate_absolute", "unit").needs == ("gate_absolute",)
    assert get_score("taylor", "unit").function(gate_square=tensor([4.0, 1])).tolist() == [4, 1]


def test_a_unit_pruner_falls_back_on_the_score_of_weights():
    assert get_score("l1", "unit").of == "weight"


def test_l1_of_units_is_the_sum_over_everything_they_own():
    model = build_bert()
    layer = model.bert.encoder.layer[1]
    up, bias, down = layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight
    expected = up.abs().sum(1) + bias.abs() + down.abs().sum(0)
    pruning = Pruning(model, NeuronPruner(sparsity=0.5, score="l1"), total_steps=1)
    scorer = Scorer(pruning.live, pruning.masking, pruning.evidence)
    torch.testing.assert_close(scorer.units(get_score("l1", "unit"), pruning.groups[-1]).float(), expected.detach())


def gates_of(model: Any, group: Group, batch: dict[str, Tensor], at: Tensor | None = None) -> Tensor:
    """Return ``(samples, units)``: the gradient of the loss to a factor on each unit, by autograd alone."""
    if group.kind == "layer":
        return torch.stack([layer_gate_of(model, path, batch) for path in group.modules], dim=1)
    module = model.get_submodule(group.read[-1].parameter.rpartition(".")[0])
    value = torch.ones(group.units) if at is None else at.float()
    gate = value.repeat(len(batch["labels"]), 1).requires_grad_()

    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factors = gate.repeat_interleave(args[0].shape[-1] // group.units, dim=1)
        return (args[0] * factors[:, None], *args[1:])

    handle = module.register_forward_pre_hook(multiply)
    (gradient,) = torch.autograd.grad(model(**batch).loss, gate)
    handle.remove()
    return gradient


def layer_gate_of(model: Any, path: str, batch: dict[str, Tensor]) -> Tensor:
    """Return ``(samples,)``: the gradient of the loss to a factor on all that one layer changes."""
    gate = torch.ones(len(batch["labels"]), requires_grad=True)

    def scale(_: nn.Module, args: tuple[Tensor, ...], kwargs: Any, result: Any) -> Any:
        value = result[0] if isinstance(result, tuple) else result
        value = args[0] + gate[:, None, None] * (value - args[0])
        return (value, *result[1:]) if isinstance(result, tuple) else value

    handle = model.get_submodule(path).register_forward_hook(scale, with_kwargs=True)
    (gradient,) = torch.autograd.grad(model(**batch).loss, gate)
    handle.remove()
    return gradient


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_gate_gradients_are_those_of_real_gates(name):
    model = BUILD[name]()
    groups, batches = find_groups(model), [draw_batch(model, seed=seed) for seed in (1, 2)]
    watcher = Gates(LiveModel(model), [group.name for group in groups])
    watcher.start()
    backward_all(model, batches, evidence=[watcher])
    watcher.stop()
    for group in groups:
        first, second = (gates_of(model, group, batch) for batch in batches)
        square = first.square().mean(0) + second.square().mean(0)
        torch.testing.assert_close(watcher.means["gate_square"][group.name], square, rtol=1e-3, atol=1e-7)
        absolute = first.abs().mean(0) + second.abs().mean(0)
        torch.testing.assert_close(watcher.means["gate_absolute"][group.name], absolute, rtol=1e-3, atol=1e-6)


def test_watching_neither_keeps_hooks_nor_changes_gradients():
    model, twin = build_bert(), build_bert()
    watcher = Gates(LiveModel(model), [group.name for group in find_groups(model)])
    watcher.start()
    for one in (model, twin):
        one(**draw_batch(one)).loss.backward()
    watcher.stop()
    assert not any(module._forward_pre_hooks for module in model.modules())
    for parameter, other in zip(model.parameters(), twin.parameters()):
        assert (parameter.grad is None) == (other.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad)


def test_evaluation_leaves_the_means_alone():
    model = build_bert()
    watcher = Gates(LiveModel(model), [group.name for group in find_groups(model)])
    watcher.start()
    with torch.no_grad():
        model(**draw_batch(model))
    watcher.commit()
    assert not any(mean.any() for mean in watcher.means["gate_square"].values())


def test_taylor_removes_the_neurons_whose_gates_matter_least():
    model = build_bert()
    batches = [draw_batch(model, seed=seed) for seed in range(3)]
    group = next(group for group in find_groups(model) if group.name == "layers.0.mlp.neurons")
    score = sum(gates_of(model, group, batch).square().mean(0) for batch in batches)
    pruner = NeuronPruner(sparsity=0.5, include=["layers.0.*"])
    assert prune(model, pruner, data=batches).kept[group.name] == score.topk(12).indices.sort().values.tolist()


def test_weight_scores_take_the_gradients_of_all_batches():
    model, twin = build_bert(), build_bert()
    batches = [draw_batch(model, seed=seed) for seed in range(3)]
    prune(model, WeightPruner(sparsity=0.5, include=["classifier.weight"]), data=batches)
    backward_all(twin, batches)
    weight = twin.classifier.weight
    score = (weight * weight.grad).abs().flatten()
    assert (
        model.classifier.weight.flatten().nonzero().view(-1).tolist() == score.topk(24).indices.sort().values.tolist()
    )


def test_calibration_leaves_no_gradient_and_no_hook_behind():
    model = build_bert().train()
    prune(model, NeuronPruner(sparsity=0.5), data=[draw_batch(model)])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_weights_are_scored_when_they_are_due_whatever_data_another_pruner_has_asked_for():
    model = build_bert()
    names = [f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in range(2)]
    pruners = [
        WeightPruner(0.5, "l1", include=names[:1], schedule=Schedule("oneshot", begin=3, end=3)),
        WeightPruner(0.5, "taylor", include=names[1:], schedule=Schedule("oneshot", begin=1, end=1)),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruning = Pruning(model, pruners, total_steps=3, optimizer=optimizer, data=[draw_batch(model)])
    take_step(model(**draw_batch(model)).loss, optimizer, pruning)
    weight = model.get_parameter(names[0])
    weight.data.copy_(weight.data.flip(0, 1) * torch.linspace(1, 9, weight.shape[1]))  # it has learned
    expected = weight.abs() > weight.abs().median()
    for _ in range(2):
        take_step(model(**draw_batch(model)).loss, optimizer, pruning)
    assert torch.equal(pruning.masks[names[0]], expected)


def test_random_depends_on_the_seed_alone():
    def kept(seed: int) -> Any:
        return prune(build_bert(), NeuronPruner(sparsity=0.5, score="random"), seed=seed).kept

    assert kept(0) == kept(0) != kept(1)
    assert kept(0)["layers.0.mlp.neurons"] != kept(0)["layers.1.mlp.neurons"]


def test_a_function_is_a_score():
    def kept(score: Any) -> set[int]:
        pruner = NeuronPruner(sparsity=0.5, score=score, include=["layers.0.*"])
        return set(prune(build_bert(), pruner).kept["layers.0.mlp.neurons"])

    assert kept(lambda weight: -weight.abs()) == set(range(24)) - kept("l1")


def test_units_by_gradients_of_weights_from_data_are_those_by_hand():
    """The gradients of calibration are read before they are given back."""
    name = "gradient_of_units"
    if name not in SCORES:
        register_score(name, needs=("gradient",))(lambda weight, gradient: gradient.abs())
    model, batch = build_bert(), draw_batch(build_bert())
    hand = build_bert()
    hand(**batch).loss.backward()
    expected = {}
    for i, layer in enumerate(hand.bert.encoder.layer):
        up, bias, down = (one.grad.abs() for one in (*layer.intermediate.dense.parameters(), layer.output.dense.weight))
        total = up.sum(1) + bias + down.sum(0)
        expected[f"layers.{i}.mlp.neurons"] = sorted(total.topk(12).indices.tolist())
    pruner = NeuronPruner(sparsity=0.5, score=name, allocation="uniform")
    assert {key: units for key, units in prune(model, pruner, data=[batch]).kept.items() if key in expected} == expected
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_names_its_group_before_anything_is_cut(broken):
    model = build_bert()
    model.bert.encoder.layer[1].intermediate.dense.bias.data[3] = broken
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PruningError, match="Score 'l1' of 'layers.1.mlp.neurons' is not finite; nothing was cut"):
        prune(model, NeuronPruner(sparsity=0.5, score="l1"))
    assert all(
        torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in model.state_dict().items()
    )


def test_a_weight_score_that_is_not_finite_names_its_parameter():
    model = build_bert()
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(PruningError, match=r"Score 'l2' of 'bert.encoder.layer.0.output.dense.weight' is not finite"):
        prune(model, WeightPruner(sparsity=0.5, score="l2"))


def test_registered_score_is_used_by_name():
    names = itertools.count()

    @register_score("own_score", needs=("gradient",), paper="none")
    def own_score(weight: Tensor, gradient: Tensor) -> Tensor:
        next(names)
        return gradient.abs()

    try:
        model = build_bert()
        prune(
            model,
            WeightPruner(sparsity=0.5, score="own_score", include=["classifier.weight"]),
            data=[draw_batch(model)],
        )
        assert next(names) == 1
    finally:
        del SCORES._entries["own_score"]


def test_a_score_needs_what_there_is():
    register_score("x", needs=("gradeint",))(lambda weight, gradeint: weight)
    try:
        with pytest.raises(PruningError, match="No need is named 'gradeint'. Did you mean 'gradient'"):
            Pruning(build_bert(), NeuronPruner(sparsity=0.5, score="x"), total_steps=1)
    finally:
        del SCORES._entries["x"]


def test_a_name_is_taken_once():
    with pytest.raises(PruningError, match="A score of weights named 'l1' is registered already"):
        register_score("l1")(torch.abs)


def test_unknown_score_offers_the_closest():
    with pytest.raises(PruningError, match="No score is named 'tailor'. Did you mean 'taylor'"):
        prune(build_bert(), NeuronPruner(sparsity=0.5, score="tailor"))


def test_a_score_of_units_is_not_for_weights():
    with pytest.raises(PruningError, match="score 'gate_absolute' is for units; a WeightPruner needs one of weights"):
        prune(build_bert(), WeightPruner(sparsity=0.5, score="gate_absolute"))


def test_a_score_that_needs_data_says_so():
    with pytest.raises(
        PruningError, match="data must hold batches with labels: the scores need gate_square. Received: None"
    ):
        prune(build_bert(), NeuronPruner(sparsity=0.5))
    with pytest.raises(PruningError, match="data must hold at least one batch"):
        prune(build_bert(), NeuronPruner(sparsity=0.5), data=[])


def test_data_without_labels_says_so():
    batch = draw_batch(build_bert())
    del batch["labels"]
    with pytest.raises(PruningError, match=r"data must hold labels, or pass loss=.* \['attention_mask', 'input_ids'\]"):
        prune(build_bert(), NeuronPruner(sparsity=0.5), data=[batch])


def test_own_loss_is_used():
    model = build_bert()
    batch = draw_batch(model)
    labels = batch.pop("labels")
    report = prune(
        model,
        NeuronPruner(sparsity=0.5),
        data=[batch],
        loss=lambda model, batch: nn.functional.cross_entropy(model(**batch).logits, labels),
    )
    assert report.kept == prune(build_bert(), NeuronPruner(sparsity=0.5), data=[{**batch, "labels": labels}]).kept


def test_scores_follow_a_shrunk_model():
    model = shrink(build_bert(), {"layers.0.mlp.neurons": range(12, 24)})
    report = prune(model, NeuronPruner(sparsity=0.75, score="l1", include=["layers.0.*"]))
    assert len(report.kept["layers.0.mlp.neurons"]) == 6
    assert min(report.kept["layers.0.mlp.neurons"]) >= 12


OTHER_SHAPES = {
    "shape ()": lambda weight: weight.sum(),
    "shape (1,": lambda weight: weight[:1],
    "a float": lambda _: 1.0,
}


@pytest.mark.parametrize("received", OTHER_SHAPES)
@pytest.mark.parametrize("pruner", [HeadPruner, WeightPruner])
def test_a_score_of_another_shape_is_told_which_one_it_must_have(pruner, received):
    with pytest.raises(PruningError, match=r"must return a tensor with one value for each weight of '.*'") as told:
        prune(build_bert(), pruner(sparsity=0.5, score=OTHER_SHAPES[received]))
    assert f"Received: {received}" in str(told.value)
