"""Whether graphs compute what torch computes, at shapes other than the one that was traced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import print as show

from ..errors import PruningError
from .parts import Part, draw_inputs

_CHECKED = ((1, 23), (3, 11))  # batch and length of the parity runs: neither is the traced one


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


def check_parity(model: Any, parts: Sequence[Part], folder: Path, task: str, atol: float) -> float:
    """Return the largest difference to torch over all graphs and the checked shapes.

    Raises:
        PruningError: It is over `atol`.
    """
    errors = []
    for part in parts:
        session = onnx_session(folder / f"{part.name}.onnx")
        errors += [_difference(model, part, session, task, *shape) for shape in _CHECKED]
    difference = float(torch.stack(errors).max())
    message = f"largest difference {difference:.2g} (atol {atol:.2g}), {len(_CHECKED)} shapes"
    if not difference <= atol:  # written so that NaN fails too
        raise PruningError(f"The ONNX graph does not compute what torch computes: {message}. Nothing was written.")
    show(f"ONNX parity: {message}")
    return difference


def _difference(model: Any, part: Part, session: Any, task: str, batch: int, length: int) -> torch.Tensor:
    """Return the largest absolute difference over all float outputs at one shape, ``()``; NaN stays NaN."""
    inputs = draw_inputs(part, model.config, [value.name for value in session.get_inputs()], batch, length)
    arguments = {"return_dict": True} if part.module is model else {}
    with torch.no_grad():
        expected = part.module(**inputs, **arguments)
    names = [value.name for value in session.get_outputs() if "float" in value.type]
    try:
        computed = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    except Exception as error:
        raise PruningError(f"The ONNX graph fails at batch {batch}, length {length}: {error}") from error
    mask = inputs.get("attention_mask") if task != "text-classification" else None
    errors = [expected[name] - torch.from_numpy(array) for name, array in zip(names, computed)]
    return torch.stack([_at_real_tokens(error, mask).abs().max() for error in errors]).max()


def _at_real_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Drop what stands at padding, where ``(batch, length)`` leads the shape: nobody reads it, and it may differ."""
    per_token = mask is not None and values.shape[:2] == mask.shape
    return values[mask == 1] if per_token else values
