"""What activations, inputs, gradients and losses say of units and weights: in numbers worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build_bert, build_llama, draw_batch, take_step
from torch import nn, tensor

from hf_prune import (
    Group,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningError,
    PruningSettings,
    Schedule,
    Slice,
    Target,
    WeightPruner,
    find_groups,
    prune,
    register_architecture,
)
from hf_prune.evidence import (
    ActivationGradients,
    Activations,
    BlockInfluence,
    GradientSquares,
    Inputs,
    InputSensitivity,
    backward_all,
)
from hf_prune.live import LiveModel, Masking
from hf_prune.scores import get_score
from hf_prune.session.scoring import Scorer

ROWS = tensor([[[1.0, -1], [3, 1]]])  # one sample of two tokens
OTHER = tensor([[[1.0, 1], [0, 0]]])
ONCE = Schedule("oneshot", begin=1, end=1)


class TwoNeurons(nn.Module):
    """a = (x1, 2 x2), and the output 3 a1 + 4 a2."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Identity(), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.up.weight.data, self.down.weight.data = tensor([[1.0, 0], [0, 2]]), tensor([[3.0, 4]])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x, attention_mask=None):
        return SimpleNamespace(loss=self.down(self.up(self.embed(x))).sum())


@register_architecture("TwoNeurons")
def neurons_of_two(model):
    return [Group("neurons", "neuron", len(model.up.weight), (Slice("up.weight", 0, 1), Slice("down.weight", 1, 1)))]


def seen(kind: Any, model: nn.Module, batches: list[Any], weights: Any = ()) -> Any:
    """Return evidence of calibration data."""
    live = LiveModel(model)
    evidence = kind(live, [] if weights else [group.name for group in live.groups], weights, 0)
    evidence.reset()
    evidence.start()
    backward_all(model, batches, evidence=[evidence])
    evidence.stop()
    return evidence


def score_of(name: str, evidence: Any, model: nn.Module) -> list[float]:
    score, group = get_score(name, "unit"), find_groups(model)[0]
    return score.function(**{need: evidence.of_units(need, group) for need in score.needs}).tolist()


def test_activations_by_hand():
    """a: (1, -2) and (3, 2)."""
    model = TwoNeurons()
    evidence, group = seen(Activations, model, [{"x": ROWS}]), find_groups(model)[0]
    needs = ("activation_mean", "activation", "activation_square", "contribution")
    found = {need: evidence.of_units(need, group).tolist() for need in needs}
    assert found == {
        "activation_mean": [2, 0],
        "activation": [2, 2],
        "activation_square": [5, 4],
        "contribution": [5 * 9, 4 * 16],
    }
    assert score_of("activation", evidence, model) == [2, 2]
    assert score_of("output_norm", evidence, model) == pytest.approx([45**0.5, 8])


def test_means_are_over_tokens_however_they_are_shared_among_batches():
    batches = [{"x": ROWS}, {"x": OTHER[:, :1]}]
    evidence = seen(Activations, TwoNeurons(), batches)
    assert evidence.mean("activation", "neurons").tolist() == pytest.approx([(1 + 3 + 1) / 3, (2 + 2 + 2) / 3])


def test_padding_does_not_count():
    batch = {"x": ROWS, "attention_mask": tensor([[0, 1]])}
    assert seen(Activations, TwoNeurons(), [batch]).mean("activation", "neurons").tolist() == [3, 2]
    assert seen(Inputs, TwoNeurons(), [batch], ["up.weight"]).mean("input_mean", "up.weight").tolist() == [3, 1]


def test_activation_gradients_by_hand():
    """dL/da = (3, 4) at both tokens."""
    model = TwoNeurons()
    assert score_of("activation_gradient", seen(ActivationGradients, model, [{"x": ROWS}]), model) == [6, 8]


def test_inputs_and_wanda_by_hand():
    """Columns of x: (1, 3) and (-1, 1)."""
    model = TwoNeurons()
    evidence, weight = seen(Inputs, model, [{"x": ROWS}], ["up.weight"]), model.up.weight.detach()
    assert evidence.of_weight("input_mean", "up.weight", weight).tolist() == [[2, 0], [2, 0]]
    assert evidence.of_weight("input_absolute", "up.weight", weight)[0].tolist() == [2, 1]
    assert evidence.of_weight("input_square", "up.weight", weight)[0].tolist() == [5, 1]
    norm = evidence.of_weight("input_norm", "up.weight", weight)
    wanda = get_score("wanda", "weight").function(weight, input_norm=norm)
    torch.testing.assert_close(wanda, tensor([[5**0.5, 0], [0, 2]]))


