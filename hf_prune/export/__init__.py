"""ONNX export of a model of any shape, by optimum or by transformers itself, compared with torch after every export."""

from .exporting import OnnxExport, export_onnx
from .parity import onnx_session
from .parts import TASKS

__all__ = ["TASKS", "OnnxExport", "export_onnx", "onnx_session"]
