"""Modules that are not from transformers: hand-declared groups, every type of weight, masks of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build_bert, take_step
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.rnn import pack_sequence

from hf_prune import (
    ChannelPruner,
    Group,
    NeuronPruner,
    Pruning,
    PruningError,
    Schedule,
    Slice,
    Target,
    WeightPruner,
    adopt_torch_masks,
    find_groups,
    mask_units,
    measure,
    prune,
    register_architecture,
    shrink,
)
from hf_prune.architectures import prunable_macs
from hf_prune.evidence import Gates
from hf_prune.live import LiveModel
from hf_prune.report import measure_pair

ONCE = Schedule("oneshot", begin=1, end=1)


class HandCnn(nn.Module):
    """Convolution, batch norm, convolution, flattening of 2 x 2 maps, two Linears."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.hidden, self.head = nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.max_pool2d(self.norm(self.conv1(images)).relu(), 2)
        maps = nn.functional.max_pool2d(self.conv2(maps).relu(), 2)
        return self.head(self.hidden(maps.flatten(1)).relu())


@register_architecture("HandCnn")
def groups_of_hand_cnn(model):
    norm = [Slice(f"norm.{name}", 0, 1) for name in ("weight", "bias", "running_mean", "running_var")]
    first = (Slice("conv1.weight", 0, 1), Slice("conv1.bias", 0, 1), *norm, Slice("conv2.weight", 1, 1))
    second = Slice("conv2.weight", 0, 1), Slice("conv2.bias", 0, 1), Slice("hidden.weight", 1, 4)
    hidden = Slice("hidden.weight", 0, 1), Slice("hidden.bias", 0, 1), Slice("head.weight", 1, 1)
    return [
        Group("conv1.channels", "channel", model.conv1.out_channels, first),
        Group("conv2.channels", "channel", model.conv2.out_channels, second),
        Group("hidden.neurons", "neuron", model.hidden.out_features, hidden),
    ]