@pytest.mark.parametrize("groups", [1, 2])
def test_inputs_of_convolutions_are_channels(groups):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups))
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    live = LiveModel(model, structured=False)
    evidence = Inputs(live, [], ["0.weight"])
    evidence.start()
    model(x)
    evidence.commit()
    found = evidence.of_weight("input_square", "0.weight", model[0].weight)
    channels = x.square().mean((0, 2, 3))
    for out in range(4):
        first = out // (4 // groups) * (4 // groups) if groups > 1 else 0
        expected = channels[first : first + 4 // groups, None, None].expand(-1, 3, 3)
        torch.testing.assert_close(found[out], expected)


def test_fisher_by_hand():
    """The gradients of `down` are (4, 0) of the first batch, and (1, 2) of the second."""
    model = TwoNeurons()
    evidence = seen(GradientSquares, model, [{"x": ROWS}, {"x": OTHER}], ["down.weight"])
    squares = evidence.of_weight("gradient_square", "down.weight", model.down.weight)
    assert squares.tolist() == [[(16 + 1) / 2, (0 + 4) / 2]]
    fisher = get_score("fisher", "weight").function(tensor([[3.0, 4]]), gradient_square=squares)
    assert fisher.tolist() == [[9 * 8.5 / 2, 16 * 2 / 2]]
    assert get_score("fisher", "unit").function(gate_square=tensor([4.0, 1])).tolist() == [2, 0.5]


def test_fisher_in_training_is_of_steps():
    """Of steps with the gradients (4, 0) and (1, 2); the first one has faded to 0.95 of its weight."""
    model = TwoNeurons()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruning = Pruning(
        model,
        WeightPruner(sparsity=0.5, score="fisher", include=["down.weight"]),
        Schedule("oneshot", begin=3, end=3),
        total_steps=3,
        optimizer=optimizer,
    )
    for batch in (ROWS, OTHER):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
        pruning.step()
    found = pruning.evidence["gradient_square"].of_weight("gradient_square", "down.weight", model.down.weight)
    torch.testing.assert_close(found, tensor([[(0.95 * 16 + 1) / 1.95, 4 / 1.95]]))


def test_wanda_in_training_reads_the_batches_of_its_steps():
    """Inputs of `up` are read in all three steps, also that of the change: norms of x are those of the batch."""
    model = TwoNeurons()
    model.up.weight.data = tensor([[1.0, 3], [2, 1]])  # times (5 ** 0.5, 1): 2.2, 3, 4.5, 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner, change = (
        WeightPruner(sparsity=0.5, score="wanda", include=["up.weight"]),
        Schedule("oneshot", begin=3, end=3),
    )
    pruning = Pruning(model, pruner, change, total_steps=3, optimizer=optimizer)
    for _ in range(3):
        take_step(model(ROWS).loss, optimizer, pruning)
    assert pruning.masks["up.weight"].tolist() == [[False, True], [True, False]]
    assert pruning.evidence["input_mean"].sums["up.weight"][-1].tolist() == pytest.approx(
        [0.95 * (2 + 0.95 * 2 + 0.95**2 * 2)] * 2
    )


def test_gradient_by_hand():
    assert get_score("gradient", "weight").function(tensor([1.0, 5]), gradient=tensor([-3.0, 2])).tolist() == [3, 2]


def calibrate(model: nn.Module, pruner: Any, batches: list[Any], leaving: int | None = None) -> list[float]:
    """Return the scores that a pruner's score takes from calibration data."""
    pruning = Pruning(model, PruningSettings(pruner, ONCE, data=batches), total_steps=1)
    scorer = Scorer(pruning.live, Masking(pruning.live), pruning.evidence)
    scorer.calibrate(batches, None, [], [], leaving)
    return scorer.units(pruner.resolve_score(), pruning.groups[0]).tolist()


def test_input_sensitivity_by_hand():
    """da/dx is diag(1, 2): of a direction v the units change by |v1| and 2 |v2|."""
    direction = torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(0)).abs()[0].mean(0)
    found = calibrate(TwoNeurons(), NeuronPruner(sparsity=0.5, score="input_sensitivity"), [{"x": ROWS}])
    assert found == pytest.approx([float(direction[0]), 2 * float(direction[1])], rel=1e-3)


def test_loss_without_by_hand():
    """The loss is 3 (1 + 3) + 4 (-2 + 2) = 12; without the first neuron 0, without the second 12."""
    model = TwoNeurons()
    assert calibrate(model, NeuronPruner(sparsity=0.5, score="loss_without"), [{"x": ROWS}]) == [-12, 0]
    assert model.down.weight.tolist() == [[3, 4]]


