"""`PruningCallback` in a real Trainer: targets, logs, checkpoints, and a resume that changes no bit."""

from __future__ import annotations

import copy
import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BUILD,
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    training_arguments,
    units_of,
)
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_prune import (
    CheckpointError,
    HeadPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    WeightPruner,
    find_groups,
    load_pruned,
    save_pruned,
    shrink,
)
from hf_prune.architectures import prunable_macs
from hf_prune.packing import pack
from hf_prune.resume import STATE, read_state, write_state

BOTH = [HeadPruner(), NeuronPruner()]
EARLY = Schedule("cubic", begin=1, end=9, frequency=2)


def make_callback(pruners: Any = BOTH, schedule: Schedule = EARLY, **settings: Any) -> PruningCallback:
    structured = not isinstance(pruners, WeightPruner) and pruners is BOTH
    return PruningCallback(pruners, schedule, **{"target": Target(macs=0.5) if structured else None, **settings})


def make_trainer(folder: Path, callback: PruningCallback, model: Any = None, **changes: Any) -> Trainer:
    model = build_bert() if model is None else model
    trainer = Trainer(
        model,
        training_arguments(folder, **changes),
        train_dataset=draw_rows(model, 24),
        eval_dataset=draw_rows(model, 8, seed=1),
        callbacks=[callback],
    )
    return callback.attach(trainer)


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_target_is_reached_and_the_model_is_plain(name, tmp_path):
    dense = BUILD[name]()
    trainer = make_trainer(tmp_path, callback := make_callback(), BUILD[name]())
    trainer.train()
    assert 0.4 < prunable_macs(trainer.model) / prunable_macs(dense) <= 0.5
    assert {name for name, _ in trainer.model.named_parameters()} == {name for name, _ in dense.named_parameters()}
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    assert {name: len(units) for name, units in callback.report.kept.items()} == units_of(trainer.model)
    assert callback.report.pruned.parameters < callback.report.dense.parameters
    save_pruned(trainer.model, tmp_path / "final")
    assert_same_outputs(trainer.model, load_pruned(tmp_path / "final", dtype=torch.float32))


