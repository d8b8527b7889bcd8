"""FSDP2 on two processes masks what DDP does, and what one process does with the same batches; ranks that differ stop.

The sizes are odd: heads and neurons straddle processes, and shards are uneven or empty.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BUILD,
    assert_same_outputs,
    assert_same_weights,
    build_bert,
    draw_batch,
    draw_rows,
    training_arguments,
)
from test_distributed import TORCHRUN, check_run
from test_examples import ROOT, run_example
from torch import Tensor
from transformers import Trainer

from hf_prune import (
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    WeightPruner,
    load_pruned,
    save_pruned,
    shrink,
)
from hf_prune.allocation import select_weights
from hf_prune.masks import check_ranks_agree
from hf_prune.sharding import local, part_of, select_across, whole
from hf_prune.structure import named_tensors

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

STEPS, ROWS = 6, 8
KINDS = ("fsdp", "hsdp", "ddp")
ODD = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 11}


def share_of_norm(weight: Tensor) -> Tensor:
    """Score weights by their share of their matrix's norm: a shard alone could not tell."""
    return weight.abs() / weight.norm()


CASES: dict[str, tuple[str, Callable[[], Any], Target | None]] = {
    "units by l2": ("bert", lambda: [HeadPruner(score="l2"), NeuronPruner(score="l2")], Target(macs=0.5)),
    "units by taylor": ("bert", lambda: [HeadPruner(), NeuronPruner()], Target(macs=0.5)),
    "llama's units": ("llama", lambda: [HeadPruner(), NeuronPruner()], Target(macs=0.5)),
    "weights by l1": ("bert", lambda: WeightPruner(sparsity=0.5, score="l1"), None),
    "weights by taylor": ("bert", lambda: WeightPruner(sparsity=0.5), None),
    "uniform, and neurons": (
        "bert",
        lambda: [WeightPruner(sparsity=0.5, score="random", allocation="uniform"), NeuronPruner(sparsity=0.5)],
        None,
    ),
    "weights by movement": ("bert", lambda: WeightPruner(sparsity=0.5, score="movement"), None),
    "units that come back": (
        "llama",
        lambda: [HeadPruner(reversible=True), NeuronPruner(score="taylor", reversible=True)],
        Target(macs=0.5),
    ),
    "layers and branches": ("llama", lambda: LayerPruner(sparsity=0.4, unit="any"), None),
    "calibrated": ("bert", lambda: [WeightPruner(sparsity=0.5), HeadPruner(sparsity=0.3)], None),
    "a score of one's own": ("llama", lambda: WeightPruner(sparsity=0.7, score=share_of_norm), None),
}


RESUMED = ("uniform, and neurons", "weights by movement", "units that come back")


