"""Processes of their own without the seconds that torch takes to import: forks of one that has imported it already.

One zygote is for clients whose settings are read when `huggingface_hub` is imported: it imports what needs none of
them. The other has imported all that a training needs: for examples, and for the ranks of tests with several processes.
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
TRAINING = ("transformers.trainer", "transformers.models.bert.modeling_bert", "accelerate", "datasets", "onnxruntime")
_zygotes: dict[str, subprocess.Popen[str]] = {}


def run_forked(
    code: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path,
    timeout: float = 300,
    *,
    kind: str = "client",
    ranks: Sequence[Mapping[str, str]] = ({},),
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process, as ``python -c code arguments`` would.

    Args:
        code: Of ``__main__``.
        arguments: Of ``sys.argv``.
        environment: The process', nothing beside it.
        cwd: Where it runs.
        timeout: Seconds, after which it is killed.
        kind: ``"client"``, or ``"training"``: with transformers imported already.
        ranks: What each process adds to the environment: so many run at once; the first that fails ends all.
    """
    if kind not in _zygotes or _zygotes[kind].poll() is not None:
        _zygotes[kind] = _start(kind)
    zygote = _zygotes[kind]
    with tempfile.TemporaryDirectory() as folder:
        asked = {"code": code, "arguments": list(arguments), "environment": dict(environment), "cwd": str(cwd)}
        asked |= {"ranks": [dict(one) for one in ranks]}
        zygote.stdin.write(json.dumps({**asked, "folder": folder, "timeout": timeout}) + "\n")
        zygote.stdin.flush()
        status = int(zygote.stdout.readline())
        out, err = (
            "".join(one.read_text(encoding="utf-8", errors="replace") for one in sorted(Path(folder).glob(f"{name}-*")))
            for name in ("out", "err")
        )
    if status == -9:
        raise subprocess.TimeoutExpired("a forked process", timeout, out, err)
    return subprocess.CompletedProcess([code, *arguments], status, out, err)


def _start(kind: str) -> subprocess.Popen[str]:
    plain = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    environment = plain if kind == "client" else {**os.environ}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__, kind], env=environment, text=True, **pipes)
    atexit.register(process.kill)
    return process


def _become(asked: dict, rank: int) -> None:
    """Be the process that was asked for; never returns."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"] | asked["ranks"][rank])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(asked["folder"], f"{name}-{rank}"), os.O_WRONLY | os.O_CREAT, 0o600), number)
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


def _serve(kind: str) -> None:
    for name in PRELOADED if kind == "client" else (*PRELOADED, *TRAINING):
        with contextlib.suppress(ImportError):  # not every lane has all of them
            __import__(name)
    assert kind != "client" or not any(name.startswith("huggingface_hub") for name in sys.modules)
    for line in sys.stdin:
        asked = json.loads(line)
        children = []
        for rank in range(len(asked["ranks"])):
            children.append(os.fork())
            if not children[-1]:
                _become(asked, rank)
        print(_wait(children, asked["timeout"]), flush=True)


def _wait(children: list[int], timeout: float) -> int:
    """Wait for all, or until one fails or the time is over, when the others are killed; return the status."""
    until, status, left = time.monotonic() + timeout, 0, set(children)
    while left:
        for child in list(left):
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                status = status or os.waitstatus_to_exitcode(code)
        if left and (status or time.monotonic() > until):
            status = status or -9
            for child in left:
                os.killpg(child, 9)
                os.waitpid(child, 0)
            break
        time.sleep(0.02)
    return status


if __name__ == "__main__":
    _serve(sys.argv[1])
