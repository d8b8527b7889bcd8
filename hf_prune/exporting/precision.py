"""Smaller numbers in an ONNX file: int8 and fp16, by ONNX Runtime's own tools, so that both lanes give the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .feeding import Batch, feed

# What static quantization turns to int8: with all that ONNX Runtime offers (Softmax, Add, Mul, Gather, …) decoders
# lost 40 to 80 % of their logits, and T5's encoder did not run.
_STATIC = ("MatMul", "Gemm", "Conv")
_SMALL = 256  # bytes of a tensor that stays in the graph: ONNX Runtime wants to read shapes there


def to_half(file: Path) -> None:
    """Store and compute in fp16; what goes in and comes out stays fp32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _replace(file, convert_float_to_float16(onnx.load(str(file)), keep_io_types=True))


def to_int8(file: Path, data: Sequence[Batch] | None = None) -> None:
    """Store and multiply in int8: every output channel of a matrix has a scale.

    Weights are signed and fill half of their range, which is right and fast on every processor. Those without VNNI or
    AMX add products of bytes in 16 bits: with whole signed bytes the sums saturate (a tiny ViT was 37 % off). Those
    with VNNI or AMX have no fast kernel for unsigned weights: MiniLM-L6 ran no faster than in fp32, and 2.6 times as
    fast with signed ones.

    Args:
        file: Rewritten in place.
        data: Batches to calibrate on; ``None``: scales of activations are found as it runs.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    settings: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8, "reduce_range": True}
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        settings["use_external_data_format"] = _data_beside(file) is not None
        if data is None:
            quantize_dynamic(str(file), str(made), **settings)
        else:
            settings |= {"activation_type": QuantType.QUInt8, "op_types_to_quantize": [*_STATIC]}
            only_weights = {"MatMulConstBOnly": True}  # products of two activations, in attention, stay fp32
            quantize_static(str(file), str(made), _reader(file, data), extra_options=only_weights, **settings)
        _replace(file, onnx.load(str(made)))


def _reader(file: Path, data: Sequence[Batch]) -> Any:
    """Return the batches in the form in which ONNX Runtime reads them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = [value.name for value in onnx.load(str(file), load_external_data=False).graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Batch] = (feed(batch, names) for batch in data)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: value.numpy() for name, value in batch.items()}

    return Reader()


def _data_beside(file: Path) -> str | None:
    """Return the name of the file with a graph's weights, where they are not in the graph's own."""
    return next((one.name for one in file.parent.glob(f"{file.name}?*") if one.is_file()), None)


def _replace(file: Path, model: Any) -> None:
    """Write a graph in the form of the one before: a loader that expects weights beside it finds them there."""
    import onnx

    beside = _data_beside(file)
    where: dict[str, Any] = {}
    if beside is not None:
        (file.parent / beside).write_bytes(b"")  # onnx appends
        where = {"save_as_external_data": True, "location": beside, "size_threshold": _SMALL}
    onnx.save(model, str(file), **where)
