"""Ctrl-C: what a run or a search has kept until then, and how to go on."""

from __future__ import annotations

import _thread
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .card import RECIPE, REPORT
from .workflow import say

INTERRUPTED = 130  # the exit status of what a signal has ended, as shells say it
_AGAIN = 0.1  # seconds until what was lost is sent again


@contextmanager
def or_say_what_was_kept(kept: Callable[[float], str]) -> Iterator[None]:
    """Let Ctrl-C end the process without a traceback, but with a word on what there is.

    Args:
        kept: From the time when all began (seconds since 1970) to what is to be said.

    Raises:
        SystemExit: Ctrl-C was pressed.
    """
    began = time.time()
    try:
        with _until_it_arrives():
            yield
    except KeyboardInterrupt:
        say(f"Stopped. {kept(began)}")
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def _until_it_arrives() -> Iterator[None]:
    """Send Ctrl-C again where it was lost.

    Python drops what is raised in `__del__`, in a callback of a weak reference or of C code; libraries collect garbage
    in the midst of their work, and what falls there would reach nobody. `sys.unraisablehook` is told of it.
    """
    before, again = sys.unraisablehook, list[threading.Timer]()

    def hear(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:  # not from here: it would be dropped too
            again.append(threading.Timer(_AGAIN, _thread.interrupt_main))
            again[-1].start()
        else:
            before(lost)

    sys.unraisablehook = hear
    try:
        yield
    finally:
        sys.unraisablehook = before
        for one in again:
            one.cancel()


def kept_of_run(output: Path, since: float) -> str:
    """Return what a run has written into its folder, and the command that goes on from there.

    Args:
        output: The folder of the run.
        since: When it began, in seconds since 1970: what is older is of another run.
    """
    written = [path for path in (output / "dense", output / "model") if _is_new(path / "config.json", since)]
    if not _is_new(output / RECIPE, since):
        return "Nothing was written: the same command begins again."
    again = ["hf-prune", "run", str(output / RECIPE)]
    if output / "dense" in written:
        again += [f"model={json.dumps({'name': str(output / 'dense')})}", "dense=null"]
    kept = " and ".join(str(path) for path in written) or "the recipe alone"
    return f"Kept: {kept}. This goes on from there: {shlex.join(again)}"


def kept_of_search(output: Path) -> str:
    """Return how many trials of a search have ended."""
    ended = len([*output.glob(f"trials/*/{REPORT}")])
    return f"Kept: {ended} trial{'s' * (ended != 1)} that ended, in {output}. The same command goes on behind them."


def _is_new(path: Path, since: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= since - 1  # file systems round
