"""Whether graphs compute what torch computes, at shapes other than the one that was traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import print as show
from torch import Tensor

from ..errors import PruningError
from .feeding import Batch, feed
from .parts import Part, draw_inputs

_CHECKED = ((1, 23), (3, 11))  # batch and length of the parity runs: neither is the traced one


@dataclass(frozen=True)
class Graph:
    """A graph that a runtime has opened.

    Args:
        inputs: Their names.
        run: From inputs to the outputs that are floats, by name.
    """

    inputs: tuple[str, ...]
    run: Callable[[Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class Bound:
    """How far a graph may be from torch.

    Args:
        name: Of what is compared, for messages: ``"ONNX"``.
        atol: Largest absolute difference; ``None``: a share of the largest output counts.
        share: Which one.
    """

    name: str
    atol: float | None
    share: float = 0.0

    def allowed(self, largest: float) -> float:
        """Return the absolute difference that is allowed where the largest output is so large."""
        return self.share * largest if self.atol is None else self.atol


def onnx_session(path: str | Path, threads: int = 1) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU, for checks and for measuring latency.

    Args:
        path: An ONNX file, or a folder with ``model.onnx``.
        threads: Threads within an operator, at least 1; operators run one after another.
    """
    import onnxruntime

    path = Path(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    file = path / "model.onnx" if path.is_dir() else path
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def open_onnx(file: Path, threads: int = 1) -> Graph:
    """Open an ONNX file in ONNX Runtime."""
    session = onnx_session(file, threads)
    names = [value.name for value in session.get_outputs() if "float" in value.type]

    def run(inputs: Batch) -> dict[str, Tensor]:
        computed = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, computed)))

    return Graph(tuple(value.name for value in session.get_inputs()), run)


def check_parity(
    model: Any, graphs: Sequence[tuple[Part, Graph]], task: str, bound: Bound, data: Sequence[Batch] = ()
) -> tuple[float, float]:
    """Return the largest difference to torch over all graphs and the checked shapes, and what was allowed.

    Args:
        model: In torch.
        graphs: What torch does the same as, and what was exported.
        task: Of the export.
        bound: How far they may be apart.
        data: Batches to compare on, in place of random ones.

    Raises:
        PruningError: They are further apart.
    """
    found = [
        _difference(model, part, graph, task, inputs)
        for part, graph in graphs
        for inputs in _batches(model, part, graph, data)
    ]
    return judge(found, bound, f"{len(data)} batches of data" if data else f"{len(_CHECKED)} shapes")


def judge(found: Sequence[Sequence[Any]], bound: Bound, ran: str) -> tuple[float, float]:
    """Return the largest difference, and what was allowed.

    Args:
        found: The largest difference and the largest output of each comparison.
        bound: How far they may be apart.
        ran: What was compared, for the message.

    Raises:
        PruningError: They are further apart.
    """
    difference, largest = torch.tensor(found).max(0).values.tolist()
    atol = bound.allowed(largest)
    message = f"largest difference {difference:.2g} (atol {atol:.2g}), {ran}"
    if not difference <= atol:  # written so that NaN fails too
        raise PruningError(
            f"The {bound.name} graph must compute what torch computes; nothing was written. Received: {message}"
        )
    show(f"{bound.name} parity: {message}")
    return difference, atol


def _batches(model: Any, part: Part, graph: Graph, data: Sequence[Batch]) -> Iterator[Batch]:
    if data:
        yield from (feed(batch, graph.inputs) for batch in data)
    else:
        yield from (draw_inputs(part, model.config, graph.inputs, *shape) for shape in _CHECKED)


def _difference(model: Any, part: Part, graph: Graph, task: str, inputs: Batch) -> tuple[float, float]:
    """Return the largest absolute difference over all float outputs, and the largest output; NaN stays NaN."""
    arguments = {"return_dict": True} if part.module is model else {}
    with torch.no_grad():
        expected = part.module(**inputs, **arguments)
    try:
        computed = graph.run(inputs)
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise PruningError(f"The exported graph fails. Received: {shapes} ({error})") from error
    mask = inputs.get("attention_mask") if task != "text-classification" else None
    pairs = [(_at_real_tokens(expected[name], mask), _at_real_tokens(value, mask)) for name, value in computed.items()]
    apart = torch.stack([(torch_s - theirs).abs().max() for torch_s, theirs in pairs])
    return float(apart.max()), float(torch.stack([torch_s.abs().max() for torch_s, _ in pairs]).max())


def _at_real_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Drop what stands at padding, where ``(batch, length)`` leads the shape: nobody reads it, and it may differ."""
    per_token = mask is not None and values.shape[:2] == mask.shape
    return values[mask == 1] if per_token else values
