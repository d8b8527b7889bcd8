"""The parts of `gpu.py`: each is a function from a size to its cases, and a case returns figures to record.

`right` among them says whether what must hold did; times and sizes are only told.
"""

from __future__ import annotations

import copy
import functools
import os
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from overhead import compare_peaks, compare_time, trainer  # first: it keeps the libraries offline

import torch  # isort: skip
import transformers
from gpu_models import (
    DEVICE,
    DTYPES,
    TOKENS,
    WORDS,
    Size,
    build,
    draw,
    forward,
    graphed,
    in_turn,
    largest,
    logits_of,
    need_gpu,
    place,
)
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prune import (
    Distillation,
    DistillationTrainer,
    HeadPruner,
    NeuronPruner,
    Pruning,
    PruningCallback,
    Schedule,
    Target,
    WeightPruner,
    load_pruned,
    prune,
    save_pruned,
    shrink,
)
from hf_prune.sharding import any_sharded

Case = Callable[[], dict[str, Any]]
CLOSE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # of the largest logit: other shapes round otherwise
AIM = 1.02  # a step with the callback against one without


# 1: Trainers
def trainers(size: Size) -> dict[str, Case]:
    kinds = ("units", "weights")
    cases = {f"{kind} where steps overflow": partial(overflow, size, kind) for kind in kinds}
    cases |= {f"{kind} in {one}": partial(compare, size, kind, one) for one in ("bf16", "fp16") for kind in kinds}
    return cases | {f"{kind} in bf16, long": partial(compare, size, kind, "bf16", long=True) for kind in kinds}


def settings_of(size: Size, precision: str, *, long: bool = False) -> Namespace:
    batch, length = size.long if long else (size.batch, TOKENS)
    if precision == "fp16":
        need_gpu("Trainer(fp16=True)")
    kind = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    return Namespace(batch=batch, length=length, steps=size.steps, **kind)


def compare(size: Size, kind: str, precision: str, *, long: bool = False) -> dict[str, Any]:
    """Let a Trainer with the callback and one without take turns."""
    settings, dense = settings_of(size, precision, long=long), build("bert", size)
    with tempfile.TemporaryDirectory() as folder:
        told = compare_time(kind, dense, settings, folder)
        told |= compare_peaks(kind, dense, settings, folder)
    shape = {"batch": settings.batch, "tokens": settings.length, "steps": size.steps}
    return {**shape, "within_aim": told["wall"] <= AIM, **told}


class Overflows(TrainerCallback):
    """Give a Trainer a loss scale that is far too high at first and soon doubles; count the steps that it skips.

    On a CPU, where only bf16 trains, every third step's scale is infinite.
    """

    skipped = 0

    def __init__(self, run: Trainer) -> None:
        self.run, exponent = run, 30 if DEVICE == "cuda" else 16
        run.accelerator.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**exponent, growth_interval=3)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a CPU overflow, and remember a weight."""
        self.before = next(self.run.model.parameters()).detach().clone()
        if DEVICE == "cpu" and state.global_step:
            self.run.accelerator.scaler.update(2.0**16 if state.global_step % 3 else float("inf"))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See whether the weight has moved: of a fused optimizer accelerate says that it never skips."""
        self.skipped += torch.equal(self.before, next(self.run.model.parameters()))


def overflow(size: Size, kind: str) -> dict[str, Any]:
    """Prune while a GradScaler skips step after step: what is to be reached is, and nothing becomes infinite."""
    precision = "fp16" if DEVICE == "cuda" else "bf16"
    pruners = [HeadPruner(), NeuronPruner()] if kind == "units" else WeightPruner(sparsity=0.5)
    target = Target(macs=0.5) if kind == "units" else None
    pruning = PruningCallback(pruners, Schedule(begin=0.0, end=0.8, frequency=3), target=target)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(build("bert", size), settings_of(size, precision), size.steps, folder, [pruning])
        run.add_callback(seen := Overflows(run))
        loss = run.train().training_loss
    numbers, session = pruning.report.settings, pruning.pruning
    finite = all(bool(one.isfinite().all()) for one in run.model.parameters())
    reached = numbers["macs_left"] <= 0.5 if kind == "units" else abs(numbers["sparsity"] - 0.5) < 0.01
    told = {"skipped_steps": seen.skipped, "steps": size.steps, "session_steps": session.steps, "loss": loss}
    told |= {"precision": precision, "finite": finite, "reached": reached, "finished": session.finished, **numbers}
    return {**told, "right": finite and reached and session.finished and seen.skipped > 0}


