"""Models of any shape for other runtimes, by the libraries that exist, compared with torch after every export."""

from .checks import check_wanted
from .feeding import feed
from .formats import FORMATS
from .lanes import quiet
from .measuring import measure_exports, open_exported
from .norms import keep_sums_apart
from .parity import onnx_session
from .parts import TASKS, check_exportable
from .precision import to_int8
from .verb import Exported, OnnxExport, export, export_onnx

__all__ = [
    "FORMATS",
    "TASKS",
    "Exported",
    "OnnxExport",
    "check_exportable",
    "check_wanted",
    "export",
    "export_onnx",
    "feed",
    "keep_sums_apart",
    "measure_exports",
    "onnx_session",
    "open_exported",
    "quiet",
    "to_int8",
]