class Tracker(TrainerCallback):
    """What a tracker sees."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_logs_reach_history_and_trackers(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback, tracker = make_callback(), Tracker()
    model = build_bert()
    arguments = training_arguments(tmp_path, report_to="tensorboard")
    trainer = Trainer(model, arguments, train_dataset=draw_rows(model, 24), callbacks=[tracker])
    callback.attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(tracker.seen) - 1 == 12
    keys = ("sparsity_head", "sparsity_neuron", "macs_left")
    assert [[entry[key] for key in keys] for entry in history] == [
        [entry[key] for key in keys] for entry in tracker.seen if "loss" in entry
    ]
    assert history[0]["macs_left"] == 1
    assert 0.4 < history[-1]["macs_left"] <= 0.5
    (file,) = tmp_path.rglob("events.out.*")
    events = EventAccumulator(str(file)).Reload()
    written = [event.value for event in events.Scalars("train/macs_left")]
    assert written == pytest.approx([entry["macs_left"] for entry in history])
    rows = logged_rows(tmp_path)
    assert [int(row["step"]) for row in rows] == [entry["step"] for entry in history]
    for key in ("loss", "sparsity", *keys):
        assert [float(row[key]) for row in rows] == [entry[key] for entry in history]


def logged_rows(folder: Any) -> list[dict[str, str]]:
    """Return the table that a run has written."""
    with (folder / "pruning_log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_attached_twice_is_there_once(tmp_path):
    callback = make_callback()
    trainer = callback.attach(make_trainer(tmp_path, callback))
    assert [one for one in trainer.callback_handler.callbacks if one is callback] == [callback]
    assert trainer.callback_handler.callbacks[0] is callback


RESUMES = {
    "masks": (build_bert, {}),
    "live": (build_bert, {"shrink_during_training": True}),
    "llama live": (build_llama, {"shrink_during_training": True}),
    "query heads live": (
        build_llama,
        {
            "shrink_during_training": True,
            "pruners": [HeadPruner(sparsity=0.5, unit="head"), HeadPruner(sparsity=0.25, unit="kv_group")],
        },
    ),
    "weights": (build_bert, {"pruners": WeightPruner(sparsity=0.5)}),
    "leaky": (lambda **k: build_bert(hidden_act="sigmoid", **k), {"pruners": NeuronPruner(sparsity=0.5)}),
    "random": (build_bert, {"pruners": HeadPruner(sparsity=0.5, score="random")}),
}


@pytest.mark.parametrize("case", RESUMES)
def test_resume_in_mid_schedule_changes_no_bit(case, tmp_path):
    build, settings = RESUMES[case]
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path, first := make_callback(**settings), build(), **saving)
    whole.train()
    table = logged_rows(tmp_path)
    resumed = make_trainer(tmp_path, second := make_callback(**settings), build(seed=1), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.report.kept == first.report.kept
    assert second.report.to_dict() == first.report.to_dict()
    assert_same_weights(whole.model, resumed.model)
    assert getattr(whole.model.config, "pruning_config", None) == getattr(resumed.model.config, "pruning_config", None)
    for name, mask in first.pruning.masks.items():
        assert torch.equal(mask, second.pruning.masks[name])
    assert [int(row["step"]) for row in table] == [*range(1, 13)]
    assert logged_rows(tmp_path) == table, "no row twice, none lost"


def test_checkpoints_of_a_resumed_run_load(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, make_callback(shrink_during_training=True), **saving, max_steps=12).train()
    resumed = make_trainer(tmp_path, make_callback(shrink_during_training=True), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for step in (7, 8, 12):
        model = load_pruned(tmp_path / f"checkpoint-{step}", dtype=torch.float32)
        assert prunable_macs(model) < prunable_macs(build_bert())


def test_resume_at_the_last_checkpoint_by_true(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path, make_callback(), **saving)
    whole.train()
    for folder in ("checkpoint-12", "checkpoint-10"):
        assert (tmp_path / folder / STATE).is_file() or folder == "checkpoint-12"
    resumed = make_trainer(tmp_path, make_callback(), build_bert(seed=1), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, resumed.model)


def test_resume_from_another_folder_by_arguments(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "one", make_callback(), **saving)
    whole.train()
    given = str(tmp_path / "one" / "checkpoint-4")
    resumed = make_trainer(tmp_path / "two", make_callback(), build_bert(seed=1), resume_from_checkpoint=given)
    resumed.train(resume_from_checkpoint=given)
    assert_same_weights(whole.model, resumed.model)


def test_resume_without_pruning_state_says_what_is_missing(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    model = build_bert()
    Trainer(model, training_arguments(tmp_path, **saving), train_dataset=draw_rows(model, 24)).train()
    trainer = make_trainer(tmp_path, make_callback())
    with pytest.raises(
        CheckpointError, match=f"Resuming needs {STATE} in .*checkpoint-4: .* is missing.*running means"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_damaged_state_is_a_checkpoint_error(tmp_path):
    path = tmp_path / STATE
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(path)


def test_state_goes_to_a_file_and_back(tmp_path):
    model = build_bert()
    pruning = Pruning(model, [*BOTH, WeightPruner(sparsity=0.5, score="l1")], target=Target(macs=0.5), total_steps=10)
    model(**draw_batch(model)).loss.backward()
    pruning.after_backward()
    pruning.step()
    state = pruning.state_dict()
    write_state(state, tmp_path / STATE)
    read = read_state(tmp_path / STATE)
    assert pack(read)[0] == pack(state)[0]
    written, back = (pack(one)[1] for one in (state, read))
    assert written.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in written.items())
    assert read["clock"] == {"steps": 1, "skipped": 0, "position": 1}
    assert (read["masking"]["leaking"], read["masking"]["unchecked"]) == ([], True)
    assert not list(tmp_path.glob("*.partial"))


def test_two_runs_with_one_callback(tmp_path):
    callback = make_callback(NeuronPruner(sparsity=0.5))
    model = build_bert()
    make_trainer(tmp_path / "one", callback, model).train()
    first = callback.report
    make_trainer(tmp_path / "two", callback, model).train()
    assert callback.report.kept == first.kept  # half of the dense model's neurons are gone already
    assert callback.report.settings["sparsity_neuron"] == 0.5
    other = build_bert(seed=2)
    make_trainer(tmp_path / "three", callback, other).train()
    assert sum(group.units for group in find_groups(other, kinds=["neuron"])) == 24


def test_training_twice_in_one_trainer(tmp_path):
    trainer = make_trainer(tmp_path, callback := make_callback(NeuronPruner(sparsity=0.5)))
    trainer.train()
    trainer.train()
    assert sum(len(units) for name, units in callback.report.kept.items() if name.endswith("neurons")) == 24
    assert sum(group.units for group in find_groups(trainer.model, kinds=["neuron"])) == 24


class Worsening(TrainerCallback):
    """Make every evaluation look worse than the one before, so that the earliest checkpoint would be the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("shrink_at_end", [False, True])
