"""Steps that are not taken count for nothing, and the moments of every optimizer follow what is pruned."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from models import build_bert, build_llama, draw_batch, draw_rows, training_arguments

from hf_prune import HeadPruner, NeuronPruner, Pruning, PruningCallback, PruningError, Schedule, Target, WeightPruner
from hf_prune import prune as prune_once
from hf_prune.optimizers import check_state, cut_moments, moments_along

UNITS = [HeadPruner(), NeuronPruner()]
RAMP = Schedule(begin=10, end=120, frequency=10)


def train_scaled(
    pruners,
    target=None,
    *,
    overflow=(),
    steps=200,
    schedule=RAMP,
    fused=False,
    clip=True,
    skip=(),
    stop=None,
    scale=2.0**10,
):
    """Train in float16 with a GradScaler; `overflow` steps get an infinite gradient, `skip` ones are left out."""
    model = build_bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    total = steps - len(skip)
    pruning = Pruning(model, pruners, schedule, target=target, total_steps=total, optimizer=optimizer)
    for step in (step for step in range(stop or steps) if step not in skip):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**draw_batch(model, seed=step)).loss
        scaler.scale(loss * (math.inf if step in overflow else 1)).backward()
        if clip:
            scaler.unscale_(optimizer)
        pruning.after_backward()
        scaler.step(optimizer)
        scaler.update()
        pruning.step()
        optimizer.zero_grad()
    return pruning


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_masks_are_those_of_a_run_without_the_steps_that_overflow(fused, clip):
    every = range(5, 200, 20)
    skipping = train_scaled(UNITS, Target(macs=0.5), overflow=every, fused=fused, clip=clip)
    without = train_scaled(UNITS, Target(macs=0.5), skip=every, fused=fused, clip=clip)
    assert [(one.clock.steps, one.clock.skipped) for one in (skipping, without)] == [(190, 10), (190, 0)]
    assert skipping.macs_left() <= 0.5
    assert skipping.finish().kept == without.finish().kept


# an overflow halves the scale, and float16 then rounds otherwise: without any, scales of 2^10 and 2^6 agree in 0.90 too
@pytest.mark.parametrize(("score", "agreement"), [("taylor", 0.85), ("movement", 0.99)])
def test_masks_of_weights_are_those_of_a_run_without_the_steps_that_overflow(score, agreement):
    every, schedule = range(4, 60, 10), Schedule(begin=5, end=40, frequency=5)
    pruner = WeightPruner(sparsity=0.5, score=score)
    skipping = train_scaled(pruner, overflow=every, steps=60, schedule=schedule, clip=False)
    without = train_scaled(pruner, skip=every, steps=60, schedule=schedule, clip=False)
    same = torch.cat([(mask == without.masks[name]).flatten() for name, mask in skipping.masks.items()])
    assert same.float().mean() > agreement
    assert skipping.logs()["sparsity_weight"] == pytest.approx(0.5, abs=1e-3)


def test_a_schedule_that_ends_with_the_run_reaches_its_target_although_steps_were_left_out():
    whole = Schedule(begin=0.0, end=1.0, frequency=10)
    pruning = train_scaled(UNITS, Target(macs=0.5), overflow=(3, 19, 39), steps=40, schedule=whole)
    assert pruning.finished
    assert pruning.macs_left() <= 0.5
    assert pruning.clock.steps + pruning.clock.skipped == 40


def test_a_state_that_was_saved_after_an_overflow_is_finite_and_tells_both_counts():
    pruning = train_scaled(UNITS, Target(macs=0.5), overflow=(7,), stop=8)
    state = pruning.state_dict()
    assert (state["clock"]["steps"], state["clock"]["skipped"]) == (7, 1)
    assert all(mean.isfinite().all() for mean in state["evidence.gate"]["means"]["gate_square"].values())
    again = Pruning(build_bert(), UNITS, RAMP, target=Target(macs=0.5), total_steps=200)
    again.load_state_dict(state)
    assert (again.clock.steps, again.clock.skipped) == (7, 1)


def test_gates_are_those_of_a_loss_that_was_not_scaled():
    plain = train_scaled(UNITS, Target(macs=0.5), stop=3)
    scaled = build_bert().train()
    optimizer = torch.optim.AdamW(scaled.parameters(), lr=1e-3)
    pruning = Pruning(scaled, UNITS, RAMP, target=Target(macs=0.5), total_steps=200, optimizer=optimizer)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            scaled(**draw_batch(scaled, seed=step)).loss.backward()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()
    for name, mean in plain.evidence["gate"].means["gate_square"].items():
        torch.testing.assert_close(mean, pruning.evidence["gate"].means["gate_square"][name], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("hand_over", [True, False])
def test_steps_are_counted_when_accelerate_has_summed_up_all_gradients(hand_over):
    from accelerate import Accelerator

    def run(rows, accumulate):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = build_bert().train()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        pruning = Pruning(
            model,
            UNITS,
            Schedule(begin=1, end=6, frequency=1),
            target=Target(macs=0.5),
            total_steps=8,
            optimizer=optimizer if hand_over else None,
            accelerator=accelerator,
        )
        changes = []
        for step in range(8):
            batch = draw_batch(pruning.model, rows=8, seed=step)
            for part in range(0, 8, rows):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**{key: value[part : part + rows] for key, value in batch.items()}).loss)
                    pruning.after_backward()
                    optimizer.step()
                    changes.append(pruning.step())
                    optimizer.zero_grad()
        return pruning, changes

    whole, _ = run(8, 1)
    parts, changes = run(2, 4)
    assert (whole.steps, parts.steps, parts.clock.skipped) == (8, 8, 0)
    assert sum(changes) == 6
    assert parts.finish().kept == whole.finish().kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_half_precision_model_keeps_what_a_float32_model_keeps(dtype, scale):
    def kept(as_type):
        model = build_llama(num_hidden_layers=3, intermediate_size=64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.4)
            model.lm_head.weight.mul_(scale)
        batches = [draw_batch(model, rows=8, seed=seed) for seed in range(2)]
        report = prune_once(model.to(as_type), UNITS, target=Target(macs=0.5), data=batches)
        assert {one.dtype for one in model.parameters()} == {as_type}
        return {(name, unit) for name, units in report.kept.items() for unit in units}

    full, half = kept(torch.float32), kept(dtype)
    assert len(full & half) > 0.9 * len(full)


def test_calibration_in_float16_leaves_gradients_and_modes_as_they_were():
    model = build_llama().half().train()
    model.model.layers[0].eval()
    held = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    prune_once(model, WeightPruner(sparsity=0.3), data=[draw_batch(model)])
    assert model.lm_head.weight.grad is held
    assert model.training
    assert not model.model.layers[0].mlp.training


def step_once(optimizer, parameter):
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_rows_and_columns_of_adafactor_follow_their_units(kind, square):
    shape = (6, 6) if square else (6, 4)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    made = transformers.Adafactor if kind == "transformers" else torch.optim.Adafactor
    optimizer = made([parameter], lr=1e-2, **({"relative_step": False} if kind == "transformers" else {}))
    step_once(optimizer, parameter)
    names = ("exp_avg_sq_row", "exp_avg_sq_col") if kind == "transformers" else ("row_var", "col_var")
    rows, columns = (optimizer.state[parameter][name].clone() for name in names)
    check_state(optimizer)
    keep = torch.tensor([0, 2, 5])
    assert [axis for _, axis in moments_along(optimizer, parameter, 0)] == [0]
    cut_moments(optimizer, parameter, 0, keep, torch.index_select)
    parameter.data = parameter.data[keep]
    assert torch.equal(optimizer.state[parameter][names[0]], rows[keep])
    assert torch.equal(optimizer.state[parameter][names[1]], columns)
    keep = torch.tensor([1, 3])
    cut_moments(optimizer, parameter, 1, keep, torch.index_select)
    assert torch.equal(optimizer.state[parameter][names[1]], columns[..., keep])
    parameter.data = parameter.data[:, keep]
    step_once(optimizer, parameter)
    assert parameter.isfinite().all()


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"])
def test_units_leave_in_training_under_every_optimizer(optim, tmp_path):
    losses = []
    for live in (False, True):
        torch.manual_seed(0)
        model = build_bert(intermediate_size=64)
        callback = PruningCallback(
            UNITS, Schedule(begin=2, end=6, frequency=2), target=Target(macs=0.5), shrink_during_training=live
        )
        trainer = transformers.Trainer(
            model, training_arguments(tmp_path, optim=optim, max_steps=8), train_dataset=draw_rows(model, 24)
        )
        callback.attach(trainer).train()
        assert callback.pruning.macs_left() <= 0.5
        assert all(one.isfinite().all() for one in model.parameters())
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    # Adafactor's steps follow from the size of whole tensors
    assert max(abs(a - b) for a, b in zip(*losses)) < (0.3 if optim == "adafactor" else 1e-3)


def test_zeros_stay_where_a_schedule_free_optimizer_swaps_weights(tmp_path):
    model, seen = build_bert(intermediate_size=64), []
    callback = PruningCallback(WeightPruner(sparsity=0.5), Schedule(begin=1, end=5, frequency=1))

    class Look(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            named = dict(model.named_parameters())
            masks = callback.pruning.masks.items()
            seen.append(sum(int((named[name][~mask] != 0).sum()) for name, mask in masks))

    arguments = training_arguments(
        tmp_path,
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
    )
    rows = draw_rows(model, 24)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[Look()])
    callback.attach(trainer).train()
    assert callback.report.settings["sparsity_weight"] == pytest.approx(0.5, abs=1e-3)
    assert seen == [0] * 8


def test_masks_that_come_back_are_refused_under_a_schedule_free_optimizer():
    import schedulefree

    model = build_bert()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    with pytest.raises(PruningError, match=r"schedule-free .* Received: WeightPruner with score='movement'"):
        Pruning(model, WeightPruner(sparsity=0.5, score="movement"), total_steps=10, optimizer=optimizer)


class Packed(torch.optim.SGD):
    """Keeps its moments as other optimizers do that pack or project them."""

    def __init__(self, parameters, state):
        super().__init__(parameters, lr=0.1)
        self.made = state

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(self.made(parameter))


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda one: {"codes": torch.zeros(one.shape, dtype=torch.uint8)}, "codes of shape"),
        (lambda one: {"projected": torch.zeros(3, 7)}, r"projected of shape \(3, 7\)"),
        (lambda one: {"preconditioners": [torch.eye(2)]}, "preconditioners, a list"),
    ],
)
def test_moments_that_cannot_be_followed_are_refused_in_the_first_step(state, named):
    model = build_bert()
    optimizer = Packed(model.parameters(), state)
    pruning = Pruning(
        model, UNITS, Schedule(begin=1, end=4), target=Target(macs=0.5), total_steps=5, optimizer=optimizer
    )
    model(**draw_batch(model)).loss.backward()
    optimizer.step()
    with pytest.raises(PruningError, match=f"use another optimizer.*Packed with {named}"):
        pruning.step()
    assert all(alive.all() for alive in pruning.alive.values())


def test_lbfgs_is_refused():
    model = build_bert()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    pruning = Pruning(model, UNITS, target=Target(macs=0.5), total_steps=5, optimizer=optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(**draw_batch(model)).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(PruningError, match="LBFGS"):
        pruning.step()


@pytest.mark.parametrize("score", ["taylor", "movement"])
def test_a_closure_that_computes_gradients_inside_a_step_is_as_good(score):
    def run(closure):
        model = build_bert().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        early = Schedule(begin=2, end=6, frequency=1)
        pruning = Pruning(model, [WeightPruner(sparsity=0.5, score=score)], early, total_steps=8, optimizer=optimizer)
        for step in range(8):

            def compute(step=step):
                optimizer.zero_grad()
                loss = model(**draw_batch(model, seed=step)).loss
                loss.backward()
                pruning.after_backward()
                return loss

            optimizer.step(compute) if closure else (compute(), optimizer.step())
            pruning.step()
        return pruning

    plain, inside = run(False), run(True)
    assert inside.finished
    for name, mask in plain.masks.items():
        assert torch.equal(mask, inside.masks[name])
