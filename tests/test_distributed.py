"""Two processes on a CPU decide the same, and save the same kind of folder as one process."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import BUILD, assert_same_weights, draw_rows, training_arguments, units_of
from test_examples import ROOT, run_example

from hf_prune import (
    Distillation,
    DistillationTrainer,
    HeadPruner,
    NeuronPruner,
    PruningCallback,
    Schedule,
    Target,
    latest_checkpoint,
    load_pruned,
    save_pruned,
)
from hf_prune.distillation.lesson import PROJECTIONS
from hf_prune.resume import STATE, fault_of, read_state

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


RESUMES = not transformers.__version__.startswith("4.")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def accelerate_launch() -> tuple[str, ...]:
    """Start two processes without a GPU: ``--cpu --num_processes 2`` would quietly start one."""
    port = ("--main_process_port", free_port())
    return ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *port)


def kept_of(folder: Path, rank: int) -> dict[str, list[int]]:
    return json.loads((folder / f"kept-{rank}.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return which files a folder has, which keys its config, and which its plan."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = sorted(name for name in os.listdir(folder))
    return files, sorted(config), sorted(config["pruning_config"])


def train(name: str, folder: Path, parts: int = 1, **changes: Any) -> tuple[Any, PruningCallback]:
    """Train on 16 rows a step, however many processes share them, or into how many parts they are cut."""
    rows, shares = 16, int(os.environ.get("WORLD_SIZE", "1")) * parts
    model = BUILD[name](attn_implementation="eager")
    teacher = BUILD[name](seed=1, hidden_size=32, attn_implementation="eager")
    settings = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1e9}
    settings |= {"per_device_train_batch_size": rows // shares, "gradient_accumulation_steps": parts}
    arguments = training_arguments(folder, **settings)
    callback = PruningCallback(
        [HeadPruner(), NeuronPruner()], Schedule(begin=2, end=5, frequency=3), target=Target(macs=0.5)
    )
    trainer = DistillationTrainer(
        model,
        arguments,
        train_dataset=draw_rows(model, 6 * rows),
        teacher=teacher,
        distillation=Distillation(hidden=1.0, attention=1.0),
    )
    callback.attach(trainer).train(**changes)
    return trainer, callback


def remember(folder: Path) -> dict[str, Any]:
    """Train three epochs on what a teacher is asked once; say what the last epoch found again."""
    shares = int(os.environ.get("WORLD_SIZE", "1"))
    model, teacher = BUILD["bert"](), BUILD["bert"](seed=1).eval()
    settings = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 16 // shares}
    trainer = DistillationTrainer(
        model,
        training_arguments(folder, **settings, learning_rate=1e-3),
        train_dataset=draw_rows(model, 32),
        teacher=teacher,
        distillation=Distillation(cache=str(folder / "answers")),
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    memory = trainer.lesson.memory
    return {"norms": norms, "new": memory.new, "found": memory.found, "known": len(memory.known)}


def state_of(trainer: Any, callback: PruningCallback) -> list[torch.Tensor]:
    """Return all that a run ends with: weights, matrices beside the model, and the running means that decided."""
    means = callback.pruning.evidence["gate"].means["gate_square"]
    learned = [*trainer.model.state_dict().values(), *trainer.lesson.projections.parameters()]
    return [*learned, *(means[name] for name in sorted(means))]


def facts_of(trainer: Any, callback: PruningCallback) -> dict[str, Any]:
    """Return what has to be the same however a step's rows are shared."""
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    beside = trainer.lesson.projections["layers"].weight.sum().item()
    return {"norms": norms, "kept": callback.report.kept, "beside": beside}


def work(folder: Path) -> None:
    """Train, then resume in mid-schedule; write what this process saw."""
    seen: dict[str, Any] = {"remembered": remember(folder)}
    for name in ("bert", "llama"):
        whole, callback = train(name, folder / name)
        if whole.is_world_process_zero():
            save_pruned(whole.model, folder / name / "final")
        seen[name] = facts_of(whole, callback)
        if "RANK" not in os.environ:
            seen[f"{name} in parts"] = facts_of(*train(name, folder / f"{name}-parts", parts=4))
        if RESUMES or "RANK" not in os.environ:
            resumed = train(name, folder / name, resume_from_checkpoint=str(folder / name / "checkpoint-3"))
            pairs = zip(state_of(whole, callback), state_of(*resumed), strict=True)
            seen[name]["resumed"] = all(torch.equal(mine, theirs) for mine, theirs in pairs)
    rank = os.environ.get("RANK", "0")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Work in one process, and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    work(one)
    run_example(Path(__file__), two, processes=2)
    return one, two


