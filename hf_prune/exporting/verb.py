"""`export` and `export_onnx`: the verbs, and what they say of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from rich import print as show

from ..errors import UnsupportedModelError
from .checks import check_past, check_places, check_settings, check_together
from .executorch import export_executorch
from .feeding import Batch, feed, read_batches
from .formats import FORMATS, Format, require
from .lanes import MANIFEST, Lane, choose_lane, export_parts, failing_as_ours, read_graph
from .norms import keep_sums_apart
from .openvino import to_openvino
from .parity import Bound, check_parity
from .parts import PAST, SEQ2SEQ, Part, choose_task, draw_inputs, split
from .precision import to_half, to_int8
from .preparing import private_model
from .publishing import export_folder, save_processors
from .steps import compare_steps

Quantize = Literal["dynamic", "static"]
_ATOL = 1e-4  # of fp32
_SHARES = {"fp16": 0.02, "int8": 0.25}  # of the largest output; a fine MiniLM in int8 is 13 % off, a broken one 40 %


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
        **figures: As in `OnnxExport`; `opset` is 0 for ExecuTorch, which has none.
        format: ``"onnx"``, ``"openvino"`` or ``"executorch"``.
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
        format: ``"onnx"``; ``"openvino"``: ``openvino_model.xml`` and ``.bin``, converted from the ONNX file (extra
            ``openvino``); ``"executorch"``: ``model.pte`` for CPUs, fp32, of models with one graph, on transformers 5
            (extra ``executorch``).
        quantize: ``None``; ``"dynamic"``: int8 weights, and activations scaled as the model runs; ``"static"``: scales
            of activations are found beforehand, on `data` (models of one graph only).
        data: Batches, mappings from inputs to tensors or arrays, of which the first 32 are read; int8 is compared with
            torch on them in place of random inputs.
        dtype: ``"fp32"``, or ``"fp16"`` with inputs and outputs in fp32.
        tokenizer: Tokenizer or processor to save beside the graph; by default the one in the checkpoint's folder.
        task: One of `TASKS`; ``"auto"`` takes it from the model class. Generation is exported without past, unless
            the task says so: ``"text-generation-with-past"`` (both lanes), ``"text2text-generation-with-past"``
            (optimum), in ONNX.
        opset: ONNX operator set, ``None`` for the lane's own default.
        lane: ``"optimum"`` (transformers 4.57), ``"native"`` (transformers 5) or ``"auto"``: the first that works.
        atol: Largest absolute difference allowed, over all float outputs at real tokens. ``None``: 1e-4 in fp32; in
            fp16 2 %, in int8 25 % of the largest output. That finds what is broken: what int8 costs, a metric tells.

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
    check_together(format, quantize, dtype, lane, opset, data)
    batches = [] if data is None else read_batches(data)
    require(format, quantize)
    chosen = "native" if format == "executorch" else choose_lane(lane)
    output = Path(output).absolute()
    with export_folder(output) as folder:
        model = private_model(model_or_path)
        task = choose_task(model, task)
        check_past(task, format, quantize, chosen)
        parts = [] if task.endswith(PAST) else split(model, task)
        _check_data(parts, batches)
        job = _Job(model, parts, folder, task, chosen, atol)
        if format == "executorch":
            said = _write_executorch(job)
        else:
            export_parts(model, parts, folder, task, opset, chosen)
            if (format, dtype) == ("onnx", "fp32"):  # fp16 is for GPUs, whose kernels are others
                for file in folder.glob("*.onnx"):
                    keep_sums_apart(file)
            said = _described(job)
            apart = job.compare("onnx", "fp32")
            if (format, quantize, dtype) != ("onnx", None, "fp32"):
                _convert(job, format, dtype, quantize, batches)
        save_processors(model_or_path, tokenizer, folder)
        numbers = "int8" if quantize else dtype
        if (format, numbers) != ("onnx", "fp32"):
            apart = job.compare(format, numbers, batches)
        if task in ("text-generation", *SEQ2SEQ):
            has = "" if chosen == "native" and task in SEQ2SEQ else f" (task='{task}{PAST}' has them)"
            show(f"Exported without past key values{has}; in optimum, load with use_cache=False.")
        figures = {**said, "max_difference": apart[0], "atol": apart[1], "size_mb": job.size_mb(format)}
    return Exported(output, chosen, task, **figures, format=format, dtype=numbers, quantize=quantize)


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


@dataclass(frozen=True)
class _Job:
    """What is exported, and where to."""

    model: Any
    parts: Sequence[Part]
    folder: Path
    task: str
    lane: Lane
    atol: float | None

    @property
    def names(self) -> list[str]:
        """Names of the graphs; with past, of those that the exporter makes of the model."""
        return [part.name for part in self.parts] or sorted(file.stem for file in self.folder.glob("*.onnx"))

    def compare(self, format: str, numbers: str, data: Sequence[Batch] = ()) -> tuple[float, float]:
        """Return the largest difference of the files to torch, and what was allowed."""
        row = FORMATS[format]
        atol = _ATOL if self.atol is None and numbers == "fp32" else self.atol
        bound = Bound(row.title if numbers == "fp32" else f"{numbers} {row.title}", atol, _SHARES.get(numbers, 0.0))
        if self.task.endswith(PAST):
            return compare_steps(self.model, self.folder, self.task.removesuffix(PAST), self.lane, bound)
        graphs = [(part, row.open(self.folder / row.file.format(part.name), 1)) for part in self.parts]
        return check_parity(self.model, graphs, self.task, bound, data)

    def size_mb(self, format: str) -> float:
        """Return the megabytes of graphs and weights."""
        found = self.folder.glob(FORMATS[format].files.format("*"))
        return sum(file.stat().st_size for file in found) / 1e6


def _check_data(parts: Sequence[Part], data: Sequence[Batch]) -> None:
    """Refuse data that do not fit before the export, which takes its time."""
    if len(parts) != 1 and data:
        rule = "data, and with it quantize='static', goes with models of one graph; quantize='dynamic' needs none"
        graphs = ", ".join(one.name for one in parts) or "with past"
        raise UnsupportedModelError(f"{rule}. Received: {len(parts) or 'several'} graphs ({graphs}).")
    for batch in data:
        feed(batch, [*parts[0].axes])


def _convert(job: _Job, format: str, dtype: str, quantize: str | None, data: Sequence[Batch]) -> None:
    """Make what was asked for from ONNX files in fp32; what is not of the format does not stay."""
    for name in job.names:
        file = job.folder / f"{name}.onnx"
        with failing_as_ours(f"{name} cannot be made {quantize or dtype} {format}"):
            if format == "openvino":
                to_openvino(file, job.folder / FORMATS[format].file.format(name), dtype, quantize, data)
            elif quantize is None:
                to_half(file)
            else:
                to_int8(file, data if quantize == "static" else None)
        if format == "openvino":
            for one in job.folder.glob(f"{name}.onnx*"):
                one.unlink()
    if format == "openvino":
        (job.folder / MANIFEST).unlink(missing_ok=True)


def _write_executorch(job: _Job) -> dict[str, Any]:
    """Write a program, and return what `OnnxExport` tells of graphs."""
    if len(job.parts) > 1:
        rule = "ExecuTorch programs are of models with one graph so far"
        raise UnsupportedModelError(f"{rule}. Received: {type(job.model).__name__}.")
    with failing_as_ours(f"ExecuTorch cannot export {type(job.model).__name__} as {job.task}"):
        export_executorch(job.parts[0], job.folder)
    inputs = draw_inputs(job.parts[0], job.model.config, [*job.parts[0].axes], 1, 4)
    with torch.no_grad():
        computed = job.model(**inputs, return_dict=True)
    return {"opset": 0, "inputs": tuple(inputs), "outputs": tuple(computed)}


def _described(job: _Job) -> dict[str, Any]:
    """Return what `OnnxExport` tells of graphs."""
    opsets, inputs, outputs = zip(*(read_graph(job.folder / f"{name}.onnx") for name in job.names))
    return {"opset": opsets[0], "inputs": _each_once(inputs), "outputs": _each_once(outputs)}


def _each_once(names: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in names for name in one))