# 2: wrappers
LOOPS, TRAINERS = ("ddp", "fully_shard", "accelerate fsdp2"), ("trainer fsdp2",)
STEPS = 18


Outcome = tuple[Pruning, float, bool]  # the session, the loss, and whether parameters were sharded


def wrappers(size: Size) -> dict[str, Case]:
    loops = {kind: partial(same_masks, size.middle, kind, own_loop) for kind in LOOPS}
    return loops | {kind: partial(same_masks, size.middle, kind, in_trainer) for kind in TRAINERS}


def same_masks(size: Size, kind: str, train: Callable[..., Outcome]) -> dict[str, Any]:
    """Compare a wrapped run's masks with those of a plain one."""
    if kind in ("accelerate fsdp2", "trainer fsdp2"):
        need_gpu("FSDP by accelerate or by Trainer")
    torch.use_deterministic_algorithms(True, warn_only=True)
    (plain, plain_loss, _), batch = without(size, train), draw(build("bert", size), 8, seed=99)
    join_alone()
    run, loss, sharded = train(size, kind)
    units, weights = (
        sum(len({*kept} ^ {*run.live.record[name][0]}) for name, (kept, _) in plain.live.record.items()),
        None,
    )
    if not units:
        weights = sum(int((mask.cpu() != run.masks[name].cpu()).sum()) for name, mask in plain.masks.items())
    outputs = [logits_of(one.model.cpu().float(), batch) for one in (plain, run)]
    told = {"units_that_differ": units, "weights_that_differ": weights, "masked_matrices": len(plain.masks)}
    told |= {"macs_left": run.macs_left(), "losses": [plain_loss, loss], "outputs": largest(*outputs)}
    right = units == weights == 0 and run.finished and told["macs_left"] <= 0.5 and sharded == (kind != "ddp")
    return {**told, "sharded": sharded, "right": right}


@functools.cache
def without(size: Size, train: Callable[..., Outcome]) -> Outcome:
    return train(size, "plain")


def join_alone() -> None:
    """Join a group of one process, as a launcher would have it."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost", "FSDP_VERSION": "2"}
    torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")


def what() -> dict[str, Any]:
    pruners = [HeadPruner(), NeuronPruner(), WeightPruner(sparsity=0.3, score="l1")]
    return {"pruners": pruners, "schedule": Schedule(begin=2, end=14, frequency=4), "target": Target(macs=0.5)}


def own_loop(size: Size, kind: str) -> Outcome:
    """Prune in a loop of one's own, and return what came of it."""
    model, accelerator = build("bert", size).to(DEVICE).train(), None
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for part in (*model.base_model.encoder.layer, model):
            fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if kind == "accelerate fsdp2":
        accelerator = accelerate_fsdp2()
        model, optimizer = accelerator.prepare(model, optimizer)
    pruning = Pruning(model, **what(), total_steps=STEPS, optimizer=optimizer, accelerator=accelerator)
    for step in range(STEPS):
        batch = draw(pruning.model, size.batch, seed=step)
        loss = model(**batch).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        pruning.after_backward()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()
    sharded = any_sharded(model.parameters())
    pruning.finish()
    return pruning, loss.item(), sharded


def accelerate_fsdp2() -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["BertLayer"]}
    return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **wrap))