def test_the_best_model_is_never_a_denser_one(live, shrink_at_end, tmp_path):
    callback = make_callback(shrink_during_training=live, shrink_at_end=shrink_at_end)
    trainer = make_trainer(
        tmp_path,
        callback,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.add_callback(Worsening())
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-9"
    small = shrink(copy.deepcopy(trainer.model))
    assert prunable_macs(small) / prunable_macs(build_bert()) <= 0.5
    best = load_file(tmp_path / "checkpoint-9" / "model.safetensors")
    assert torch.equal(best["classifier.weight"], trainer.model.classifier.weight)


def test_shrink_at_end_false_leaves_zeros(tmp_path):
    trainer = make_trainer(tmp_path, callback := make_callback(shrink_at_end=False))
    trainer.train()
    assert units_of(trainer.model, None) == units_of(build_bert(), None)
    small = shrink(copy.deepcopy(trainer.model))
    assert {name: len(units) for name, units in callback.report.kept.items()} == units_of(small)
    assert_same_outputs(trainer.model, small)


def test_weight_sparsity_is_exact_in_the_saved_file(tmp_path):
    trainer = make_trainer(tmp_path, callback := make_callback(WeightPruner(sparsity=0.7)))
    trainer.train()
    save_pruned(trainer.model, tmp_path / "final")
    tensors = load_file(tmp_path / "final" / "model.safetensors")
    total = sum(mask.numel() for mask in callback.pruning.masks.values())
    zeros = sum(int((tensors[name] == 0).sum()) for name in callback.pruning.masks)
    assert zeros == round(0.7 * total)
    config = json.loads((tmp_path / "final" / "config.json").read_text(encoding="utf-8"))
    assert config["pruning_config"]["weights"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert_same_weights(trainer.model, load_pruned(tmp_path / "final", dtype=torch.float32))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate_loop_is_the_callback(accumulation, tmp_path):
    """The same data, clipping and optimizer give the same masks and the same weights."""
    from accelerate import Accelerator

    arguments = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": accumulation, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, callback := make_callback(), max_steps=10, **arguments)
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    trainer.model_accepts_loss_kwargs = (
        False  # BERT of transformers 5 claims to accept them, and sums instead of averaging
    )
    batches, model = [], build_bert()
    trainer.get_batch_samples = record(trainer.get_batch_samples, batches)
    trainer.train()

    decayed = set(trainer.get_decay_parameter_names(model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, optimizer_class(groups, **settings))
    pruning = Pruning(
        model, BOTH, EARLY, target=Target(macs=0.5), total_steps=10, optimizer=optimizer, accelerator=accelerator
    )
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                pruning.after_backward()
            optimizer.step()
            if accelerator.sync_gradients:
                pruning.step()
            optimizer.zero_grad()
    assert pruning.finish().kept == callback.report.kept
    assert_same_weights(trainer.model, accelerator.unwrap_model(model), atol=1e-5)


def record(function: Any, batches: list[Any]) -> Any:
    """Keep every batch that a Trainer draws."""

    def recording(*args: Any, **kwargs: Any) -> Any:
        samples, count = function(*args, **kwargs)
        batches.extend(samples)
        return samples, count

    return recording


def test_shrinking_live_equals_shrinking_at_the_end(tmp_path):
    reports, models = [], []
    for live in (False, True):
        trainer = make_trainer(tmp_path, callback := make_callback(shrink_during_training=live), build_bert().double())
        trainer.train()
        reports.append(callback.report.kept)
        models.append(trainer.model)
    assert reports[0] == reports[1]
    assert_same_weights(*models, atol=1e-5)


def test_settings_that_do_not_fit_stop_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, PruningCallback(HeadPruner(sparsity=0.5), Schedule(begin=5, end=500)))
    with pytest.raises(PruningError, match="schedule.end must be within the 12 steps of this run. Received: 500"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same_weights(build_bert(), trainer.model)


def test_deepspeed_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, make_callback())
    trainer.args.deepspeed = "zero.json"  # said to the constructor, it would want the package
    with pytest.raises(PruningError, match="Use DDP or FSDP2. Received: deepspeed in the Trainer's arguments"):
        trainer.train()
    assert_same_weights(build_bert(), trainer.model)


def test_an_interrupted_schedule_is_remarked(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    trainer = make_trainer(tmp_path, make_callback())
    trainer.add_callback(Stop())
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        trainer.train()
    assert "ended at step 3, before the schedule did at 9" in caplog.text


def test_a_callback_says_what_it_does_and_draws_its_curves(tmp_path):
    callback = PruningCallback([HeadPruner(), NeuronPruner(min_kept=2)], EARLY, target=Target(macs=0.5))
    told = repr(callback)
    assert told.startswith("PruningCallback(HeadPruner(), NeuronPruner(min_kept=2), Schedule(")
    assert told.endswith("Target(macs=0.5)): not begun")
    with pytest.raises(PruningError, match="two rows that a Trainer has logged.*Received: 0"):
        callback.plot()
    with pytest.raises(PruningError, match=r"format that matplotlib writes: .*, png, .*svg.* Received: .*curves.foo"):
        callback.plot(tmp_path / "curves.foo")
    trainer = make_trainer(tmp_path, callback, eval_strategy="steps", eval_steps=5, logging_steps=2)
    trainer.eval_dataset = draw_rows(trainer.model, 8)
    trainer.compute_metrics = lambda told: {"accuracy": 0.5}
    callback.attach(trainer).train()
    assert repr(callback).endswith(f"): ended, {callback.pruning.macs_left():.1%} of the prunable MACs left")
    figure = callback.plot(tmp_path / "new" / "curves.png")
    assert [ax.get_ylabel() for ax in figure.axes] == ["sparsity", "loss", "metric"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "curves.png").stat().st_size > 0


def test_two_callbacks_of_one_trainer_are_refused(tmp_path):
    """Each would record what it has removed alone, and the folder could not be loaded."""
    first, second = (PruningCallback(one(sparsity=0.5), EARLY) for one in (HeadPruner, NeuronPruner))
    trainer = make_trainer(tmp_path, first)
    for callback in (first, second):
        callback.attach(trainer)
    with pytest.raises(PruningError, match=r"give all pruners to one PruningCallback. Received: two"):
        trainer.train()
    trainer.remove_callback(second)
    trainer.train()
    assert load_pruned(save_pruned(trainer.model, tmp_path / "model"))


def test_a_callback_without_training_has_no_session(tmp_path):
    callback = make_callback()
    with pytest.raises(PruningError, match="while a Trainer trains. Received: none"):
        callback.on_optimizer_step(None, None, None)
    assert callback.report is None
