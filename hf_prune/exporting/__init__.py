"""Models of any shape for other runtimes, by the libraries that exist, compared with torch after every export."""

from .parity import onnx_session
from .parts import TASKS
from .verb import Exported, OnnxExport, export, export_onnx

__all__ = ["TASKS", "Exported", "OnnxExport", "export", "export_onnx", "onnx_session"]
