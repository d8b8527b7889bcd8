"""`export` and `export_onnx`: the verbs, and what they say of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich import print as show

from ..errors import UnsupportedModelError
from .checks import check_places, check_settings, check_together
from .feeding import Batch, feed, read_batches
from .lanes import Lane, choose_lane, export_parts, read_graph
from .parity import Bound, check_parity, open_onnx
from .parts import SEQ2SEQ, Part, choose_task, split
from .precision import to_half, to_int8
from .preparing import private_model
from .publishing import export_folder, save_processors

Format = Literal["onnx"]
Quantize = Literal["dynamic", "static"]
_ATOL = 1e-4  # of fp32
_SHARES = {"fp16": 0.02, "int8": 0.1}  # of the largest output: coarser numbers differ in proportion to it


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


@dataclass(frozen=True)
class Exported(OnnxExport):
    """What an export wrote, in which numbers, and how close it is to torch.

    Args:
        **figures: As in `OnnxExport`.
        format: ``"onnx"``.
        dtype: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        quantize: ``"dynamic"``, ``"static"`` or ``None``.
    """

    format: Format
    dtype: str
    quantize: Quantize | None


def export(
    model_or_path: Any,
    output: str | Path,
    *,
    format: Format = "onnx",
    quantize: Quantize | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    dtype: Literal["fp32", "fp16"] = "fp32",
    tokenizer: Any = None,
    task: str = "auto",
    opset: int | None = None,
    lane: Literal["auto", "optimum", "native"] = "auto",
    atol: float | None = None,
) -> Exported:
    """Write a model for another runtime, in fp32, fp16 or int8, and check that it computes what torch computes.

    The graph is compared with torch in fp32, and again in the smaller numbers. As with `export_onnx`, nothing appears
    in `output` unless both pass, and the model stays as it is.

    Args:
        model_or_path: A transformers model, or the folder or Hub name of a checkpoint.
        output: The folder to write: a new one, an empty one, or an earlier export, which is then replaced.
        format: ``"onnx"``.
        quantize: ``None``; ``"dynamic"``: int8 weights, and activations scaled as the model runs; ``"static"``: scales
            of activations are found beforehand, on `data` (models of one graph only).
        data: Batches, mappings from inputs to tensors or arrays, of which the first 32 are read; int8 is compared with
            torch on them in place of random inputs.
        dtype: ``"fp32"``, or ``"fp16"`` with inputs and outputs in fp32.
        tokenizer: Tokenizer or processor to save beside the graph; by default the one in the checkpoint's folder.
        task: One of `TASKS`; ``"auto"`` takes it from the model class. Generation is exported without past.
        opset: ONNX operator set, ``None`` for the lane's own default.
        lane: ``"optimum"`` (transformers 4.57), ``"native"`` (transformers 5) or ``"auto"``: the first that works.
        atol: Largest absolute difference allowed, over all float outputs at real tokens. ``None``: 1e-4 in fp32; in
            fp16 2 %, in int8 10 % of the largest output. That finds what is broken: what int8 costs, a metric tells.

    Returns:
        What was written, the largest difference, and what was allowed.

    Raises:
        PruningError: A setting is unknown or does not go with another, no lane is installed, the folder cannot be
            written, the exporter fails, or the outputs differ by more than `atol`.
        UnsupportedModelError: The model has no task or inputs known here.

    Example:
        >>> export(model, "out/int8", quantize="dynamic").size_mb  # doctest: +SKIP
        12.3
    """
    settings = {"format": format, "quantize": quantize, "dtype": dtype, "task": task, "lane": lane}
    check_settings({**settings, "opset": opset, "atol": atol})
    check_places(model_or_path, output, tokenizer)
    check_together(quantize, dtype, data)
    batches = [] if data is None else read_batches(data)
    chosen = choose_lane(lane)
    output = Path(output).absolute()
    with export_folder(output) as folder:
        model = private_model(model_or_path)
        task = choose_task(model, task)
        parts = split(model, task)
        _check_data(parts, batches)
        export_parts(model, parts, folder, task, opset, chosen)
        if task in ("text-generation", *SEQ2SEQ):
            show("Exported without past key values; in optimum, load with use_cache=False.")
        save_processors(model_or_path, tokenizer, folder)
        apart, allowed = _check(model, parts, folder, task, Bound("ONNX", _ATOL if atol is None else atol), [])
        numbers = "int8" if quantize else dtype
        if numbers != "fp32":
            _make_smaller(parts, folder, quantize, batches)
            bound = Bound(f"{numbers} ONNX", atol, _SHARES[numbers])
            apart, allowed = _check(model, parts, folder, task, bound, batches)
    said: dict[str, Any] = {"format": format, "dtype": numbers, "quantize": quantize}
    return Exported(output, chosen, task, **_described(output, parts), max_difference=apart, atol=allowed, **said)


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
        dtype: ``"fp32"`` or ``"fp16"``; `export` has int8 and other formats.
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
    settings: dict[str, Any] = {"tokenizer": tokenizer, "task": task, "dtype": dtype, "opset": opset, "lane": lane}
    done = export(model_or_path, output, atol=atol, **settings)
    return OnnxExport(**{one.name: getattr(done, one.name) for one in fields(OnnxExport)})


def _check(
    model: Any, parts: Sequence[Part], folder: Path, task: str, bound: Bound, data: Sequence[Batch]
) -> tuple[float, float]:
    graphs = [(part, open_onnx(folder / f"{part.name}.onnx")) for part in parts]
    return check_parity(model, graphs, task, bound, data)


def _check_data(parts: Sequence[Part], data: Sequence[Batch]) -> None:
    """Refuse data that do not fit before the export, which takes its time."""
    if len(parts) > 1 and data:
        rule = "data, and with it quantize='static', goes with models of one graph; quantize='dynamic' needs none"
        raise UnsupportedModelError(f"{rule}. Received: {len(parts)} graphs ({', '.join(one.name for one in parts)}).")
    for batch in data:
        feed(batch, [*parts[0].axes])


def _make_smaller(parts: Sequence[Part], folder: Path, quantize: str | None, data: Sequence[Batch]) -> None:
    for file in [folder / f"{part.name}.onnx" for part in parts]:
        if quantize is None:
            to_half(file)
        else:
            to_int8(file, data if quantize == "static" else None)


def _described(output: Path, parts: Sequence[Part]) -> dict[str, Any]:
    """Return what `OnnxExport` tells of the graphs."""
    files = [output / f"{part.name}.onnx" for part in parts]
    size = sum(file.stat().st_size for one in files for file in output.glob(f"{one.name}*"))
    opsets, inputs, outputs = zip(*map(read_graph, files))
    names = {"inputs": _each_once(inputs), "outputs": _each_once(outputs)}
    return {"opset": opsets[0], "size_mb": size / 1e6, **names}


def _each_once(names: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in names for name in one))