def test_measuring_leaves_tensors_and_moments_as_they_are():
    model, batch = build_bert(), draw_batch(build_bert())
    optimizer = torch.optim.AdamW(model.parameters())
    told = PruningSettings(NeuronPruner(sparsity=0.1, score="loss_without"), ONCE, data=[batch])
    pruning = Pruning(model, told, total_steps=1, optimizer=optimizer)
    model(**batch).loss.backward()
    optimizer.step()
    before = [one.clone() for state in optimizer.state.values() for one in (state["exp_avg"], state["exp_avg_sq"])]
    weights = [parameter.clone() for parameter in model.parameters()]
    scorer = Scorer(pruning.live, pruning.masking, pruning.evidence)
    scorer.calibrate([batch], None, [], [])
    after = [one for state in optimizer.state.values() for one in (state["exp_avg"], state["exp_avg_sq"])]
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, weights, model.parameters()))


class Sum(nn.Module):
    """Three neurons that add 3, 1 and -2.5; the loss is the squared distance of their sum to 0.4."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.up.weight.data, self.down.weight.data = torch.ones(3, 1), tensor([[3.0, 1, -2.5]])

    def forward(self, x):
        return SimpleNamespace(loss=(self.down(self.up(x)) - 0.4).square().sum())


register_architecture("Sum")(neurons_of_two)


def test_greedy_by_hand():
    """All: 1.5. Alone they would leave as second, first, third; without the second, the third is missed less."""
    batch = {"x": torch.ones(1, 1)}
    alone = calibrate(Sum(), NeuronPruner(sparsity=0.6, score="loss_without"), [batch])
    assert alone == pytest.approx([1.9**2 - 1.1**2, 0.1**2 - 1.1**2, 3.6**2 - 1.1**2], abs=1e-5)
    assert calibrate(Sum(), NeuronPruner(sparsity=0.6, score="greedy"), [batch], leaving=2) == [3, 1, 2]
    model = Sum()
    assert prune(model, NeuronPruner(sparsity=0.6, score="greedy"), data=[batch]).kept == {"neurons": [0]}
    assert model.down.weight.tolist() == [[3]]


class Turns(nn.Module):
    """Three layers: one leaves x as it is, one turns it by 90 degrees, one to its opposite."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        for layer, weight in zip(self.layers, ([[1.0, 0], [0, 1]], [[0.0, -1], [1, 0]], [[-1.0, 0], [0, -1]])):
            layer.weight.data = tensor(weight) * 2  # lengths do not matter

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(loss=x.sum())


@register_architecture("Turns")
def layers_of_turns(model):
    names = tuple(f"layers.{i}" for i in range(3))
    return [Group("layers", "layer", 3, (), modules=names)]


def test_block_influence_by_hand():
    evidence = seen(BlockInfluence, Turns(), [{"x": ROWS}, {"x": OTHER[:, :1]}])
    assert evidence.mean("block_influence", "layers").tolist() == pytest.approx([0, 1, 2], abs=1e-6)


def test_activations_of_whole_layers_are_of_what_they_change():
    """The first layer doubles x, and so adds (1, -1) and (3, 1)."""
    evidence = seen(Activations, Turns(), [{"x": ROWS}])
    assert evidence.mean("contribution", "layers")[0] == (2 + 10) / 2
    assert evidence.mean("activation", "layers")[0] == (1 + 1 + 3 + 1) / 4


# on models of transformers, against what autograd and plain arithmetic say
@pytest.mark.parametrize("build", [build_bert, build_llama])
def test_contributions_of_heads_are_norms_of_what_they_add(build):
    model, found = build(), {}
    batch = draw_batch(model)
    evidence = seen(Activations, model, [batch])
    for group in (one for one in find_groups(model) if one.kind in ("head", "kv_group", "neuron")):
        reader = model.get_submodule(group.read[0].module)

        def look(module, args, group=group):
            tokens = args[0][batch["attention_mask"].bool()]
            for unit in range(group.units):
                index = group.read[0].index(tensor([unit]), group.per_part)
                added = tokens[:, index] @ module.weight[:, index].T
                found.setdefault(group.name, []).append(float(added.square().sum(-1).mean().detach()))

        with reader.register_forward_pre_hook(look):
            model(**batch)
        assert evidence.mean("contribution", group.name).tolist() == pytest.approx(found[group.name], rel=1e-4)