def build(name: str, kind: str) -> tuple[Any, Any]:
    """Return a model, and what to call: itself, sharded or not, or what DDP makes of it."""
    model = (build_bert(**ODD) if name == "bert" else BUILD[name]()).double()
    if kind == "ddp":
        return model, torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=name == "llama")
    if kind in ("fsdp", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = (2, 1) if kind == "hsdp" else (2,)  # two replicas, each of one shard
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
        for layer in model.base_model.encoder.layer if name == "bert" else model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model


def my_batch(model: Any, step: int) -> dict[str, Tensor]:
    """Draw this process' share of the rows of a step; of a causal LM all tokens count, so that means are the same."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    batch = draw_batch(model, ROWS, seed=step)
    if model.config.model_type == "llama":
        batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    return {key: value[rank * ROWS // world : (rank + 1) * ROWS // world] for key, value in batch.items()}


class Run:
    """One pruned training, up to any step."""

    def __init__(self, case: str, kind: str) -> None:
        name, pruners, target = CASES[case]
        self.model, self.call = build(name, kind)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        data = [my_batch(self.model, 100)] if case == "calibrated" else None
        settings = {"target": target, "total_steps": STEPS, "optimizer": self.optimizer, "data": data}
        self.pruning = Pruning(self.call, pruners(), Schedule(begin=1, end=5, frequency=2), **settings)
        self.norms: list[float] = []

    def go(self, steps: int = STEPS) -> Run:
        for step in range(steps):
            self.call(**my_batch(self.model, step)).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
            self.norms.append(float(whole(norm)))
            self.pruning.after_backward()
            self.optimizer.step()
            self.pruning.step()
            self.optimizer.zero_grad()
        return self

    def facts(self) -> dict[str, Any]:
        """Return what has to be the same, however many processes there were; this ends the run."""
        state, logs = self.pruning.state_dict(), self.pruning.logs()
        logs.pop("reversible_mb", None)  # of this process
        masks = {
            name: mask.nonzero().tolist()
            for name, mask in {**state["masking"]["alive"], **state["masking"]["weights"]}.items()
        }
        zeros = {name: int((whole(one) == 0).sum()) for name, one in named_tensors(self.model).items() if one.ndim > 1}
        moments = sum(int((whole(one["exp_avg"]) == 0).sum()) for one in self.optimizer.state.values())
        report = self.pruning.finish()
        with torch.no_grad():
            logits = self.pruning.model.eval()(**draw_batch(self.pruning.model, 3, seed=7)).logits
        return {
            "outputs": logits.flatten().tolist()[:50],
            "masks": masks,
            "zeros": [zeros, moments],
            "logs": logs,
            "kept": report.kept,
            "counts": [report.dense.parameters, report.dense.nonzero, report.pruned.parameters, report.pruned.nonzero],
            "norms": self.norms,
        }


def message_of(function: Callable[..., Any], *args: Any) -> str:
    """Return what a call raises."""
    try:
        function(*args)
    except PruningError as error:
        return str(error)
    return ""


def disagree(rank: int) -> dict[str, str]:
    """Let the second process decide otherwise, and return what each one says."""
    said = {}
    for case in ("units by l2", "weights by l1"):
        run = Run(case, "ddp")
        name = "layers.1.mlp.neurons" if case == "units by l2" else "bert.encoder.layer.1.output.dense.weight"
        held = run.pruning.alive if case == "units by l2" else run.pruning.masks
        if case == "weights by l1":
            held[name] = torch.ones_like(run.model.get_parameter(name), dtype=torch.bool)
        held[name].view(-1)[rank] = False
        said[case] = message_of(check_ranks_agree, {**run.pruning.alive, **run.pruning.masks})
    mine = Run("units by l2", "fsdp")
    pruner = NeuronPruner(sparsity=0.5, score=lambda weight: weight.abs() if rank else -weight.abs())
    mine.pruning = Pruning(mine.model, pruner, Schedule(begin=1, end=2, frequency=1), total_steps=STEPS)
    said["scores"] = message_of(mine.go)
    said["thresholds"] = message_of(check_ranks_agree, {}, {}, {"a.weight": rank})
    said["more names"] = message_of(check_ranks_agree, {"a": torch.ones(3, dtype=torch.bool)} if rank else {})
    return said


def train_layers(folder: Path, **changes: Any) -> None:
    """Let a Trainer drop layers."""
    callback = PruningCallback(LayerPruner(sparsity=0.5), Schedule(begin=1, end=2, frequency=1))
    model = build_bert()
    arguments = training_arguments(folder, max_steps=4, **changes)
    Trainer(model, arguments, train_dataset=draw_rows(model, 16), callbacks=[callback]).train()
    assert callback.report.kept["layers"] in ([0], [1])


def refusals() -> dict[str, str]:
    model, _ = build("bert", "fsdp")
    pruner = HeadPruner(sparsity=0.5)
    return {
        "shrink": message_of(shrink, model),
        "save": message_of(save_pruned, model, "never"),
        "live": message_of(lambda: Pruning(model, pruner, total_steps=4, shrink_during_training=True)),
        "trainer": message_of(lambda: train_layers(Path("ddp"), gradient_checkpointing=True)),
        "no refusal": message_of(lambda: train_layers(Path("ddp"))),
        "unused": message_of(lambda: Pruning(build("bert", "ddp")[1], LayerPruner(sparsity=0.5), total_steps=4)),
    }


def selected(rank: int) -> dict[str, Any]:
    """Select among values with many ties, whole and in shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, draw = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    values = {f"{i}": torch.randint(-3, 3, (n, 4), generator=draw) * -0.5 for i, n in enumerate((1, 5, 8))}
    values["2"][3] = -torch.inf
    shards = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in values.items()}
    same = []
    for dtype in (torch.float32, torch.float64):
        for keep in (0, 1, 17, 30, 55, 56):
            parts = {name: local(one).to(dtype) for name, one in shards.items()}
            masks, _ = select_across(parts, shards, keep)
            expected = select_weights(values, keep)
            same += [torch.equal(masks[name], part_of(mask, shards[name])) for name, mask in expected.items()]
    return {"same": all(same), "compared": len(same)}