class HandRecurrent(nn.Module):
    """Two recurrent layers and a head: an LSTM, GRU or plain RNN that is read by another one."""

    def __init__(self, kind: str, batch_first: bool = True):
        super().__init__()
        cell = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        self.first = cell(3, 6, batch_first=batch_first)
        self.second = cell(6, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Tensor:
        states, _ = self.second(self.first(rows)[0])
        return self.head(states)


@register_architecture("HandRecurrent")
def groups_of_hand_recurrent(model):
    def hidden(name, reader):
        module = model.get_submodule(name)
        units, stacked = module.hidden_size, module.weight_hh_l0.shape[0] // module.hidden_size
        tensors = [f"{name}.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        gates = [Slice(tensor, 0, 1, offset=gate * units) for tensor in tensors for gate in range(stacked)]
        return Group(f"{name}.neurons", "neuron", units, (*gates, Slice(f"{name}.weight_hh_l0", 1, 1), reader))

    return [hidden("first", Slice("second.weight_ih_l0", 1, 1)), hidden("second", Slice("head.weight", 1, 1))]


def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and buffer at random (variances above zero), and switch to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator) * 0.5
            tensor.data.copy_(value.abs() + 0.1 if name.endswith("running_var") else value)
    return model.eval()


BUILD = {
    "cnn": HandCnn,
    "lstm": lambda: HandRecurrent("lstm"),
    "gru": lambda: HandRecurrent("gru"),
    "rnn": lambda: HandRecurrent("rnn"),
}
KEPT = {
    "cnn": {"conv1.channels": [0, 3], "conv2.channels": [1, 2, 5], "hidden.neurons": [4]},
    "lstm": {"first.neurons": [0, 2, 5], "second.neurons": [1]},
    "gru": {"first.neurons": [1, 2, 3, 4], "second.neurons": [0, 3]},
    "rnn": {"first.neurons": [5], "second.neurons": [0, 1, 2]},
}


def inputs_of(name: str, seed: int = 1, samples: int = 3) -> Tensor:
    shape = (samples, 1, 8, 8) if name == "cnn" else (samples, 5, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum over samples, so that each sample's gradient is that of its own loss."""
    return model(batch["x"]).square().sum()


# --- masked = shrunk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
def test_masked_is_shrunk_is_rebuilt(name):
    model, x = draw(BUILD[name]()), inputs_of(name)
    dense = model(x)
    masked, small = mask_units(copy.deepcopy(model), KEPT[name]), shrink(copy.deepcopy(model), KEPT[name])
    assert not torch.allclose(masked(x), dense)
    torch.testing.assert_close(small(x), masked(x))
    assert {group.name: group.units for group in find_groups(small)} == {k: len(v) for k, v in KEPT[name].items()}
    again = shrink(BUILD[name]().eval(), KEPT[name])  # what a stranger does: build, cut, load
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def test_shapes_after_a_cut_can_be_counted_by_hand():
    small = shrink(draw(HandCnn()), KEPT["cnn"])
    assert (small.conv1.out_channels, small.norm.num_features) == (2, 2)
    assert (small.conv2.in_channels, small.conv2.out_channels) == (2, 3)
    assert small.hidden.weight.shape == (1, 3 * 4)  # three maps of 2 x 2
    assert small.head.weight.shape == (3, 1)
    small = shrink(draw(HandRecurrent("lstm")), KEPT["lstm"])
    assert (small.first.input_size, small.first.hidden_size, small.second.input_size) == (3, 3, 3)
    assert small.first.weight_hh_l0.shape == (4 * 3, 3)
    assert small.first._flat_weights[1] is small.first.weight_hh_l0  # what torch's kernel is given


def test_a_unit_of_an_lstm_is_one_row_of_each_gate():
    model = HandRecurrent("lstm")
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    mask_units(model, {"first.neurons": [0, 1, 2, 3, 4]})  # unit 5 of 6 goes: rows 5, 11, 17 and 23
    rows = (model.first.weight_ih_l0 == 0).all(1).nonzero().view(-1)
    assert rows.tolist() == [5, 11, 17, 23]
    assert int((model.first.weight_hh_l0 == 0).sum()) == 4 * 6 + 24 - 4  # four rows, a column, where they cross once
    assert int((model.second.weight_ih_l0 == 0).sum()) == 16


def test_shrinking_composes_in_dense_numbers():
    once, twice = draw(HandCnn()), draw(HandCnn())
    shrink(once, {"conv1.channels": [0, 3]})
    shrink(shrink(twice, {"conv1.channels": [0, 2, 3]}), {"conv1.channels": [0, 3]})
    x = inputs_of("cnn")
    assert torch.equal(once(x), twice(x))
    assert once.pruning_config["kept"] == twice.pruning_config["kept"] == {"conv1.channels": "0,3 of 4"}


def test_a_module_whose_config_is_not_of_transformers_carries_its_own_record():
    model = draw(HandCnn())
    model.config = {"width": 4}
    small = shrink(copy.deepcopy(model), KEPT["cnn"])
    assert small.config == {"width": 4}
    torch.testing.assert_close(small(inputs_of("cnn")), mask_units(model, KEPT["cnn"])(inputs_of("cnn")))


# --- scores ----------------------------------------------------------------------------------------------------------


def gates(model: nn.Module, group: Group, x: Tensor) -> Tensor:
    """Return each sample's gradient to a gate on each unit, by scaling what the reader's weight reads."""
    reader, (part,) = dict(model.named_parameters())[group.read[0].parameter], group.read
    rows = []
    for sample in range(len(x)):
        gate = torch.ones(group.units, requires_grad=True)
        wide = torch.ones(reader.shape[part.dim]).index_put(
            (part.index(torch.arange(group.units), group.units),), gate.repeat_interleave(part.per_unit)
        )
        shape = [-1 if dim == part.dim else 1 for dim in range(reader.ndim)]
        scaled = {part.parameter: reader * wide.view(shape)}
        torch.func.functional_call(model, scaled, (x[sample : sample + 1],)).square().sum().backward()
        rows.append(gate.grad)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["cnn", "lstm", "gru"])
def test_gate_gradients_are_those_of_real_gates(name):
    model, x = draw(BUILD[name]()), inputs_of(name)
    watcher = Gates(LiveModel(model), [group.name for group in find_groups(model)])
    watcher.start()
    squared(model, {"x": x}).backward()
    watcher.stop()
    watcher.commit()
    for group in find_groups(model):
        expected = gates(model, group, x).square().mean(0)
        torch.testing.assert_close(watcher.means["gate_square"][group.name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", ["time first", "packed"])
def test_gate_gradients_are_by_sample_in_every_layout(layout):
    """Sequences with time first, and packed ones, give the scores of the same rows with the batch first."""
    model = draw(HandRecurrent("lstm", batch_first=layout == "packed"))
    plain = HandRecurrent("lstm")
    plain.load_state_dict(model.state_dict())
    x, found = inputs_of("lstm"), []
    for one, given in ((plain, x), (model, pack_sequence([*x]) if layout == "packed" else x.transpose(0, 1))):
        watcher = Gates(LiveModel(one), [find_groups(one)[0].name])
        watcher.start()
        states, _ = one.second(one.first(given)[0])
        (states.data if layout == "packed" and one is model else states).square().sum().backward()
        watcher.stop()
        watcher.commit()
        found.append(watcher.means["gate_square"]["first.neurons"])
    torch.testing.assert_close(found[1], found[0])


# --- gradual pruning -------------------------------------------------------------------------------------------------


def train(model: nn.Module, x: Tensor, steps: int, pruners, **settings) -> tuple[Pruning, object]:
    """Fit random targets while pruning; return what pruned, and its report."""
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = Pruning(model, pruners, Schedule(frequency=2), total_steps=steps, optimizer=optimizer, **settings)
    for _ in range(steps):
        take_step(nn.functional.mse_loss(model(x), target), optimizer, pruning)
    return pruning, pruning.finish(settings.get("shrink_during_training", False))


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_gradual_pruning_live_and_by_zeros_is_the_same(name):
    pruners = [ChannelPruner(), NeuronPruner()] if name == "cnn" else NeuronPruner()
    models = [draw(BUILD[name]()) for _ in range(2)]
    kept = []
    for model, live in zip(models, (False, True)):
        _, report = train(model, inputs_of(name), 20, pruners, target=Target(0.5), shrink_during_training=live)
        kept.append(report.kept)
    assert kept[0] == kept[1]
    assert len(next(iter(models[1].parameters()))) < len(next(iter(models[0].parameters())))
    x = inputs_of(name, seed=9)
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_a_target_is_met_although_a_matrix_lies_between_two_groups(name):
    model = draw(BUILD[name]())
    dense = prunable_macs(model)
    pruners = [ChannelPruner(), NeuronPruner()] if name == "cnn" else NeuronPruner()
    report = prune(model, pruners, target=Target(0.5), data=[{"x": inputs_of(name)}], loss=squared)
    assert report.settings["macs_left"] <= 0.5
    assert prunable_macs(model) <= 0.5 * dense


def test_many_small_changes_do_not_use_up_the_cheap_units():
    """Filters of the second convolution are worth nothing, but cost 56 weights each; a change removes 3 or 4."""
    model = draw(HandCnn())
    model.conv2.weight.data.mul_(1e-3)
    model.conv2.bias.data.mul_(1e-3)
    model.hidden.weight.data[:, :8] = 0  # what the first two filters are read by
    model.hidden.weight.data[:, 8:].add_(5)
    pruners = [ChannelPruner(score="l2"), NeuronPruner(score="l2")]
    pruning = Pruning(model, pruners, Schedule(begin=1, end=40, frequency=1), target=Target(0.7), total_steps=40)
    for _ in range(40):
        pruning.step()
    report = pruning.finish()
    assert report.kept["conv2.channels"] == [2, 3, 4, 5]
    assert len(report.kept["hidden.neurons"]) == 4  # the last one fills the budget


def test_report_of_a_module(tmp_path):
    model, x = draw(HandCnn()), inputs_of("cnn")
    dense = copy.deepcopy(model)
    pruners = [ChannelPruner(sparsity=0.5, score="l2"), NeuronPruner(sparsity=0.4, score="l2")]
    report = prune(model, pruners)
    report.dense, report.pruned = measure_pair(dense, model, {"images": x}, repeats=1)
    assert report.units == {"conv1.channels": 4, "conv2.channels": 6, "hidden.neurons": 5}
    assert "| channels " in report.table()
    assert "50.0% left" in report.table()
    assert report.plot(tmp_path / "kept.png").is_file()
    assert report.pruned.parameters < report.dense.parameters == sum(one.numel() for one in dense.parameters())


def test_macs_of_a_module_can_be_counted_by_hand():
    # 64 pixels x 4 x 9, 16 pixels x 6 x 36, 24 x 5, 5 x 3; two images
    measured = measure(HandCnn(), {"images": inputs_of("cnn", samples=2)}, repeats=1)
    assert measured.macs == 2 * (64 * 4 * 9 + 16 * 6 * 36 + 24 * 5 + 5 * 3)
    # 5 rows, two samples: four gates of 6 from 3 + 6, four of 4 from 6 + 4, 2 from 4
    measured = measure(HandRecurrent("lstm"), {"rows": inputs_of("lstm", samples=2)}, repeats=1)
    assert measured.macs == 10 * (4 * 6 * 9 + 4 * 4 * 10 + 2 * 4)


def test_inputs_of_a_module_cannot_be_made_up():
    with pytest.raises(PruningError, match="pass inputs. Received: HandCnn"):
        measure(HandCnn())


# --- the scope of WeightPruner ---------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One module of every type."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.line, self.image, self.room = nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3)
        self.transposed, self.lstm, self.cell = Conv1D(4, 4), nn.LSTM(4, 4, bidirectional=True), nn.GRUCell(4, 4)
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)


MIXED = [
    "line.weight",
    "image.weight",
    "room.weight",
    "transposed.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "lstm.weight_ih_l0_reverse",
    "lstm.weight_hh_l0_reverse",
    "cell.weight_ih",
    "cell.weight_hh",
    "linear.weight",
]


def test_default_scope_of_a_plain_module_is_everything_but_its_head():
    assert WeightPruner(sparsity=0.5).choose_weights(Mixed()) == MIXED
    assert WeightPruner(sparsity=0.5, exclude=["lstm.*", "cell.*"]).choose_weights(Mixed()) == [
        name for name in MIXED if not name.startswith(("lstm", "cell"))
    ]


def test_default_scope_of_a_sequential_keeps_the_head_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert WeightPruner(sparsity=0.5).choose_weights(model) == ["0.weight", "2.weight"]
    assert WeightPruner(sparsity=0.5).choose_weights(nn.Linear(2, 3)) == ["weight"]


def test_default_scope_of_a_transformer_is_its_numbered_layers():
    chosen = WeightPruner(sparsity=0.5).choose_weights(build_bert())
    assert len(chosen) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in chosen)


def test_default_scope_of_gpt2_is_its_transposed_linears():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, vocab_size=10))
    chosen = WeightPruner(sparsity=0.5).choose_weights(model)
    ends = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert chosen == [f"transformer.h.{layer}.{end}" for layer in range(2) for end in ends]
    tied = WeightPruner(sparsity=0.5, include=["*wte*", "lm_head*"]).choose_weights(model)
    assert tied == ["transformer.wte.weight"]  # one tensor, one mask