def test_input_sensitivity_is_the_derivative_that_forward_mode_finds():
    model = build_bert(attn_implementation="eager").double()
    batch = draw_batch(model)
    embeddings, live = model.get_input_embeddings(), LiveModel(model)
    group = next(group for group in live.groups if group.name == "layers.1.mlp.neurons")
    evidence = InputSensitivity(live, [group.name], (), 0)
    pruning = Pruning(
        model, PruningSettings(NeuronPruner(sparsity=0.5, score="input_sensitivity"), ONCE, data=[batch]), total_steps=1
    )
    scorer = Scorer(pruning.live, pruning.masking, {"input_sensitivity": evidence})
    scorer.calibrate([batch], None, [], [])
    x = embeddings(batch["input_ids"]).detach()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    reader, kept = model.get_submodule(group.read[0].module), []

    def activations(value):
        kept.clear()
        handle = reader.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        model(inputs_embeds=value, attention_mask=batch["attention_mask"])
        handle.remove()
        return kept[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, rise = torch.func.jvp(activations, (x,), (direction,))
    expected = rise[batch["attention_mask"].bool()].abs().mean(0)
    torch.testing.assert_close(evidence.mean("input_sensitivity", group.name).double(), expected, rtol=1e-3, atol=1e-6)


def test_forwards_alone_need_no_gradient():
    model = build_llama(num_hidden_layers=4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    report = prune(model, LayerPruner(sparsity=0.25), data=[draw_batch(model)])
    assert len(report.kept["layers"]) == 3


def test_evaluations_and_masked_steps_leave_activations_alone():
    model = build_bert()
    evidence = Activations(LiveModel(model), [group.name for group in find_groups(model)])
    evidence.start()
    with torch.no_grad():
        model(**draw_batch(model))
    evidence.commit()
    model(**draw_batch(model))
    evidence.discard()
    assert not any(one.any() for one in evidence.sums.values())


# layers
def test_layers_alone_are_chosen_by_block_influence_and_beside_others_by_what_compares():
    def scores(*pruners: Any, **more: Any) -> list[Any]:
        return [one.score for one in PruningSettings(list(pruners), **more).pruners]

    assert scores(LayerPruner(sparsity=0.5)) == ["block_influence"]
    assert scores(LayerPruner(), target=Target(macs=0.5)) == ["block_influence"]
    assert scores(LayerPruner(), NeuronPruner(), target=Target(macs=0.5)) == ["taylor", "taylor"]
    assert scores(LayerPruner(sparsity=0.5), NeuronPruner(sparsity=0.5)) == ["block_influence", "taylor"]
    assert scores(LayerPruner(sparsity=0.5, unit="any"), LayerPruner(sparsity=0.5, score="l1")) == ["taylor", "l1"]


def test_layers_that_turn_nothing_leave_first():
    model = build_llama(num_hidden_layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[2].get_submodule(name).weight.data.mul_(1e-3)
    assert prune(model, LayerPruner(sparsity=0.25), data=[draw_batch(model)]).kept["layers"] == [0, 1, 3]


# what cannot be
@pytest.mark.parametrize(
    ("pruners", "more", "message"),
    [
        (NeuronPruner(sparsity=0.5, score="wanda"), {}, "Norms of inputs are of single weights: use WeightPruner"),
        (
            NeuronPruner(sparsity=0.5, score="block_influence"),
            {},
            r"LayerPruner\(unit='layer'\). Received: a pruner of 'l",
        ),
        (LayerPruner(sparsity=0.5, unit="branch", score="block_influence"), {}, "compares what whole layers"),
        (NeuronPruner(sparsity=0.5, score="loss_without"), {"data": None}, "pass data=, batches with labels"),
        (NeuronPruner(sparsity=0.5, score="input_sensitivity"), {"data": None}, "runs calibration data by itself"),
        (
            NeuronPruner(sparsity=0.5, score="greedy"),
            {"schedule": Schedule()},
            r"once, by prune\(\).*Received: \d+ changes",
        ),
        (NeuronPruner(score="greedy"), {"target": Target(macs=0.5)}, "by one pruner's own sparsity.*a target"),
        ([NeuronPruner(sparsity=0.5, score="greedy"), HeadPruner(sparsity=0.5)], {}, "several pruners"),
        (NeuronPruner(sparsity=0.5, score="greedy", allocation="uniform"), {}, "Received: allocation='uniform'"),
        (NeuronPruner(sparsity=0.5, score="loss_without", reversible=True), {}, "cannot see what masked units"),
        (WeightPruner(sparsity=0.5, score="wanda", include=["*word_embeddings.weight"]), {}, "of Embedding"),
    ],
)
def test_what_a_score_cannot_do_is_said_before_anything_is_touched(pruners, more, message):
    told = PruningSettings(pruners, **{"schedule": ONCE, "data": [draw_batch(build_bert())], **more})
    with pytest.raises(PruningError, match=message):
        Pruning(build_bert(), told, total_steps=60)


def test_input_sensitivity_says_what_has_no_embeddings():
    with pytest.raises(PruningError, match="get_input_embeddings.*Received: Sum"):
        prune(Sum(), NeuronPruner(sparsity=0.4, score="input_sensitivity"), data=[{"x": torch.ones(1, 1)}])