def in_trainer(size: Size, kind: str) -> Outcome:
    """Prune in a Trainer, sharded or not, and return what came of it."""
    wanted: dict[str, Any] = {}
    if kind == "trainer fsdp2":
        newer = not transformers.__version__.startswith("4.")
        wanted = {"fsdp": True if newer else "full_shard auto_wrap"}
        wanted["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    callback, model = PruningCallback(**what()), build("bert", size)
    rows = [{name: one[0] for name, one in draw(model, 1, seed=n).items()} for n in range(size.batch * 4)]
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(model, arguments_of(folder, size, STEPS, **wanted), train_dataset=rows, callbacks=[callback])
        loss = run.train().training_loss
    return callback.pruning, loss, any_sharded(run.model.parameters())


def arguments_of(folder: str, size: Size, steps: int, **changes: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "seed": 0}
    quiet |= {"dataloader_pin_memory": False, "per_device_train_batch_size": size.batch, "max_steps": steps}
    return TrainingArguments(folder, **{**quiet, "learning_rate": 1e-3, "max_grad_norm": 1e9, **changes})


# 3: round trip
def round_trips(size: Size) -> dict[str, Case]:
    return {f"{name} in {dtype}": partial(round_trip, size, name, dtype) for name in MODELS for dtype in DTYPES}


MODELS = ("bert", "vit", "llama")


def round_trip(size: Size, name: str, dtype: str) -> dict[str, Any]:
    """Prune, shrink, save and load where the GPU is."""
    model = place(build(name, size), DTYPES[dtype])
    batch = draw(model, 4)
    dense = logits_of(model, batch)
    report = prune(model, [HeadPruner(), NeuronPruner()], target=Target(macs=0.5), data=[batch], shrink=False)
    masked = logits_of(model, batch)
    shrunk = logits_of(shrink(model), batch)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, folder)
        loaded = load_pruned(folder, dtype=DTYPES[dtype], device_map=DEVICE)
    again, scale = logits_of(loaded, batch), float(masked.abs().max())
    told = {"largest_logit": scale, "dense_masked": largest(dense, masked), "masked_shrunk": largest(masked, shrunk)}
    told |= {"shrunk_loaded": largest(shrunk, again), "macs_left": report.settings["macs_left"]}
    held, close = model.state_dict(), CLOSE[dtype] * scale
    same = held.keys() == loaded.state_dict().keys() and max(told["masked_shrunk"], told["shrunk_loaded"]) <= close
    same = same and all(torch.equal(one, held[name]) for name, one in loaded.state_dict().items())
    return {**told, "right": same and loaded.dtype == DTYPES[dtype] and told["macs_left"] <= 0.5}


# 4: latency
BATCHES = (1, 8, 32)


def latencies(size: Size) -> dict[str, Case]:
    cases: dict[str, Case] = {f"eager, batch {rows}": partial(latency, size, rows) for rows in BATCHES}
    cases |= {f"CUDA graph, batch {rows}": partial(latency, size, rows, way="graph") for rows in BATCHES}
    cases["eager, long"] = partial(latency, size, *size.long)
    cases["CUDA graph, long"] = partial(latency, size, *size.long, way="graph")
    cases["2:4 zeros"] = partial(two_of_four, size)
    return cases | {f"compiled, batch {rows}": partial(latency, size, rows, way="compiled") for rows in size.compiled}


@functools.cache
def subjects(size: Size, compiled: bool) -> dict[str, Any]:
    """Return a dense model, and what is left at half of its MACs: widths as they come, and in steps of 64."""
    dense = place(build("bert", size), torch.float16 if DEVICE == "cuda" else torch.float32)
    models = {"dense": dense}
    for name, step in {"pruned": 1, "pruned in 64s": 64 if size.inner > 256 else 8}.items():
        models[name] = copy.deepcopy(dense)
        pruners = [HeadPruner(score="l2"), NeuronPruner(score="l2", multiple_of=step)]
        prune(models[name], pruners, target=Target(macs=0.5))
    if compiled:  # a small CPU has no time for inductor
        backend = "inductor" if DEVICE == "cuda" else "eager"
        models.pop("pruned")
        models = {name: torch.compile(one, dynamic=True, backend=backend) for name, one in models.items()}
    return models


def latency(size: Size, rows: int, tokens: int = TOKENS, way: str = "eager") -> dict[str, Any]:
    """Time dense and pruned models in turn."""
    if way == "graph":
        need_gpu("A CUDA graph")
    models = subjects(size, way == "compiled")
    batch = draw(models["dense"], rows, tokens=tokens)
    run = graphed if way == "graph" else partial(partial, forward)
    times = in_turn({name: run(one, batch) for name, one in models.items()}, size.repeats)
    faster = {name: round(times["dense"] / taken, 2) for name, taken in times.items() if name != "dense"}
    return {"batch": rows, "tokens": tokens, "ms": times, "times_as_fast": faster}