def resume(case: str) -> bool:
    """Whether a run that goes on from another's state, both sharded, ends with its masks and weights."""
    first = Run(case, "fsdp").go(3)
    second = Run(case, "fsdp")
    with torch.no_grad():
        for mine, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
            mine.to_local().copy_(theirs.to_local())
    second.pruning.load_state_dict(copy.deepcopy(first.pruning.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for run in (first, second):
        run.go(STEPS - 3)
    return all(
        torch.equal(mine.to_local(), theirs.to_local())
        for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True)
    ) and all(
        torch.equal(mask, held[name])
        for kept, held in ((first.pruning.masks, second.pruning.masks), (first.pruning.alive, second.pruning.alive))
        for name, mask in kept.items()
    )


def work(folder: Path) -> None:
    """Do everything that needs two processes, and write what this one saw."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    pairs = [(case, kind) for case in CASES for kind in KINDS]
    seen: dict[str, Any] = {f"{case}, {kind}": Run(case, kind).go().facts() for case, kind in pairs}
    seen["disagree"], seen["refusals"], seen["resume"] = disagree(rank), refusals(), [resume(case) for case in RESUMED]
    seen["selected"] = selected(rank)
    run = Run("units by taylor", "fsdp").go()
    run.pruning.finish()
    if rank == 0:
        save_pruned(run.pruning.model, folder / "final")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Work in two processes."""
    folder = tmp_path_factory.mktemp("two")
    run_example(Path(__file__), folder, processes=2)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """Return what each of two processes saw."""
    return [json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_one_process(case, seen):
    one = Run(case, "plain").go().facts()
    for entry in seen:
        for kind in KINDS:
            two = entry[f"{case}, {kind}"]
            for key in ("norms", "outputs"):
                assert two[key] == pytest.approx(one[key], rel=1e-6), f"{kind}: {key}"
            for key in ("masks", "zeros", "logs", "kept", "counts"):
                assert two[key] == json.loads(json.dumps(one[key])), f"{kind}: {key}"
    assert one["logs"]["sparsity"] > 0.2, "something was pruned"


def test_processes_that_differ_all_stop_and_name_what_differs(seen):
    first, second = (entry["disagree"] for entry in seen)
    assert first == second
    assert "'layers.1.mlp.neurons' differs between rank 0 and rank 1" in first["units by l2"]
    assert "'bert.encoder.layer.1.output.dense.weight' differs" in first["weights by l1"]
    assert "differs between rank 0 and rank 1" in first["scores"]
    assert "'a.weight' differs" in first["thresholds"]
    assert "'a' differs" in first["more names"]


def test_what_is_not_possible_says_what_is(seen):
    assert "Pruning.finish() gathers" in seen[0]["refusals"]["shrink"]
    assert seen[0]["refusals"]["save"] == seen[0]["refusals"]["shrink"]
    assert "shrink_during_training needs whole parameters" in seen[0]["refusals"]["live"]
    assert "needs whole parameters: without it masks train under FSDP" in seen[0]["refusals"]["live"]
    assert "DDP needs find_unused_parameters=True" in seen[0]["refusals"]["unused"]
    assert seen[0]["refusals"]["trainer"] == seen[0]["refusals"]["unused"]
    assert seen[0]["refusals"]["no refusal"] == ""


def test_equal_values_are_kept_in_the_order_of_one_process(seen):
    assert [entry["selected"] for entry in seen] == [{"same": True, "compared": 36}] * 2


def test_a_sharded_run_goes_on_bitwise(seen):
    assert [entry["resume"] for entry in seen] == [[True] * len(RESUMED)] * 2


def test_a_gathered_model_is_that_of_one_process(folder):
    one = Run("units by taylor", "plain").go()
    one.pruning.finish()
    loaded = load_pruned(folder / "final", dtype=torch.float64)
    assert_same_weights(one.model, loaded, atol=1e-9)
    assert_same_outputs(one.model, loaded)


def test_example_in_two_processes(tmp_path):
    run_example(ROOT / "examples" / "fsdp2.py", tmp_path, "--tiny", "--output", "two", launcher=TORCHRUN)
    check_run(tmp_path / "two")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path.cwd())