def test_an_embedding_is_pruned_only_where_it_is_named():
    assert WeightPruner(sparsity=0.5, include=["table.*"]).choose_weights(Mixed()) == ["table.weight"]
    assert WeightPruner(sparsity=0.5, include=["linear.*"]).choose_weights(Mixed()) == ["linear.weight"]
    with pytest.raises(
        PruningError,
        match=r"finds no weights under include and exclude; there are table.weight.*Received: include=\['tabel'\]",
    ):
        WeightPruner(sparsity=0.5, include=["tabel"]).choose_weights(Mixed())
    with pytest.raises(PruningError, match="there are no Linear, convolution or recurrent module"):
        WeightPruner(sparsity=0.5).choose_weights(nn.LayerNorm(4))


def test_masks_of_an_lstm_act():
    model, x = draw(HandRecurrent("lstm")), inputs_of("lstm")
    dense = model(x)
    prune(model, WeightPruner(sparsity=0.5, score="l1", include=["first.weight_hh_l0"]))
    assert int((model.first.weight_hh_l0 == 0).sum()) == 72  # half of 24 x 6
    reference = HandRecurrent("lstm").eval()
    reference.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), dense)
    assert torch.equal(model(x), reference(x))  # torch's kernel sees the zeros


# --- masks of torch --------------------------------------------------------------------------------------------------


