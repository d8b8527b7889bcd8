"""Wrong settings of an export are refused here: further inside they would be somebody else's tracebacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PruningError, UnsupportedModelError, did_you_mean
from ..given import told
from .formats import FORMATS, require
from .lanes import choose_lane
from .parts import PAST, SEQ2SEQ

QUANTIZED = (None, "dynamic", "static")
DTYPES = ("fp32", "fp16")


def check_places(model: Any, output: Any, tokenizer: Any) -> None:
    """Refuse what is no model, no folder, no tokenizer."""
    if not isinstance(output, (str, os.PathLike)) or not str(output):
        raise PruningError(f"output must be the name of a folder. Received: {told(output)}.")
    if isinstance(model, type) or not (isinstance(model, (str, Path)) or hasattr(model, "forward")):
        rule = "model_or_path must be a model, a checkpoint's folder or its name on the Hub"
        raise UnsupportedModelError(f"{rule}. Received: {told(model)}.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise PruningError(f"tokenizer must be a tokenizer or a processor. Received: {told(tokenizer)}.")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse values of a wrong type, and unknown names."""
    for name in ("task", "lane"):
        if not isinstance(settings[name], str):
            raise PruningError(f"{name} must be a name. Received: {told(settings[name])}.")
    for name, known in {"format": (*FORMATS,), "quantize": QUANTIZED, "dtype": DTYPES}.items():
        if settings[name] not in known:
            hint = did_you_mean(str(settings[name]), [one for one in known if one])
            raise PruningError(f"{name} must be {_either(known)}. Received: {settings[name]!r}.{hint}")
    opset, atol = settings["opset"], settings["atol"]
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise PruningError(f"opset must be a whole number or None. Received: {told(opset)}.")
    if atol is not None and (isinstance(atol, bool) or not isinstance(atol, (int, float)) or not atol >= 0):
        raise PruningError(f"atol must be a number of at least 0. Received: {told(atol)}.")


def check_together(format: str, quantize: str | None, dtype: str, lane: str, opset: int | None, data: Any) -> None:
    """Refuse settings that do not go together."""
    if format == "executorch" and (quantize is not None or dtype != "fp32"):
        raise PruningError(f"ExecuTorch is exported in fp32 so far. Received: {quantize!r} and {dtype!r}.")
    if format == "executorch" and (lane == "optimum" or opset is not None):
        rule = "ExecuTorch is exported by transformers 5 itself, and has no operator set"
        raise PruningError(f"{rule}. Received: lane={lane!r}, opset={opset}.")
    if quantize is not None and dtype != "fp32":
        raise PruningError(f"Either quantize or dtype makes numbers smaller. Received: {quantize!r} and {dtype!r}.")
    if quantize == "static" and data is None:
        raise PruningError("quantize='static' calibrates on data: pass some batches. Received: data=None.")
    if quantize is None and data is not None:
        raise PruningError("data is what quantize='static' or 'dynamic' is tried on. Received: data, quantize=None.")


def check_wanted(model: Any, format: str, quantize: str | None) -> None:
    """Refuse before a model is trained what its export would refuse afterwards.

    Raises:
        PruningError: A package is missing.
        UnsupportedModelError: The model has several graphs, and only one will do.
    """
    require(format, quantize)
    choose_lane("native" if format == "executorch" else "auto")
    if model.config.is_encoder_decoder and (format == "executorch" or quantize == "static"):
        rule = "ExecuTorch and quantize='static' are for models of one graph: quantize='dynamic' takes others"
        raise UnsupportedModelError(f"{rule}. Received: {type(model).__name__}, {format}, quantize={quantize!r}.")


def check_past(task: str, format: str, quantize: str | None, lane: str) -> None:
    """Refuse a task with past where there is no way to export it."""
    if not task.endswith(PAST):
        return
    if format != "onnx" or quantize == "static":
        rule = "Tasks with past are exported to ONNX, in fp32, fp16 or with quantize='dynamic'"
        raise UnsupportedModelError(f"{rule}. Received: task={task!r}, format={format!r}, quantize={quantize!r}.")
    if lane == "native" and task.removesuffix(PAST) in SEQ2SEQ:
        rule = f"Encoders with decoders are exported with past by lane 'optimum'; leave '{PAST}' out on transformers 5"
        raise UnsupportedModelError(f"{rule}. Received: task={task!r}.")


def _either(known: tuple[str | None, ...]) -> str:
    *most, last = map(repr, known)
    return f"{', '.join(most)} or {last}" if most else last
