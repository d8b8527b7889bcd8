"""Masks that are taken back: last values return, masked units are seen behind shut gates, and nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import assert_same_weights, build_bert, build_llama, draw_batch, draw_rows, take_step, training_arguments
from test_scores import gates_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer

from hf_prune import (
    ChannelPruner,
    CheckpointError,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    WeightPruner,
    find_groups,
    load_pruned,
    prune,
    register_score,
    save_pruned,
)
from hf_prune.packing import pack
from hf_prune.scores import SCORES
from hf_prune.session import recover
from hf_prune.structure import named_tensors

MATRIX = "bert.encoder.layer.0.intermediate.dense.weight"
TWICE = Schedule("linear", begin=2, end=4, frequency=2, initial=0.999)
EARLY = Schedule("cubic", begin=1, end=7, frequency=2)
LONG = Schedule(begin=1, end=19, frequency=2, initial=0.4)
UNITS = [HeadPruner(reversible=True), NeuronPruner(reversible=True)]


@pytest.fixture
def turning():
    """Register a score that prefers the end first and the beginning at the second change, of weights and of units."""
    calls: list[int] = []

    def ramp(like: Tensor) -> Tensor:
        calls.append(1)
        up = torch.arange(like.numel(), dtype=torch.float32).view(like.shape)
        return up if len(calls) == 1 else -up

    register_score("turning", reversible=True)(lambda weight: ramp(weight))
    register_score("turning", of="unit", needs=("noise",), reversible=True)(lambda noise: ramp(noise))
    yield
    del SCORES._entries["turning"]


def start(model: Any, pruners: Any, schedule: Schedule = TWICE, steps: int = 6, **settings: Any) -> Any:
    """Return an optimizer, a session and a function that takes one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    pruning = Pruning(model, pruners, schedule, total_steps=steps, optimizer=optimizer, **settings)

    def step(seed: int) -> None:
        take_step(model(**draw_batch(model, seed=seed)).loss, optimizer, pruning)

    return optimizer, pruning, step


def test_a_weight_comes_back_with_its_last_value_and_without_momentum(turning):
    model = build_bert()
    weight = model.get_parameter(MATRIX)
    optimizer, _, step = start(model, WeightPruner(sparsity=0.5, score="turning", include=[MATRIX]))
    half = weight.numel() // 2
    step(1)
    at_mask: list[Tensor] = []
    keep = optimizer.step
    optimizer.step = lambda: (keep(), at_mask.append(weight.detach().flatten().clone()))[0]
    step(2)
    assert not weight.flatten()[:half].any()
    assert weight.flatten()[half:].all()
    step(3)
    assert not weight.flatten()[:half].any()
    step(4)
    assert torch.equal(weight.flatten()[:half], at_mask[0][:half])
    assert not optimizer.state[weight]["exp_avg"].any()
    assert not weight.flatten()[half:].any()


