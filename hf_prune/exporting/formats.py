"""What a format needs, what its files are called, and who opens them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import PruningError
from .executorch import open_executorch
from .openvino import open_openvino
from .parity import Graph, open_onnx

Format = Literal["onnx", "openvino", "executorch"]


class FormatTraits(NamedTuple):
    """A row of `FORMATS`.

    Args:
        title: For messages.
        file: What a graph's file is called, given the graph's name.
        files: A pattern of all files of it.
        open: From a file and a number of threads.
        runtime: What a report calls the one who runs it.
        needs: Modules beside those of an ONNX export.
        needs_int8: More of them where it is quantized.
        also: What an error adds to the extra.
    """

    title: str
    file: str
    files: str
    open: Callable[[Path, int], Graph]
    runtime: str
    needs: tuple[str, ...] = ()
    needs_int8: tuple[str, ...] = ()
    also: str = ""


FORMATS: dict[str, FormatTraits] = {
    "onnx": FormatTraits("ONNX", "{}.onnx", "{}.onnx*", open_onnx, "onnxruntime"),
    "openvino": FormatTraits(
        "OpenVINO", "openvino_{}.xml", "openvino_{}.*", open_openvino, "openvino", ("openvino",), ("nncf",)
    ),
    "executorch": FormatTraits(
        "ExecuTorch",
        "{}.pte",
        "{}.pte",
        open_executorch,
        "executorch",
        ("transformers.exporters.exporter_executorch", "executorch.exir", "executorch.runtime"),
        also=" with transformers 5",
    ),
}


def require(name: str, quantize: str | None) -> None:
    """Make sure that what a format needs is installed.

    Raises:
        PruningError: It is not; names the extra.
    """
    row = FORMATS[name]
    try:
        for module in (*row.needs, *(row.needs_int8 if quantize else ())):
            import_module(module)
    except ImportError as error:
        raise PruningError(
            f"format='{name}' needs `pip install 'hf_prune[{name}]'`{row.also}. "
            f"Received: {error.name or error} is missing."
        ) from error
