"""On what figures were measured."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def environment() -> dict[str, Any]:
    """Return on what figures were measured: processor, cores, versions and the date, for files of results."""
    packages = ("torch", "transformers", "datasets", "onnxruntime", "optimum-onnx")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "hf_prune": __version__,
        "date": date.today().isoformat(),
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text("utf-8") if information.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command_line() -> str:
    """Return the command that this program was started by, without the folder that it lies in."""
    name = Path(sys.argv[0]).name
    program = ["python", "-m", "hf_prune"] if name == "__main__.py" else [name]
    return shlex.join([*program, *sys.argv[1:]])