@pytest.fixture
def seen(folders):
    """Return what one process, and what each of two saw."""
    files = (folders[0] / "seen-0.json", folders[1] / "seen-0.json", folders[1] / "seen-1.json")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_processes_are_one_of_twice_the_batch(name, seen):
    """Gradients (of distilled, unevenly long texts too) and scores are averaged: the same units leave."""
    one, first, second = (entry[name] for entry in seen)
    assert first["kept"] == second["kept"] == one["kept"]
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert first["beside"] == second["beside"] == pytest.approx(one["beside"], rel=1e-3)
    assert len(one["norms"]) == 6


def test_processes_share_what_a_teacher_was_asked(seen):
    one, *two = (entry["remembered"] for entry in seen)
    assert (one["new"], one["found"], one["known"]) == (32, 32, 32)
    assert [(each["new"], each["found"], each["known"]) for each in two] == [(16, 16, 32)] * 2
    assert two[0]["norms"] == two[1]["norms"] == pytest.approx(one["norms"], rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_four_times_four_is_sixteen(name, seen):
    """Accumulated batches of unevenly long texts, with distillation: the same gradients, and the same units leave."""
    whole, parts = seen[0][name], seen[0][f"{name} in parts"]
    assert parts["kept"] == whole["kept"]
    assert parts["norms"] == pytest.approx(whole["norms"], rel=1e-3)
    assert parts["beside"] == pytest.approx(whole["beside"], rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_joins_checkpoints_of_two_processes_is_of_one_save(name, folders):
    for folder in folders:
        checkpoint = folder / name / "checkpoint-6"
        told = read_state(checkpoint / STATE)["files"]
        assert PROJECTIONS in told
        assert len([file for file in told if file.startswith("rng_state")]) == (2 if folder is folders[1] else 1)
        assert fault_of(checkpoint) is None
        assert latest_checkpoint(folder / name) == checkpoint


@pytest.mark.skipif(not RESUMES, reason="Trainer of transformers 4 cannot load optimizers on a CPU in two processes")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_processes_resume_in_mid_schedule_bitwise(name, seen):
    assert [entry[name]["resumed"] for entry in seen] == [True, True, True]


def test_the_folder_is_that_of_one_process(folders):
    one, two = (folder / "bert" / "final" for folder in folders)
    assert contents(one) == contents(two)
    config = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (one, two))
    assert next(config) == next(config)
    assert_same_weights(*(load_pruned(folder, dtype=torch.float32) for folder in (one, two)), atol=1e-3)


def test_trainer_example_in_two_processes(tmp_path):
    example = ROOT / "examples" / "text_classification.py"
    run_example(example, tmp_path, "--tiny", "--output", "two", launcher=TORCHRUN)
    check_run(tmp_path / "two")


def test_own_loop_in_two_processes(tmp_path):
    run_example(ROOT / "examples" / "own_loop.py", tmp_path, "--tiny", "--output", "two", launcher=accelerate_launch())
    check_run(tmp_path / "two")


def check_run(folder: Path) -> None:
    """Both ranks decided the same, and what they saved is what they decided."""
    kept = kept_of(folder, 0)
    assert kept == kept_of(folder, 1)
    files, _, block = contents(folder / "final")
    assert files == ["config.json", *(["generation_config.json"] if len(files) == 3 else []), "model.safetensors"]
    assert {"format", "kept", "stock", "library_version"} <= set(block)
    model = load_pruned(folder / "final", dtype=torch.float32)
    assert units_of(model) == {name: len(kept[name]) for name in kept}
    assert any(len(units) < 64 for name, units in kept.items() if name.endswith("neurons"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path.cwd())