def two_of_four(size: Size) -> dict[str, Any]:
    """Zero the two smallest weights of every four in a row; compare torch's sparse kernels with its dense ones."""
    need_gpu("torch's semi-structured sparsity")
    dense = place(build("bert", size), torch.float16)
    for module in (linear := [one for one in dense.base_model.encoder.modules() if isinstance(one, nn.Linear)]):
        fours = module.weight.data.view(-1, 4)
        fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0.0)
    sparse = copy.deepcopy(dense)
    for module in (one for one in sparse.base_model.encoder.modules() if isinstance(one, nn.Linear)):
        module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight.detach()), False)
    batch = draw(dense, 32)
    times = in_turn({"dense": partial(forward, dense, batch), "2:4": partial(forward, sparse, batch)}, size.repeats)
    expected, found = logits_of(dense, batch), logits_of(sparse, batch)
    told = {"matrices": len(linear), "kernels": type(module.weight).__name__, "batch": 32, "ms": times}
    told |= {"difference": largest(expected, found), "largest_logit": float(expected.abs().max())}
    return {**told, "right": told["difference"] <= CLOSE["fp16"] * told["largest_logit"]}


# 5: distilled
def distilled(size: Size) -> dict[str, Case]:
    return {"to a third of the MACs": partial(distil, size.middle)}


def task(rows: int, seed: int) -> dict[str, Tensor]:
    """Draw texts in which words of two groups stand among others; the label says which group has more."""
    by = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, WORDS, (rows, TOKENS // 2), generator=by)
    lean = torch.where(torch.rand(rows, 1, generator=by) < 0.5, 0.3, 0.7)
    first, marked = (torch.rand(ids.shape, generator=by) < share for share in (lean, 0.4))
    ids = torch.where(marked, torch.where(first, 5, 10) + ids % 5, ids)
    labels = ((marked & first).sum(1) > (marked & ~first).sum(1)).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def accuracy(model: Any, data: dict[str, Tensor]) -> float:
    batch = {name: one.to(model.device) for name, one in data.items()}
    return float((logits_of(model, batch).argmax(-1) == batch["labels"]).float().mean())


def distil(size: Size) -> dict[str, Any]:
    """Learn the task, prune gradually with the dense model as the teacher, save and load."""
    data, test = task(size.learning * 8, seed=1), task(1024, seed=2)
    rows = [{name: one[n] for name, one in data.items()} for n in range(len(data["labels"]))]
    model, size = build("bert", size), replace(size, batch=64 if DEVICE == "cuda" else 16)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"bf16": DEVICE == "cuda", "warmup_steps": size.learning // 10}
        Trainer(model, arguments_of(folder, size, size.learning, **settings), train_dataset=rows).train()
        before, start = accuracy(model, test), time.perf_counter()
        callback = PruningCallback(
            [HeadPruner(), NeuronPruner()], Schedule("cubic", end=0.7), target=Target(macs=1 / 3)
        )
        arguments = arguments_of(folder, size, size.learning, **settings)
        lesson = {"teacher": "self", "distillation": Distillation(hard=0.5, logits=0.5, hidden=1.0)}
        callback.attach(DistillationTrainer(model, arguments, train_dataset=rows, **lesson)).train()
        seconds, after = time.perf_counter() - start, accuracy(model, test)
        save_pruned(model, folder + "/final")
        loaded = accuracy(load_pruned(folder + "/final", device_map=DEVICE), test)
    left = callback.report.settings["macs_left"]
    told = {"accuracy": {"dense": before, "pruned": after, "loaded": loaded}, "macs_left": left}
    told |= {"steps": size.learning, "batch": size.batch, "seconds_of_pruning": round(seconds, 1)}
    return {**told, "right": left <= 1 / 3 and loaded == after and after >= before - 0.05}


PARTS = {
    "trainers": trainers,
    "wrappers": wrappers,
    "round trip": round_trips,
    "latency": latencies,
    "distilled": distilled,
}
