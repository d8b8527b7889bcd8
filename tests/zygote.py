"""Processes of their own without the seconds that torch takes to import: forks of one that has imported it already.

For clients whose settings are read when `huggingface_hub` is imported: the zygote imports what needs none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = (
    "torch",
    "numpy",
    "pydantic",
    "safetensors.torch",
    "yaml",
    "sklearn.metrics",
    "torchao",
    "httpx",
    "matplotlib.pyplot",
)
_zygote: list[subprocess.Popen[str]] = []


def run_forked(
    code: str, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process, as ``python -c code arguments`` would."""
    if not _zygote or _zygote[0].poll() is not None:
        _zygote[:] = [_start()]
    with tempfile.TemporaryDirectory() as folder:
        asked = {"code": code, "arguments": list(arguments), "environment": dict(environment), "cwd": str(cwd)}
        _zygote[0].stdin.write(json.dumps({**asked, "folder": folder, "timeout": timeout}) + "\n")
        _zygote[0].stdin.flush()
        status = int(_zygote[0].stdout.readline())
        out, err = (Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    if status == -9:
        raise subprocess.TimeoutExpired("a forked process", timeout, out, err)
    return subprocess.CompletedProcess([code, *arguments], status, out, err)


def _start() -> subprocess.Popen[str]:
    plain = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__], env=plain, text=True, **pipes)
    atexit.register(process.kill)
    return process


def _become(asked: dict) -> None:
    """Be the process that was asked for; never returns."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(asked["folder"], name), os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, closefd=False) for i, mode in enumerate("rww"))
    sys.argv = ["-c", *asked["arguments"]]
    sys.path[0] = ""
    status = 0
    try:
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # not every lane has all of them
            __import__(name)
    assert not any(name.startswith("huggingface_hub") for name in sys.modules)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            _become(asked)
        until, status = time.monotonic() + asked["timeout"], None
        while status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > until:
                os.kill(child, 9)
            else:
                time.sleep(0.02)
        print(status, flush=True)


if __name__ == "__main__":
    _serve()