class Chosen(nn.Module):
    """Movement pruning as its paper has it: a mask of the best scores, whose gradient goes straight through."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.mask = torch.ones_like(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.mask + self.scores - self.scores.detach())


def test_movement_is_that_of_its_paper():
    ours, theirs = build_bert().double(), build_bert().double()
    names = WeightPruner(sparsity=0.6).choose_weights(ours)
    chosen = {name: Chosen(theirs.get_parameter(name).detach()) for name in names}
    for name, one in chosen.items():
        parametrize.register_parametrization(theirs.get_submodule(name.removesuffix(".weight")), "weight", one)
    # scores grow where a gradient step moves their weights outwards
    scores = torch.optim.SGD([one.scores for one in chosen.values()], lr=1.0)
    weights = torch.optim.SGD([p for n, p in theirs.named_parameters() if not n.endswith("scores")], lr=0.05)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    pruning = Pruning(ours, WeightPruner(sparsity=0.6, score="movement"), EARLY, total_steps=8, optimizer=optimizer)
    back = 0
    for step in range(8):
        before = {name: mask.clone() for name, mask in pruning.masks.items()}
        for model in (ours, theirs):
            model(**draw_batch(model, seed=step)).loss.backward()
        pruning.after_backward()
        for one in (optimizer, scores, weights):
            one.step()
        pruning.step()
        if step + 1 in EARLY.change_steps(8):
            flat = torch.cat([one.scores.detach().flatten().float() for one in chosen.values()])
            keep = flat.numel() - round(0.6 * EARLY.fraction(step + 1, 8) * flat.numel())
            threshold = flat.sort(descending=True).values[keep - 1]
            for one in chosen.values():
                one.mask = (one.scores.detach().float() >= threshold).double()
        for name, one in chosen.items():
            if name in pruning.masks:
                assert torch.equal(pruning.masks[name], one.mask.bool()), (step, name)
                back += int((pruning.masks[name] & ~before.get(name, pruning.masks[name])).sum())
            module = theirs.get_submodule(name.removesuffix(".weight"))
            torch.testing.assert_close(ours.get_parameter(name), module.weight)
        for model in (ours, theirs):
            model.zero_grad()
    assert back > 20


def test_gates_of_masked_units_are_those_of_real_gates_and_nothing_else_changes():
    model = build_bert()
    _, pruning, step = start(model, UNITS, steps=20, target=Target(macs=0.5), schedule=LONG)
    step(0)
    masked, full = build_bert(), build_bert()  # without hooks
    for one in (masked, full):
        one.load_state_dict(model.state_dict())
    for name, tensor in named_tensors(full).items():
        tensor.data.copy_(pruning.masking.full(name, tensor))
    batch = draw_batch(model, seed=5)
    shut = {name: gone.clone() for name, gone in pruning.masking.gone(pruning.evidence["gate"].groups).items()}
    assert {name.rpartition(".")[2] for name in shut} == {"heads", "neurons"}
    pruning.evidence["gate"].fade(0.0)
    output = model(**batch)
    output.loss.backward()
    pruning.evidence["gate"].commit()
    assert torch.equal(output.logits, masked(**batch).logits)
    masked(**batch).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5, msg=name)
    groups = {group.name: group for group in find_groups(full)}
    for name, gone in shut.items():
        handles = [shut_in(full, groups[other], shut[other]) for other in shut if other != name]
        expected = gates_of(full, groups[name], batch, at=~gone)
        assert expected[:, gone].abs().min() > 0
        torch.testing.assert_close(pruning.evidence["gate"].means["gate"][name], expected.mean(0), rtol=1e-3, atol=1e-6)
        for handle in handles:
            handle.remove()


def shut_in(model: Any, group: Any, gone: Tensor) -> Any:
    """Multiply what masked units hand on by zero."""

    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * (~gone).float().repeat_interleave(args[0].shape[-1] // group.units), *args[1:])

    module = model.get_submodule(group.read[-1].parameter.rpartition(".")[0])
    return module.register_forward_pre_hook(multiply)


@pytest.mark.parametrize("build", [build_bert, build_llama])
def test_units_come_back_and_the_last_choice_is_what_is_removed(turning, build):
    model = build()
    name = "layers.0.mlp.neurons"
    pruner = NeuronPruner(sparsity=0.5, score="turning", include=[name])
    _, pruning, step = start(model, pruner)
    group = next(group for group in pruning.groups if group.name == name)
    tensors = named_tensors(model)
    for seed in (1, 2):
        step(seed)
    first = pruning.alive[name].clone()
    values = {part: pruning.masking.full(part.parameter, tensors[part.parameter]).clone() for part in group.slices}
    for seed in (3, 4):
        step(seed)
    assert torch.equal(pruning.alive[name], ~first)
    for part, value in values.items():
        index = part.index((~first).nonzero().view(-1), group.per_part)
        live = tensors[part.parameter].detach().index_select(part.dim, index)
        assert torch.equal(live, value.index_select(part.dim, index))
        assert live.any()
    report = pruning.finish()
    assert report.kept[name] == (~first).nonzero().view(-1).tolist()


def test_kv_groups_come_back_with_the_heads_inside(turning):
    model = build_llama()
    _, pruning, step = start(model, HeadPruner(sparsity=0.5, score="turning"))
    step(1), step(2)
    first = {name: mask.clone() for name, mask in pruning.alive.items()}
    step(3), step(4)
    changed = [name for name, mask in pruning.alive.items() if not torch.equal(mask, first[name])]
    assert changed == ["layers.0.attention.kv_groups", "layers.0.attention.heads"]
    kv_groups, heads = (pruning.alive[name] for name in changed)
    assert torch.equal(heads.view(len(kv_groups), -1).all(1), kv_groups)
    read = model.model.layers[0].self_attn.o_proj.weight
    assert read.view(len(read), len(kv_groups), -1).any(-1).all(0).tolist() == kv_groups.tolist()


def test_what_others_masked_stays_masked(turning):
    model = build_bert()
    final = NeuronPruner(sparsity=0.5, include=["layers.0.*"], score="l2")
    pruners = [final, NeuronPruner(sparsity=0.5, include=["layers.1.*"], score="turning")]
    _, pruning, step = start(model, pruners)
    step(1), step(2)
    first = {name: mask.clone() for name, mask in pruning.alive.items()}
    step(3), step(4)
    assert torch.equal(pruning.alive["layers.0.mlp.neurons"], first["layers.0.mlp.neurons"])
    assert torch.equal(pruning.alive["layers.1.mlp.neurons"], ~first["layers.1.mlp.neurons"])


def test_masks_that_were_given_stay(turning):
    model = build_bert()
    given = torch.ones_like(model.get_parameter(MATRIX), dtype=torch.bool)
    given.view(-1)[-9:] = False
    pruner = WeightPruner(sparsity=0.5, score="turning", include=[MATRIX])
    _, pruning, step = start(model, pruner, masks={MATRIX: given})
    for seed in range(4):
        step(seed)
        assert not pruning.masks.get(MATRIX, given)[~given].any()
        assert not model.get_parameter(MATRIX)[~given].any()


@pytest.mark.parametrize(
    "pruners",
    [
        lambda: WeightPruner(sparsity=0.5, score="movement"),
        lambda: WeightPruner(sparsity=0.5, score="movement", reversible=False),
        lambda: [*UNITS, WeightPruner(sparsity=0.5, score="l1", reversible=True)],
        lambda: [HeadPruner(score="movement"), NeuronPruner()],
    ],
)
def test_a_restored_session_goes_on_bitwise(pruners):
    def begin(seed: int) -> Any:
        model, made = build_bert(seed=seed), pruners()
        target = None if isinstance(made, WeightPruner) else Target(macs=0.4)
        return model, *start(model, made, EARLY, steps=8, target=target)

    model, optimizer, pruning, step = begin(0)
    for seed in range(4):
        step(seed)
    weights, moments = (copy.deepcopy(one.state_dict()) for one in (model, optimizer))
    state = pruning.state_dict()  # a copy already: this session goes on first
    for seed in range(4, 8):
        step(seed)
    resumed, other, session, again = begin(1)
    resumed.load_state_dict(weights)
    other.load_state_dict(moments)
    session.load_state_dict(state)
    for seed in range(4, 8):
        again(seed)
    for (name, mine), theirs in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert pruning.logs() == session.logs()
    assert pruning.finish().kept == session.finish().kept


def test_memory_is_told_by_hand_and_given_back():
    model = build_bert()
    _, pruning, step = start(model, WeightPruner(sparsity=0.5, score="movement"), EARLY, steps=8)
    total = sum(mask.numel() for mask in (named_tensors(model)[n] for n in next(iter(pruning.tasks)).weights))
    step(0)
    assert pruning.logs()["reversible_mb"] == round(4 * total / 1e6, 3)
    for seed in range(1, 5):
        step(seed)
    masked = round(0.5 * EARLY.fraction(5, 8) * total)
    assert pruning.masking.nbytes == 4 * masked
    assert pruning.logs()["reversible_mb"] == round(4 * (total + masked) / 1e6, 3)
    for seed in range(5, 8):
        step(seed)
    assert not pruning.masking.nbytes
    assert not pruning.evidence["movement"].sums
    assert pruning.finish().settings["reversible_mb"] == round(4 * (total + round(0.5 * total)) / 1e6, 3)


def test_irreversible_masks_cost_nothing_and_are_not_mentioned():
    _, pruning, step = start(build_bert(), WeightPruner(sparsity=0.5, score="l1"), EARLY, steps=8)
    for seed in range(8):
        step(seed)
    assert "reversible_mb" not in pruning.logs()
    assert not pruning.masking.nbytes


def test_calibration_data_see_masked_units_too():
    model = build_bert()
    data = [draw_batch(model, seed=seed) for seed in (7, 8)]
    _, pruning, step = start(model, UNITS, EARLY, steps=8, target=Target(macs=0.5), data=data)
    for seed in range(4):
        step(seed)
    gone = {name: shut.clone() for name, shut in pruning.masking.gone(pruning.evidence["gate"].groups).items()}
    assert sum(int(one.sum()) for one in gone.values()) > 3
    step(4)  # a change
    seen = [pruning.evidence["gate"].means["gate_square"][name][one] for name, one in gone.items()]
    assert all((one > 0).all() for one in seen)
    assert not pruning.masking.shown


def zeros_of(state: Any) -> int:
    return sum(int((one == 0).sum()) for one in state.values())


def test_checkpoints_and_evaluations_never_see_what_is_masked(tmp_path):
    model = build_bert()
    callback = PruningCallback(UNITS, EARLY, target=Target(macs=0.5))
    arguments = training_arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=1)
    trainer = Trainer(model, arguments, train_dataset=draw_rows(model, 24))
    callback.attach(trainer).train()
    from safetensors.torch import load_file

    zeros = [zeros_of(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")) for step in range(1, 9)]
    assert zeros[0] == 0 < zeros[2] == zeros[3] < zeros[4] == zeros[5] < zeros[6] == zeros[7]  # changes: 1, 3, 5, 7
    save_pruned(trainer.model, tmp_path / "final")
    assert load_pruned(tmp_path / "final").num_parameters() == callback.report.pruned.parameters


@pytest.mark.parametrize("pruners", [UNITS, WeightPruner(sparsity=0.5, score="movement")], ids=["units", "weights"])
def test_a_trainer_resumes_bit_for_bit(pruners, tmp_path):
    def run(**resume: Any) -> Any:
        model = build_bert()
        callback = PruningCallback(pruners, EARLY, target=Target(macs=0.5) if pruners is UNITS else None)
        arguments = training_arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
        trainer = callback.attach(Trainer(model, arguments, train_dataset=draw_rows(model, 24)))
        trainer.train(**resume)
        return trainer.model, trainer.state.log_history[-2]["reversible_mb"]

    whole, resumed = run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(whole[0], resumed[0])
    assert whole[1] == resumed[1] > 0


def test_a_model_saved_between_forward_and_backward_is_masked():
    model = build_bert()
    _, pruning, step = start(model, UNITS, steps=20, target=Target(macs=0.5), schedule=LONG)
    step(0)
    expected = zeros_of(model.state_dict())
    model(**draw_batch(model))
    assert pruning.masking.shown
    assert zeros_of(model.state_dict()) == expected
    pruning.close()
    model(**draw_batch(model))
    assert zeros_of(model.state_dict()) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.1},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
)
def test_trainers_features_see_the_same_gates(changes, tmp_path):
    torch._dynamo.reset()

    def run(folder: Any, **settings: Any) -> PruningCallback:
        model = build_bert()
        arguments = training_arguments(folder, **{"max_steps": 8, "max_grad_norm": 0.1, **settings})
        callback = PruningCallback(UNITS, EARLY, target=Target(macs=0.5))
        callback.attach(Trainer(model, arguments, train_dataset=draw_rows(model, 24))).train()
        return callback

    plain, other = run(tmp_path / "plain"), run(tmp_path / "other", **changes)
    assert other.report.kept == plain.report.kept
    torch._dynamo.reset()


def test_movement_without_a_gradient_says_what_to_call():
    pruning = Pruning(build_bert(), WeightPruner(sparsity=0.5, score="movement"), TWICE, total_steps=6)
    pruning.step()
    with pytest.raises(PruningError, match=r"'movement' needs the gradient of 'bert.*call after_backward\(\)"):
        pruning.step()


def test_movement_at_once_with_data():
    model = build_bert()
    twin, data = copy.deepcopy(model), [draw_batch(model, seed=seed) for seed in (1, 2)]
    prune(model, WeightPruner(sparsity=0.5, score="movement", include=[MATRIX]), data=data)
    for batch in data:
        twin(**batch).loss.backward()
    weight = twin.get_parameter(MATRIX)
    moved = (-weight * weight.grad).flatten()
    assert torch.equal(model.get_parameter(MATRIX).flatten() != 0, moved >= moved.median().nextafter(torch.tensor(9.0)))


def lose_state(steps: int) -> tuple[Pruning, Pruning]:
    """Return a session after so many steps, and a fresh one of a copy of its model."""
    model, pruner = build_bert(), WeightPruner(sparsity=0.5, score="l1", reversible=True)
    _, pruning, step = start(model, pruner, EARLY, steps=8)
    for seed in range(steps):
        step(seed)
    return pruning, Pruning(copy.deepcopy(model), pruner, EARLY, total_steps=8)


def test_a_lost_state_is_refused_while_values_are_needed():
    _, fresh = lose_state(4)
    with pytest.raises(CheckpointError, match="values of masked weights are lost, and changes are due until step 7"):
        recover(fresh, 4)


def test_a_lost_state_is_recovered_once_nothing_changes():
    pruning, fresh = lose_state(8)
    recover(fresh, 8)
    assert pruning.masks
    assert all(torch.equal(fresh.masks[name], mask) for name, mask in pruning.masks.items())


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_a_lost_state_of_units_and_weights_is_recovered(steps):
    """Zeros of masked units are not those of single weights: both go on alike."""
    pruners = [sort(sparsity=0.5, score="l1") for sort in (HeadPruner, NeuronPruner, WeightPruner)]
    model = build_bert()
    _, pruning, step = start(model, pruners, EARLY, steps=8)
    for seed in range(steps):
        step(seed)
    twin = copy.deepcopy(model)
    _, again, step_again = start(twin, pruners, EARLY, steps=8)
    recover(again, steps)
    assert again.logs() == pruning.logs()
    for seed in range(steps, 8):
        step(seed)
        step_again(seed)
    zeros = [sum(int((one == 0).sum()) for one in named_tensors(of).values()) for of in (model, twin)]
    assert zeros[0] == zeros[1] > 0
    assert again.logs() == pruning.logs()


@pytest.mark.parametrize(
    ("pruners", "settings", "message"),
    [
        (
            UNITS,
            {"target": Target(macs=0.5), "shrink_during_training": True},
            "removes for good.*HeadPruner with score='taylor'",
        ),
        (
            WeightPruner(sparsity=0.5, score="movement"),
            {"shrink_during_training": True},
            "WeightPruner with score='movement'",
        ),
        (LayerPruner(sparsity=0.5, reversible=True), {}, "Only heads, KV groups and neurons.*layers"),
        (
            [WeightPruner(sparsity=0.5, score="movement"), WeightPruner(sparsity=0.2, include=["*dense*"])],
            {},
            "must choose from 'bert.* alone. Received: two pruners",
        ),
    ],
)
def test_what_cannot_come_back_is_refused(pruners, settings, message):
    model = build_llama() if isinstance(pruners, LayerPruner) else build_bert()
    with pytest.raises(PruningError, match=message):
        Pruning(model, pruners, total_steps=8, **settings)


def test_reversible_units_need_a_score_that_sees_them():
    register_score("steep", needs=("gradient",))(lambda weight, gradient: gradient.abs())
    register_score("moved", needs=("movement",))(lambda weight, movement: movement)
    try:
        with pytest.raises(
            PruningError, match="'steep' needs gradients of weights, and those of a masked unit are zero"
        ):
            Pruning(build_bert(), NeuronPruner(sparsity=0.5, score="steep", reversible=True), total_steps=8)
        with pytest.raises(PruningError, match="'moved' follows single weights: use WeightPruner"):
            Pruning(build_bert(), NeuronPruner(sparsity=0.5, score="moved"), total_steps=8)
    finally:
        del SCORES._entries["steep"], SCORES._entries["moved"]


def test_channels_and_adapters_are_refused():
    peft = pytest.importorskip("peft")
    from test_convolution import TINY, build

    with pytest.raises(PruningError, match="Received: a reversible ChannelPruner"):
        Pruning(build("ResNet", **TINY)[0], ChannelPruner(sparsity=0.5, reversible=True), total_steps=8)
    model = peft.get_peft_model(build_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(PruningError, match="adapters cannot come back"):
        Pruning(model, NeuronPruner(sparsity=0.5, reversible=True), total_steps=8)


BROKEN = {
    "record": lambda state: state["live"]["record"].update({"layers.0.attention.heads": ([0], 4, 1)}),
    "masks": lambda state: state["masking"]["weights"].update({MATRIX: torch.zeros(3, dtype=torch.bool)}),
    "values": lambda state: state["masking"]["shadows"].update({MATRIX: torch.zeros(3)}),
    "leaks": lambda state: state["masking"].update(leaking="x"),
    "sums": lambda state: state["evidence.movement"]["sums"].update({MATRIX: torch.zeros(3)}),
    "means": lambda state: state["evidence.gate"]["means"].pop("gate"),
    "guards": lambda state: state["guards"].pop("good"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(broken):
    pruners = [*(replace(one, sparsity=0.5) for one in UNITS), WeightPruner(sparsity=0.3, score="movement")]
    _, pruning, step = start(build_bert(), pruners, EARLY, steps=8)
    for seed in range(5):
        step(seed)
    state = copy.deepcopy(pruning.state_dict())
    BROKEN[broken](state)
    model = build_bert(seed=1)
    _, other, _ = start(model, pruners, EARLY, steps=8)
    before = copy.deepcopy((pack(other.state_dict()), model.state_dict(), model.config.to_dict()))
    with pytest.raises(PruningError):
        other.load_state_dict(state)
    (plain, tensors), weights, config = before
    now, mine = pack(other.state_dict())
    assert now == plain
    assert all(torch.equal(one, mine[name]) for name, one in tensors.items())
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in weights.items())
    assert model.config.to_dict() == config


def test_a_run_that_ends_early_has_a_state_when_it_was_shrunk():
    """What was removed cannot come back: its values are not kept any longer."""
    model = build_bert()
    _, pruning, step = start(model, [HeadPruner(0.5, reversible=True), NeuronPruner(0.5, reversible=True)], LONG, 20)
    for seed in range(4):
        step(seed)
    assert pruning.state_dict()["masking"]["shadows"]
    pruning.finish()
    assert not pruning.state_dict()["masking"]["shadows"]
