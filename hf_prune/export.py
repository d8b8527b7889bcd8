"""ONNX export of a model of any shape, by optimum or by transformers itself, compared with torch after every export."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from rich import print as show

from .errors import PruningError, UnsupportedModelError, did_you_mean
from .skipping import is_skipped

Lane = Literal["optimum", "native"]

# Task -> how the names of its model classes end; the first that fits wins, so the plain "Model" comes last.
TASKS: dict[str, tuple[str, ...]] = {
    "text-classification": ("ForSequenceClassification",),
    "token-classification": ("ForTokenClassification",),
    "question-answering": ("ForQuestionAnswering",),
    "image-classification": ("ForImageClassification",),
    "fill-mask": ("ForMaskedLM",),
    "text-generation": ("ForCausalLM", "LMHeadModel"),
    "feature-extraction": ("Model",),
}
# Axes whose size is free at run time, by the model's main input.
_AXES = {"input_ids": ("batch_size", "sequence_length"), "pixel_values": ("batch_size",)}
_TRACED = (2, 16)  # batch and length that the native lane traces with; optimum's default as well
_CHECKED = ((1, 23), (3, 11))  # batch and length of the parity runs: neither is the traced one
# What belongs to a tokenizer or processor, so that an export of a folder can be used without the folder.
_PROCESSOR_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*", "*processor_config.json")


@dataclass(frozen=True)
class OnnxExport:
    """What an export wrote and how close it is to torch.

    Args:
        path: The folder.
        lane: Who exported: ``"optimum"`` or ``"native"`` (transformers itself).
        task: One of `TASKS`.
        opset: ONNX operator set of the graph.
        max_difference: Largest absolute difference to torch over all checked shapes and outputs.
        atol: The difference that was allowed.
        size_mb: Graph and weights on disk, in 10^6 bytes.
        inputs: Names of what goes into the graph.
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

    Nothing appears in `output` unless the comparison passes. The model is copied, so it keeps its mode, device, dtype
    and config, and for the time of the export needs its memory twice. On lane ``"optimum"`` the folder loads with the
    ``ORTModelFor...`` class of the task, on lane ``"native"`` with transformers' ``ExportedModel``.

    Args:
        model_or_path: A transformers model, or the folder or Hub name of a checkpoint.
        output: The folder to write: a new one, an empty one, or an earlier export, which is then replaced.
        tokenizer: Tokenizer or processor to save beside the graph; by default the one in the checkpoint's folder.
        task: One of `TASKS`; ``"auto"`` takes it from the model class. Text generation is exported without past.
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
    if dtype != "fp32":
        raise PruningError(f"dtype must be 'fp32', the only one exported so far. Received: {dtype!r}.")
    chosen = _choose_lane(lane)
    output = Path(output).absolute()
    with _staging(output) as folder:
        model = _load(model_or_path)
        task = _choose_task(model, task)
        _export(model, folder, task, opset, chosen)
        _save_processors(model_or_path, tokenizer, folder)
        difference = _check_parity(model, folder, task, atol)
        _publish(folder, output)
    size = sum(file.stat().st_size for file in output.glob("model.onnx*"))
    written, inputs, outputs = _read_graph(output)
    return OnnxExport(output, chosen, task, written, difference, atol, size / 1e6, inputs, outputs)


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


def _export_optimum(model: Any, folder: Path, task: str, opset: int | None) -> None:
    from optimum.exporters.onnx.convert import onnx_export_from_model

    # optimum looks for processors under this name, on the Hub too; pointed at the folder itself it stays offline.
    model.config._name_or_path = str(folder)
    onnx_export_from_model(model, folder, task=task, opset=opset, do_validation=False)


def _export_native(model: Any, folder: Path, task: str, opset: int | None) -> None:
    from transformers.exporters import exporter_onnx as native

    inputs = _draw_inputs(model.config, _native_inputs(model, task), *_TRACED)
    # AUTO and not named dimensions: those refuse a graph with any bound on the length (a table of positions has one).
    axes = dict.fromkeys(range(len(_AXES[model.main_input_name])), torch.export.Dim.AUTO)
    config = native.OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, axes), opset_version=opset)
    exported = native.OnnxExporter().export(model, inputs, config=config)
    _tidy(exported.program, _AXES[model.main_input_name])
    exported.save_pretrained(folder)