def test_torch_masks_are_taken_over():
    model, x = draw(HandRecurrent("lstm")), inputs_of("lstm")
    torch_prune.l1_unstructured(model.first, "weight_hh_l0", amount=0.25)
    torch_prune.random_unstructured(model.head, "weight", amount=2)
    torch_prune.l1_unstructured(model.head, "weight", amount=3)  # on top: torch keeps both in a container
    parameter, before = model.head.weight_orig, model(x)
    masks = adopt_torch_masks(model)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"first.weight_hh_l0": 36, "head.weight": 5}
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert set(model.state_dict()) == set(HandRecurrent("lstm").state_dict())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.head.weight is parameter  # an optimizer goes on with it
    assert torch.equal(model.head.weight == 0, ~masks["head.weight"])
    assert torch.equal(model(x), before)
    assert adopt_torch_masks(model) == {}


def test_adopted_masks_stay_and_count():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[8.0, 1.0, 7.0, 2.0], [6.0, 3.0, 5.0, 4.0]])
    torch_prune.custom_from_mask(model[0], "weight", torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    masks = adopt_torch_masks(model)
    pruning = Pruning(model, WeightPruner(sparsity=0.5, score="l1"), ONCE, total_steps=1, masks=masks)
    assert pruning.logs()["sparsity_weight"] == 0.125
    model[0].weight.data[0, 0] = 9.0  # an optimizer that knows nothing of masks
    pruning.step()
    assert model[0].weight.tolist() == [[0, 0, 7, 0], [6, 0, 5, 4]]  # 8 was masked; 1, 2 and 3 are the smallest
    assert pruning.finish().settings["sparsity_weight"] == 0.5


def test_adopted_masks_follow_a_cut_and_their_moments_are_zero():
    model = draw(HandCnn())
    torch_prune.l1_unstructured(model.conv2, "weight", amount=0.5)
    masks = adopt_torch_masks(model)
    pruner = ChannelPruner(sparsity=0.5)
    pruning, _ = train(model, inputs_of("cnn"), 20, pruner, masks=masks, shrink_during_training=True)
    (weight, mask), state = (model.conv2.weight, pruning.masks["conv2.weight"]), pruning.live.optimizer.state
    assert mask.shape == weight.shape != (6, 4, 3, 3)
    assert (~mask).any()
    assert not weight[~mask].any()
    units = pruning.live.record["conv2.channels"][0], pruning.live.record["conv1.channels"][0]
    assert torch.equal(mask, masks["conv2.weight"][units[0]][:, units[1]])
    assert state[weight]["exp_avg"].shape == weight.shape


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"hed.weight": torch.ones(3, 5, dtype=torch.bool)}, "Did you mean 'head.weight'.*Received: 'hed.weight'"),
        ({"head.weight": torch.ones(3, 5)}, r"must be boolean.*Received: torch.float32, \(3, 5\)"),
        ({"head.weight": torch.ones(5, 3, dtype=torch.bool)}, r"shape \(3, 5\). Received: torch.bool, \(5, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(PruningError, match=message):
        Pruning(draw(HandCnn()), WeightPruner(sparsity=0.5), total_steps=1, masks=masks)
