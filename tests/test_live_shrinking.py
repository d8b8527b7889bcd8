"""Units leave while a model trains inside DDP and torch.compile: as masks would have it, with the same wrapper.

Two processes do what one does with the same rows; graphs are compiled anew for each shape.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUILD, TINY_RECIPE, build_bert, draw_batch, draw_rows, training_arguments
from test_distributed import RESUMES, TORCHRUN
from test_examples import run_example
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from transformers import Trainer

from hf_prune import (
    Distillation,
    DistillationTrainer,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    run,
    shrink,
)
from hf_prune.sharding import unwrap

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

ROWS, STEPS = 8, 8
SCHEDULE = Schedule("linear", begin=1, end=5, frequency=2)  # changes at 1, 3 and 5
UNITS = [HeadPruner(), NeuronPruner()]


class Block(nn.Module):
    """One layer: neurons around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the neurons say."""
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Net(nn.Module):
    """A model of which a graph is compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        """Go through both layers."""
        for layer in self.layers:
            x = layer(x)
        return x


class Inside(nn.Module):
    """A module that has the model as one part, as Lightning's and sentence-transformers' have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Say one number a row."""
        return self.head(self.model(x))


def share(rows: int = ROWS) -> slice:
    """Return which rows of a batch are this process' own."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    return slice(rank * rows // world, (rank + 1) * rows // world)


def numbers(module: nn.Module) -> Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def train_net(wrap: Callable[[nn.Module], Any], *, live: bool, finish: int = STEPS) -> dict[str, Any]:
    """Train in a loop of one's own that still holds the last loss when units leave; `finish` before the last steps."""
    torch.manual_seed(0)
    whole = Inside(Net()).double()
    model, call = whole.model, wrap(whole)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    told = {"target": Target(macs=0.4), "total_steps": finish, "optimizer": optimizer, "shrink_during_training": live}
    pruning = Pruning(model, NeuronPruner(score="l2"), SCHEDULE, **told)
    draw, losses, widths = torch.Generator().manual_seed(0), [], []
    for step in range(STEPS):
        x = torch.randn(ROWS, 8, generator=draw, dtype=torch.float64)[share()]
        loss = (call(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        if step < finish:
            pruning.step()
        if step == finish - 1:
            pruning.finish()
        optimizer.zero_grad()
        losses.append(loss.item())
        widths.append(sum(len(layer.fc1.weight) for layer in model.layers))
    moments = torch.cat([one["exp_avg"].flatten() for one in optimizer.state.values()])
    kept = pruning.finish().kept if finish == STEPS else {}
    return {"weights": numbers(whole), "moments": moments, "kept": kept, "widths": widths, "losses": losses}


def ddp(**how: Any) -> Callable[[nn.Module], Any]:
    return lambda module: nn.parallel.DistributedDataParallel(module, **how)


def halves(module: nn.Module) -> Any:
    """Let DDP send gradients in half precision."""
    made = ddp()(module)
    made.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return made


def compiled_ddp(module: nn.Module) -> Any:
    return torch.compile(ddp()(module), backend="eager")


def ddp_of_compiled(module: nn.Module) -> Any:
    return ddp()(torch.compile(module, backend="eager"))


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "ddp": ddp(),
    "find_unused_parameters": ddp(find_unused_parameters=True),
    "static_graph": ddp(static_graph=True),
    "gradient_as_bucket_view": ddp(gradient_as_bucket_view=True, bucket_cap_mb=0.001),
    "a hook of one's own": halves,
    "compiled": compiled_ddp,
    "compiled inside": ddp_of_compiled,
}


def train_model(name: str, folder: Path, *, live: bool, **changes: Any) -> tuple[Trainer, PruningCallback]:
    """Let a Trainer prune, and distil, with the rows of a step shared by all processes."""
    model, teacher = (BUILD[name](seed=seed, attn_implementation="eager").double() for seed in (0, 1))
    shares = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"max_steps": STEPS, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 4}
    callback = PruningCallback(UNITS, SCHEDULE, target=Target(macs=0.5), shrink_during_training=live)
    trainer = DistillationTrainer(
        model,
        training_arguments(folder, **settings, per_device_train_batch_size=ROWS // shares, max_grad_norm=1e9),
        train_dataset=draw_rows(model, STEPS * ROWS),
        teacher=teacher,
        distillation=Distillation(hidden=1.0, attention=1.0),
    )
    callback.attach(trainer).train(**changes)
    return trainer, callback


def facts_of(trainer: Trainer, callback: PruningCallback) -> dict[str, Any]:
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "weights": numbers(trainer.model),
        "kept": callback.report.kept,
        "norms": [entry["grad_norm"] for entry in logged],
        "rates": [entry["learning_rate"] for entry in logged],
        "macs": [entry["macs_left"] for entry in logged],
        "moments": sum(one["exp_avg"].numel() for one in trainer.optimizer.state.values()),
    }