# Lane -> what must be importable, and who exports; "auto" takes the first that works.
_LANES: dict[Lane, tuple[tuple[str, ...], Callable[[Any, Path, str, int | None], None]]] = {
    "optimum": (("onnxruntime", "optimum.exporters.onnx.convert"), _export_optimum),
    "native": (("onnx", "onnxscript", "onnxruntime", "transformers.exporters.exporter_onnx"), _export_native),
}


def _choose_lane(lane: str) -> Lane:
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


def _native_inputs(model: Any, task: str) -> list[str]:
    """Return the inputs that the native graph shall have; for text the same that optimum gives."""
    if model.main_input_name == "pixel_values":
        return ["pixel_values"]
    wanted = {
        "input_ids": True,
        "attention_mask": True,
        "token_type_ids": (getattr(model.config, "type_vocab_size", 0) or 0) > 1,
        "position_ids": task == "text-generation",
    }
    return [name for name in inspect.signature(model.forward).parameters if wanted.get(name)]


def _tidy(program: Any, axes: Sequence[str]) -> None:
    """Drop stack traces (they hold paths of this machine), and give free axes readable names in place of ``s43``."""
    from onnx_ir import Shape
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program)
    symbols = {str(value.shape[axis]): name for value in program.graph.inputs for axis, name in enumerate(axes)}
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.shape = Shape([symbols.get(str(size), size) for size in value.shape])


def _export(model: Any, folder: Path, task: str, opset: int | None, lane: Lane) -> None:
    try:
        with _quiet():
            _LANES[lane][1](model, folder, task, opset)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise PruningError(
            f"Lane '{lane}' cannot export {type(model).__name__} as {task}. Received: {reason}"
        ) from error
    if opset not in (None, _read_graph(folder)[0]):
        raise PruningError(f"Lane '{lane}' writes opset {_read_graph(folder)[0]} here. Received: opset={opset}.")
    if task == "text-generation":
        show("Exported without past key values; in optimum, load with use_cache=False.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress, tracer and version warnings to themselves: the comparison judges the result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _load(model_or_path: Any) -> Any:
    """Return a private fp32 copy on the CPU in evaluation mode, so that exporters may change what they like."""
    if isinstance(model_or_path, str | Path):
        from .checkpoint import load_pruned

        model = load_pruned(model_or_path, dtype=torch.float32)
    else:
        model = _copy(model_or_path)
    model = model.cpu().float().eval()
    wanted = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "dtype": torch.float32}
    for name, value in wanted.items():
        if getattr(model.config, name, None):
            setattr(model.config, name, value)
    model.config.architectures = [type(model).__name__]
    return model


def _copy(model: Any) -> Any:
    """Copy a model without what accelerate or a device map wrapped around it."""
    from accelerate.utils import extract_model_from_parallel
    from transformers import PreTrainedModel

    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(inner, PreTrainedModel):
        rule = "Only transformers models can be exported (merge adapters first, with `merge_and_unload`)"
        raise UnsupportedModelError(f"{rule}. Received: {type(inner).__name__}.")
    copied = copy.deepcopy(inner)
    for module in copied.modules():  # mixed precision and device maps set a `forward` over the class's own
        if not is_skipped(module):
            module.__dict__.pop("forward", None)
    return copied


def _choose_task(model: Any, task: str) -> str:
    name = type(model).__name__
    if task == "auto":
        task = next((known for known, endings in TASKS.items() if name.endswith(endings)), f"auto, for {name}")
    if task not in TASKS:
        raise PruningError(f"task must be one of {', '.join(TASKS)}. Received: {task}.{did_you_mean(task, TASKS)}")
    if model.main_input_name not in _AXES or model.config.is_encoder_decoder:
        rule = "Only text and image models without a separate decoder can be exported so far"
        raise UnsupportedModelError(f"{rule}. Received: {name}.")
    return task


