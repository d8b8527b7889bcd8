"""ExecuTorch programs for phones and other small machines, by transformers' own exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .feeding import Batch
from .parity import Graph
from .parts import Part, draw_inputs

_TRACED = (2, 16)  # batch and length


def export_executorch(part: Part, folder: Path) -> None:
    """Write ``model.pte`` for the XNNPACK kernels of a CPU, with free batch and sequence sizes, and its configs."""
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    model: Any = part.module
    inputs = draw_inputs(part, model.config, [*part.axes], *_TRACED)
    # AUTO as in the ONNX lane: named sizes refuse a graph that has any bound on them
    axes = {name: dict.fromkeys(range(len(names)), torch.export.Dim.AUTO) for name, names in part.axes.items()}
    config = ExecutorchConfig(backend="xnnpack", dynamic=True, dynamic_shapes=axes)
    ExecutorchExporter().export(model, inputs, config=config).save_pretrained(folder)


def open_executorch(file: Path, threads: int = 1) -> Graph:
    """Open a program in ExecuTorch's runtime, which takes as many threads as it likes."""
    from transformers.exporters.base import ExportedModel

    model = ExportedModel.from_pretrained(file.parent)
    (component,) = model.components.values()

    def run(inputs: Batch) -> dict[str, Tensor]:
        computed = model(**inputs)
        return {name: value for name, value in computed.items() if torch.is_tensor(value)}

    return Graph(tuple(component.metadata.kwargs), run)
