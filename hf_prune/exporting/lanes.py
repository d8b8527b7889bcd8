"""Who exports: optimum with transformers 4.57, or transformers itself from version 5 on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from ..errors import PruningError, did_you_mean
from .parts import PAST, Part, draw_inputs, draw_prompt

Lane = Literal["optimum", "native"]
MANIFEST = "export.json"  # what transformers' exporter writes beside its graphs
_TRACED = (2, 16)  # batch and length that the native lane traces with; optimum's default as well


def export_parts(model: Any, parts: Sequence[Part], folder: Path, task: str, opset: int | None, lane: Lane) -> None:
    """Write the graphs of a model, and its configs, into a folder.

    Raises:
        PruningError: The exporter fails, or writes another operator set than the one that was asked for.
    """
    with failing_as_ours(f"Lane '{lane}' cannot export {type(model).__name__} as {task}"):
        _LANES[lane][1](model, parts, folder, task, opset)
    written = [read_graph(file)[0] for file in folder.glob("*.onnx")]
    if opset is not None and {*written} != {opset}:
        raise PruningError(f"Lane '{lane}' writes opset {written[0]} here. Received: opset={opset}.")


def read_graph(file: Path) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Return the operator set of a graph, and the names of its inputs and outputs."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return opset, tuple(value.name for value in model.graph.input), tuple(value.name for value in model.graph.output)


def _export_optimum(model: Any, parts: Sequence[Part], folder: Path, task: str, opset: int | None) -> None:
    from optimum.exporters.onnx.convert import onnx_export_from_model

    # optimum looks for processors under this name, on the Hub too; pointed at the folder itself it stays offline.
    model.config._name_or_path = str(folder)
    speech = model.main_input_name == "input_features"  # of which optimum traces 30 seconds, whatever the config says
    shapes = {"nb_max_frames": 2 * model.config.max_source_positions} if speech else {}
    with _without_processors():
        onnx_export_from_model(model, folder, task=task, opset=opset, do_validation=False, **shapes)


@contextlib.contextmanager
def _without_processors() -> Iterator[None]:
    """Let optimum make up images for DINOv2 where the folder has no processor: it takes the last one unseen."""
    from optimum.utils import save_utils

    nobody = SimpleNamespace(save_pretrained=lambda folder: None)
    stock = save_utils.maybe_load_preprocessors
    save_utils.maybe_load_preprocessors = lambda *args, **kwargs: stock(*args, **kwargs) or [nobody]
    try:
        yield
    finally:
        save_utils.maybe_load_preprocessors = stock


def _export_native(model: Any, parts: Sequence[Part], folder: Path, task: str, opset: int | None) -> None:
    from transformers.exporters import exporter_onnx as native
    from transformers.exporters.base import ExportedModel

    if task.endswith(PAST):
        config = native.OnnxConfig(dynamic=True, opset_version=opset)
        told = model, draw_prompt(model, *_TRACED), config
        exported = native.OnnxExporter().export_for_generation(*told, multi_token_decode=True)
        for component in exported.components.values():
            _tidy(component.program, {})
        exported.save_pretrained(folder)
        return
    exporter, done = native.OnnxExporter(), {}
    for part in parts:
        inputs = draw_inputs(part, model.config, [*part.axes], *_TRACED)
        # AUTO and not named dimensions: those refuse a graph with any bound on the length (as a table of positions).
        axes = {name: dict.fromkeys(range(len(names)), torch.export.Dim.AUTO) for name, names in part.axes.items()}
        config = native.OnnxConfig(dynamic=True, dynamic_shapes=axes, opset_version=opset)
        exported = exporter.export(part.module, inputs, config=config)
        _tidy(exported.program, part.axes)
        done[part.name] = exported.components["model"]
    known = model.generation_config if len(parts) > 1 else None
    ExportedModel(done, exporter.export_format, config=model.config, generation_config=known).save_pretrained(folder)


# Lane -> what must be importable, and who exports; "auto" takes the first that works.
_LANES: dict[Lane, tuple[tuple[str, ...], Callable[[Any, Sequence[Part], Path, str, int | None], None]]] = {
    "optimum": (("onnxruntime", "optimum.exporters.onnx.convert"), _export_optimum),
    "native": (("onnx", "onnxscript", "onnxruntime", "transformers.exporters.exporter_onnx"), _export_native),
}


def choose_lane(lane: str) -> Lane:
    """Return the lane asked for, or the first that works; with the wrong transformers its import fails."""
    if lane not in ("auto", *_LANES):
        hint = did_you_mean(lane, _LANES)
        raise PruningError(f"lane must be 'auto', 'optimum' or 'native'. Received: {lane!r}.{hint}")
    missing = []
    for name in [known for known in _LANES if lane in ("auto", known)]:
        try:
            for module in _LANES[name][0]:
                import_module(module)
            return name
        except ImportError as error:
            missing.append(f"{name}: {error}")
    raise PruningError(
        "ONNX export needs `pip install 'hf_prune[onnx]'` with transformers 5, or `pip install 'hf_prune[optimum]'` "
        f"with transformers 4.57. Received: lane={lane!r} ({'; '.join(missing)})."
    )


def _tidy(program: Any, axes: dict[str, tuple[str, ...]]) -> None:
    """Drop stack traces (they hold paths of this machine), and give free axes readable names in place of ``s43``."""
    from onnx_ir import Shape
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program)
    symbols = {
        str(value.shape[axis]): name
        for value in program.graph.inputs
        for axis, name in enumerate(axes.get(value.name, ()))
    }
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.shape = Shape([symbols.get(str(size), size) for size in value.shape])


@contextlib.contextmanager
def failing_as_ours(what: str) -> Iterator[None]:
    """Run an exporter quietly; whatever it raises becomes an error that says what could not be done."""
    try:
        with quiet():
            yield
    except PruningError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise PruningError(f"{what}. Received: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters' progress, tracer and version warnings to themselves: the comparison judges the result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