def train_layers(folder: Path, *, live: bool) -> dict[str, Any]:
    """Let whole layers leave: their parameters are no longer DDP's."""
    model = build_bert(num_hidden_layers=4).double()
    settings = {"max_steps": 6, "per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", "1"))}
    callback = PruningCallback(LayerPruner(sparsity=0.5), SCHEDULE, shrink_during_training=live)
    trainer = Trainer(model, training_arguments(folder, **settings), train_dataset=draw_rows(model, 6 * ROWS))
    callback.attach(trainer).train()
    return facts_of(trainer, callback)


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except PruningError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """Say why these cannot be, before anything is cut."""

    def begin(model: nn.Module) -> Pruning:
        return Pruning(model, NeuronPruner(sparsity=0.5), total_steps=4, shrink_during_training=True)

    low_rank, copies = ddp()(Net()), ddp()(Net())
    low_rank.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
    copies.mixed_precision = torch.distributed.fsdp.MixedPrecision(torch.bfloat16)
    said = {"low rank": message_of(lambda: begin(low_rank)), "copies": message_of(lambda: begin(copies))}
    gc.freeze()
    said["frozen"] = message_of(lambda: begin(ddp()(Net())))
    gc.unfreeze()
    return said


def work(folder: Path) -> None:
    """Do everything that needs two processes, and write what this one saw."""
    seen: dict[str, Any] = {"layers": [train_layers(folder / "layers", live=live) for live in (False, True)]}
    for model in ("bert", "llama"):
        seen[model] = facts_of(*train_model(model, folder / model, live=True))
    if RESUMES:
        again = train_model("bert", folder / "bert", live=True, resume_from_checkpoint=f"{folder}/bert/checkpoint-4")
        seen["resumed"] = facts_of(*again)
    for case, wrap in WRAPS.items():
        seen[case] = train_net(wrap, live=True)
    seen["goes on"] = train_net(ddp(find_unused_parameters=True), live=False, finish=6)
    short = ["dense.epochs=1", "train.epochs=1", "onnx=false", "measure.repeats=1", f"output={folder / 'run'}"]
    report = run("quickstart", [*TINY_RECIPE, "schedule.frequency=2", *short])
    seen["run"] = {"kept": report.kept, "metrics": report.metrics}
    seen["unwrapped"] = [unwrap(wrap(net := Net())) is net for wrap in (ddp(), compiled_ddp, ddp_of_compiled)]
    seen["refusals"] = refusals()
    torch.save(seen, folder / f"seen-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Work in two processes; return what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    run_example(Path(__file__), folder, launcher=TORCHRUN)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in (0, 1)]


def close(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-7) -> None:
    assert mine["kept"] == theirs["kept"]
    torch.testing.assert_close(mine["weights"], theirs["weights"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", WRAPS)
def test_a_loop_of_ones_own_in_two_processes(case, seen):
    masked, one = (train_net(lambda module: module, live=live) for live in (False, True))
    assert one["widths"][0] > one["widths"][2] > one["widths"][5] == one["widths"][-1]
    first, second = (entry[case] for entry in seen)
    assert torch.equal(first["weights"], second["weights"])
    assert first["widths"] == second["widths"] == one["widths"]
    tolerance = 1e-2 if case == "a hook of one's own" else 1e-7
    close(first, masked, tolerance)
    torch.testing.assert_close(first["moments"], one["moments"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_trainer_in_two_processes(name, seen, tmp_path):
    """Distilled: the same units leave as by masks and as in one process, by the same schedule and learning rates."""
    first, second = (entry[name] for entry in seen)
    assert torch.equal(first["weights"], second["weights"])
    for live in (False, True):
        one = facts_of(*train_model(name, tmp_path, live=live))
        close(first, one, 1e-5)
        assert first["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert (first["rates"], first["macs"]) == (one["rates"], one["macs"])
    assert first["moments"] == one["moments"]


@pytest.mark.skipif(not RESUMES, reason="Trainer of transformers 4 cannot load optimizers on a CPU in two processes")
def test_two_processes_resume_among_the_changes_bitwise(seen):
    for entry in seen:
        whole, resumed = entry["bert"], entry["resumed"]
        close(resumed, whole, 0)
        assert whole["norms"][4:] == resumed["norms"][-4:]
        assert whole["rates"][4:] == resumed["rates"][-4:]


def test_layers_that_leave_are_no_longer_ddps(seen):
    for entry in seen:
        masked, live = entry["layers"]
        assert len(live["kept"]["layers"]) == 2
        close(live, masked)


def test_training_goes_on_in_ddp_after_the_end_of_pruning(seen):
    """What was cut then is averaged too: without a new reducer each process would go its own way."""
    one = train_net(lambda module: module, live=False, finish=6)
    assert one["widths"][-1] < one["widths"][0]
    for entry in seen:
        torch.testing.assert_close(entry["goes on"]["weights"], one["weights"], atol=1e-7, rtol=0)


def test_a_recipe_in_two_processes(seen):
    first, second = (entry["run"] for entry in seen)
    assert first == second
    assert any(len(units) < 64 for name, units in first["kept"].items() if name.endswith("neurons"))
    assert first["metrics"]["accuracy"].keys() == {"dense", "pruned"}


def test_wrappers_are_unwrapped_in_any_order(seen):
    assert seen[0]["unwrapped"] == [True, True, True]


def test_what_cannot_follow_is_refused(seen):
    said = seen[0]["refusals"]
    assert (
        "keeps nothing from step to step, such as fp16_compress_hook. Received: one with a PowerSGD" in said["low rank"]
    )
    assert "without copies of the parameters" in said["copies"]
    assert "needs gc.unfreeze(), to find DDP" in said["frozen"]


# torch.compile
@pytest.mark.parametrize("how", ["the whole model", "each layer"])
def test_each_shape_is_compiled(how):
    """With a limit of two graphs, all changes are compiled all the same: nothing falls back to eager in silence."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(max(len(one) for one in inputs if one.ndim == 2))
        return graph.forward

    def wrap(module: Any) -> Any:
        if how == "the whole model":
            return torch.compile(module, backend=backend)
        for layer in module.model.layers:
            layer.compile(backend=backend)
        return module

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        eager, compiled = (train_net(one, live=True) for one in (lambda module: module, wrap))
    torch._dynamo.reset()
    close(compiled, eager)
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-9)
    assert len(graphs) == 4 * (1 if how == "the whole model" else 2)
    assert graphs[0] > graphs[-1]


def test_a_trainer_that_compiles(tmp_path):
    runs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        model = build_bert(num_hidden_layers=1).double()
        arguments = training_arguments(tmp_path, max_steps=4, learning_rate=1e-3, **settings)
        pruner, once = NeuronPruner(sparsity=0.5, score="l2"), Schedule("oneshot", begin=2)
        callback = PruningCallback(pruner, once, shrink_during_training=True)
        trainer = Trainer(model, arguments, train_dataset=draw_rows(model, 16))
        callback.attach(trainer).train()
        runs.append(facts_of(trainer, callback))
    torch._dynamo.reset()
    close(*runs)
    assert runs[1]["macs"][-1] < 0.8


# one process
def test_a_loss_that_is_still_held_keeps_no_old_shape():
    """Autograd's nodes of a step live as long as its loss does."""
    for dtype in (torch.float32, torch.float64):
        model = build_bert().to(dtype)
        batch = draw_batch(model)
        loss = model(**batch).loss
        loss.backward()
        shrink(model, {"layers.0.mlp.neurons": [1, 5, 6], "layers.1.attention.heads": [2]})
        fresh = copy.deepcopy(model)
        for one in (model, fresh):
            one.zero_grad()
            one(**batch).loss.backward()
        for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine.grad, theirs.grad)
        assert loss.grad_fn is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    work(Path.cwd())
