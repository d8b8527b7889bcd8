"""How fast exported files run and what they weigh, beside the model in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from ..report import steadiest, wall_clock
from .feeding import Batch, feed
from .formats import FORMATS
from .parity import Graph
from .verb import Exported


def open_exported(done: Exported, threads: int = 1) -> Graph:
    """Open what `export` wrote of a model with one graph, on the CPU.

    Args:
        done: What it returned.
        threads: Of one operator, at least 1.
    """
    row = FORMATS[done.format]
    return row.open(done.path / row.file.format("model"), threads)


def measure_exports(
    model: Any, exports: Sequence[Exported], inputs: Mapping[str, Any], *, threads: int = 1, repeats: int = 20
) -> list[dict[str, Any]]:
    """Time a model in torch and its exported files in turn, and return a row for each.

    Args:
        model: In torch, on the CPU.
        exports: What `export` returned for it.
        inputs: Of one forward.
        threads: Of one operator.
        repeats: Timed forwards of each; medians count.

    Returns:
        Rows with ``runtime``, ``dtype``, ``quantize``, ``folder``, ``size_mb``, ``latency_ms``, ``max_difference`` and
        ``atol``; the first is torch's.
    """
    batch: Batch = dict(inputs)
    graphs = [open_exported(done, threads) for done in exports]
    runs: dict[str, Any] = {"torch": partial(_forward, model.eval(), batch)}
    runs |= {done.path.name: partial(graph.run, feed(batch, graph.inputs)) for done, graph in zip(exports, graphs)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times, _ = steadiest({name: wall_clock(run) for name, run in runs.items()}, repeats=repeats)
    finally:
        torch.set_num_threads(before)
    latency = {name: median(one) for name, one in times.items()}
    size = sum(tensor.nbytes for tensor in {one.data_ptr(): one for one in model.state_dict().values()}.values())
    first = {"runtime": "torch", "dtype": "fp32", "size_mb": size / 1e6, "latency_ms": latency["torch"]}
    return [first, *(_row(done, latency[done.path.name]) for done in exports)]


def _row(done: Exported, latency_ms: float) -> dict[str, Any]:
    told = ("dtype", "quantize", "size_mb", "max_difference", "atol")
    figures = {name: getattr(done, name) for name in told}
    return {"runtime": FORMATS[done.format].runtime, "folder": done.path.name, **figures, "latency_ms": latency_ms}


@torch.no_grad()
def _forward(model: Any, batch: Batch) -> None:
    model(**batch)
