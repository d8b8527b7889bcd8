"""`export_onnx`: the verb, its checks, and what it says of the result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import print as show

from ..errors import PruningError, UnsupportedModelError
from ..given import told
from .lanes import Lane, choose_lane, export_parts, read_graph
from .parity import check_parity
from .parts import SEQ2SEQ, choose_task, split
from .preparing import private_model
from .publishing import export_folder, save_processors


@dataclass(frozen=True)
class OnnxExport:
    """What an export wrote and how close it is to torch.

    Args:
        path: The folder.
        lane: Who exported: ``"optimum"`` or ``"native"`` (transformers itself).
        task: One of `TASKS`.
        opset: ONNX operator set of the graphs.
        max_difference: Largest absolute difference to torch over all checked shapes and outputs.
        atol: The difference that was allowed.
        size_mb: Graphs and weights on disk, in 10^6 bytes.
        inputs: Names of what goes into the graph; into an encoder's and a decoder's, each name once.
        outputs: Names of what comes out.
    """

    path: Path
    lane: Lane
    task: str
    opset: int
    max_difference: float
    atol: float
    size_mb: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export_onnx(
    model_or_path: Any,
    output: str | Path,
    *,
    tokenizer: Any = None,
    task: str = "auto",
    dtype: str = "fp32",
    opset: int | None = None,
    lane: Literal["auto", "optimum", "native"] = "auto",
    atol: float = 1e-4,
) -> OnnxExport:
    """Write an ONNX folder with free batch and sequence sizes, and check that it computes what torch computes.

    A model with an encoder and a decoder gives two graphs, ``encoder_model.onnx`` and ``decoder_model.onnx``, any other
    ``model.onnx``. Nothing appears in `output` unless the comparison passes, and until then an earlier export stays.
    The model is copied, so it keeps its mode, device, dtype and config, and for the time of the export needs its memory
    twice. On lane ``"optimum"`` the folder loads with the
    ``ORTModelFor...`` class of the task, on lane ``"native"`` with transformers' ``ExportedModel``.

    Args:
        model_or_path: A transformers model, or the folder or Hub name of a checkpoint.
        output: The folder to write: a new one, an empty one, or an earlier export, which is then replaced.
        tokenizer: Tokenizer or processor to save beside the graph; by default the one in the checkpoint's folder.
        task: One of `TASKS`; ``"auto"`` takes it from the model class. Generation is exported without past.
        dtype: ``"fp32"``, so far the only one.
        opset: ONNX operator set, ``None`` for the lane's own default.
        lane: ``"optimum"`` (transformers 4.57), ``"native"`` (transformers 5) or ``"auto"``: the first that works.
        atol: Largest absolute difference allowed, over all float outputs at real tokens.

    Returns:
        What was written, and the largest difference.

    Raises:
        PruningError: If a setting is unknown, no lane is installed, the folder cannot be written, the exporter fails,
            or the outputs differ by more than `atol`.
        UnsupportedModelError: If the model has no task or inputs known here.

    Example:
        >>> export_onnx(model, "out/onnx", tokenizer=tokenizer).max_difference  # doctest: +SKIP
        3.1e-07
    """
    _check_settings(model_or_path, output, tokenizer, task, lane, dtype, opset, atol)
    chosen = choose_lane(lane)
    output = Path(output).absolute()
    with export_folder(output) as folder:
        model = private_model(model_or_path)
        task = choose_task(model, task)
        parts = split(model, task)
        export_parts(model, parts, folder, task, opset, chosen)
        if task in ("text-generation", *SEQ2SEQ):
            show("Exported without past key values; in optimum, load with use_cache=False.")
        save_processors(model_or_path, tokenizer, folder)
        difference = check_parity(model, parts, folder, task, atol)
    files = [output / f"{part.name}.onnx" for part in parts]
    size = sum(file.stat().st_size for one in files for file in output.glob(f"{one.name}*"))
    opsets, inputs, outputs = zip(*map(read_graph, files))
    return OnnxExport(
        output, chosen, task, opsets[0], difference, atol, size / 1e6, _each_once(inputs), _each_once(outputs)
    )


def _each_once(names: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in names for name in one))


def _check_settings(
    model: Any, output: Any, tokenizer: Any, task: Any, lane: Any, dtype: Any, opset: Any, atol: Any
) -> None:
    """Refuse wrong types here: further inside they would be somebody else's tracebacks."""
    for name, value in {"task": task, "lane": lane}.items():
        if not isinstance(value, str):
            raise PruningError(f"{name} must be a name. Received: {told(value)}.")
    if dtype != "fp32":
        raise PruningError(f"dtype must be 'fp32', the only one exported so far. Received: {dtype!r}.")
    if not isinstance(output, (str, os.PathLike)) or not str(output):
        raise PruningError(f"output must be the name of a folder. Received: {told(output)}.")
    if isinstance(model, type) or not (isinstance(model, (str, Path)) or hasattr(model, "forward")):
        rule = "model_or_path must be a model, a checkpoint's folder or its name on the Hub"
        raise UnsupportedModelError(f"{rule}. Received: {told(model)}.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise PruningError(f"tokenizer must be a tokenizer or a processor. Received: {told(tokenizer)}.")
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise PruningError(f"opset must be a whole number or None. Received: {told(opset)}.")
    if isinstance(atol, bool) or not isinstance(atol, (int, float)) or not atol >= 0:
        raise PruningError(f"atol must be a number of at least 0. Received: {told(atol)}.")
