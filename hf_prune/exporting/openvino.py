"""OpenVINO's two files of a graph, made from its ONNX file, so that both lanes give the same; int8 by nncf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .feeding import Batch, feed
from .parity import Graph


def to_openvino(file: Path, made: Path, dtype: str, quantize: str | None, data: Sequence[Batch]) -> None:
    """Convert an ONNX file.

    Args:
        file: It.
        made: The ``.xml`` to write; its weights come beside it.
        dtype: ``"fp32"``, or ``"fp16"`` for weights in fp16.
        quantize: ``"dynamic"``: int8 weights, and activations as OpenVINO finds best on the processor;
            ``"static"``: int8 activations too, whose scales are found on the data; ``None``.
        data: To calibrate on.
    """
    import openvino

    model = openvino.convert_model(str(file))
    if quantize is not None:
        model = _int8(model, quantize, data)
    openvino.save_model(model, str(made), compress_to_fp16=dtype == "fp16")


def _int8(model: Any, quantize: str, data: Sequence[Batch]) -> Any:
    import nncf

    if quantize == "dynamic":
        return nncf.compress_weights(model)
    names = [_name(one) for one in model.inputs]
    fed = [{name: value.numpy() for name, value in feed(batch, names).items()} for batch in data]
    # half the range of weights: without it sums saturate on processors that have neither VNNI nor AMX
    careful = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    known = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(fed), "advanced_parameters": careful}
    return nncf.quantize(model, nncf.Dataset(fed), **known)


def _name(port: Any) -> str:
    """Return an input's or output's own name: a cast that was folded into it leaves its name there, a path."""
    return str(min(port.names, key=lambda name: ("/" in name, name)))


def open_openvino(file: Path, threads: int = 1) -> Graph:
    """Open an OpenVINO model on the CPU; what is not int8 is computed in fp32, also where bf16 would be faster."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    floats = [one for one in compiled.outputs if one.element_type.is_real()]

    def run(inputs: Batch) -> dict[str, Tensor]:
        computed = compiled({name: value.numpy() for name, value in inputs.items()})
        return {_name(one): torch.from_numpy(computed[one].copy()) for one in floats}

    return Graph(tuple(_name(one) for one in compiled.inputs), run)