def _draw_inputs(config: Any, names: Sequence[str], batch: int, length: int) -> dict[str, torch.Tensor]:
    """Return random inputs by name; the second row of a text is padded on the right, the third on the left."""
    text = config.get_text_config()
    length, pad = min(length, _most_tokens(text)), getattr(text, "pad_token_id", None) or 0
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, length - length // 3 :] = 0
    mask[2:3, : length // 3] = 0
    draw = torch.Generator().manual_seed(batch)
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: torch.randint(text.vocab_size, mask.shape, generator=draw).masked_fill(mask == 0, pad),
        "attention_mask": lambda: mask,
        "token_type_ids": lambda: torch.randint(text.type_vocab_size, mask.shape, generator=draw),
        "position_ids": lambda: (mask.cumsum(-1) - 1).clamp(min=0),
        "pixel_values": lambda: torch.randn(batch, *_image_shape(config), generator=draw),
    }
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise UnsupportedModelError(f"Inputs can be {', '.join(makers)}. Received: {', '.join(unknown)}.")
    return {name: makers[name]() for name in names}


def _most_tokens(config: Any) -> int:
    """Return how many tokens fit; RoBERTa's table of positions starts counting after the padding token."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    return positions - 1 - (getattr(config, "pad_token_id", None) or 0) if positions > 0 else 512


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _check_parity(model: Any, folder: Path, task: str, atol: float) -> float:
    """Return the largest difference to torch over the checked shapes, or raise when it is over `atol`."""
    session = onnx_session(folder)
    difference = float(torch.stack([_difference(model, session, task, *shape) for shape in _CHECKED]).max())
    message = f"largest difference {difference:.2g} (atol {atol:.2g}), {len(_CHECKED)} shapes"
    if not difference <= atol:  # written so that NaN fails too
        raise PruningError(f"The ONNX graph does not compute what torch computes: {message}. Nothing was written.")
    show(f"ONNX parity: {message}")
    return difference


def _difference(model: Any, session: Any, task: str, batch: int, length: int) -> torch.Tensor:
    """Return the largest absolute difference over all float outputs at one shape, ``()``; NaN stays NaN."""
    inputs = _draw_inputs(model.config, [value.name for value in session.get_inputs()], batch, length)
    with torch.no_grad():
        expected = model(**inputs, return_dict=True)
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


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the disk of `output`, and leave nothing of it behind; a bad `output` fails here."""
    _refuse_foreign(output)
    where = next(folder for folder in (output, *output.parents) if folder.exists())
    try:
        temporary = tempfile.TemporaryDirectory(dir=where, prefix=".onnx-")
    except OSError as error:
        raise PruningError(f"output must be a folder that can be written. Received: {output} ({error}).") from error
    with temporary as name:
        folder = Path(name) / "export"  # a folder of its own, since temporary ones are closed to other users
        folder.mkdir()
        yield folder


def _refuse_foreign(output: Path) -> None:
    """Keep an export from overwriting a checkpoint's config, or anything else of the user's."""
    found = {file.name for file in output.iterdir()} if output.is_dir() else set()
    if found and ("model.onnx" not in found or any(name.endswith((".safetensors", ".bin")) for name in found)):
        received = f"{output}, which holds {', '.join(sorted(found)[:3])}. Did you mean {output / 'onnx'}?"
        raise PruningError(f"output must be a new folder, an empty one or an earlier export. Received: {received}")


def _publish(folder: Path, output: Path) -> None:
    """Move the finished export to its place; an existing folder gets the new files one by one."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, output)
        return
    for stale in output.glob("model.onnx*"):
        stale.unlink()
    for file in folder.iterdir():
        os.replace(file, output / file.name)


def _save_processors(model_or_path: Any, tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif isinstance(model_or_path, str | Path):
        for pattern in _PROCESSOR_FILES:
            for file in Path(model_or_path).glob(pattern):
                shutil.copy(file, folder)


def _read_graph(folder: Path) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Return the opset and the names of inputs and outputs."""
    import onnx

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return opset, tuple(value.name for value in model.graph.input), tuple(value.name for value in model.graph.output)
