"""Set up both lanes and run everything that must pass: `python3 tests/lanes.py [--whole] [pytest arguments]`.

Of the files in `IN_TURNS` each test runs on one of the lanes, by its name; with `--whole` all run on both, as they must
before a release. A test that asks which lane it is on always runs on both.

Each lane has a virtualenv at the repository's root, made on the first run and brought up to date when `pyproject.toml`
or `constraints.txt` have changed. Needs Python 3.11, because transformers 5 does, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANES = {"optimum": "optimum,openvino,test", "v5": "onnx,test,dev"}  # lane -> extras
EXTRAS = (
    "", "[optimum]", "[onnx]", "[openvino]", "[executorch]", "[audio]", "[search]", "[demo]", "[docs]", "[test]",
    "[dev]",
)  # fmt: skip
WORKERS = 2
# These ask nothing that differs between the lanes but torch's own modules and ours: once is enough.
ON_V5_ALONE = (
    "allocation", "contributing", "extensions", "house", "metrics", "notebook", "plan", "public", "schedules", "site",
    "states",
)  # fmt: skip

# Most of the time goes into these: processes that import transformers, groups of processes, exports, model zoos.
IN_TURNS = (
    "architectures", "attack", "branches", "callback", "card", "checkpoint", "depth", "distillation",
    "distillation_terms", "distillation_trainers", "distributed", "dynamic", "every_score", "evidence", "examples",
    "experts", "export", "export_formats", "export_seq2seq", "fsdp", "guards", "guessing", "hub", "hub_failures",
    "learned", "never_wrong", "odd_families", "optimizer_steps", "own_data", "parts", "peft", "plain_saving", "recipes",
    "regularising", "removal", "report", "report_grid", "report_page", "resume", "reversible", "rewinding",
    "search", "sensitivity", "session", "slips", "standalone", "stock", "strangers", "tasks", "train_again",
    "trainer_features", "workflow",
)  # fmt: skip


def python(lane: str) -> Path:
    """Return the interpreter of a lane."""
    return ROOT / f".venv-{lane}" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say what runs, and for how many seconds it ran."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {name}: {time.monotonic() - start:.0f} s", flush=True)


def quietly(*command: str | Path) -> None:
    """Run a command; only if it fails, show what it printed and stop everything."""
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        print(result.stdout)
        raise SystemExit(f"failed with exit status {result.returncode}: {' '.join(map(str, command))}")


def pip(lane: str, *arguments: str) -> None:
    """Run a lane's pip under the repository's constraints."""
    quietly(python(lane), "-m", "pip", *arguments)


def install(lane: str) -> None:
    """Make a lane's virtualenv and install the library with its extras into it."""
    quietly(sys.executable, "-m", "venv", ROOT / f".venv-{lane}")
    pip(lane, "install", "--upgrade", "pip")  # what comes with Python 3.11 takes minutes to resolve this
    # Not compiling what no test imports saves two thirds of the installation's time.
    pip(lane, "install", "--no-compile", "-c", "constraints.txt", "-e", f".[{LANES[lane]}]")
    pip(lane, "check")


def resolve(extra: str) -> None:
    """Check that pip finds versions for an extra in an empty environment."""
    pip("v5", "install", "--dry-run", "--ignore-installed", "-c", "constraints.txt", f".{extra}")


def prepare(pool: ThreadPoolExecutor) -> None:
    """Install both lanes and resolve each extra, unless that was done with the same files."""
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamps = [ROOT / f".venv-{lane}" / "prepared" for lane in LANES]
    if all(stamp.is_file() and stamp.read_text() == wanted for stamp in stamps):
        return
    with stage("install both lanes"):
        list(pool.map(install, LANES))
    with stage("resolve each extra from nothing"):
        list(pool.map(resolve, EXTRAS))
    for stamp in stamps:
        stamp.write_text(wanted)


def lint() -> None:
    """Check style, formatting and types."""
    for arguments in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)):
        quietly(python("v5"), "-m", *arguments)


def run_tests(lane: str, arguments: list[str], *, whole: bool) -> tuple[bool, str]:
    """Run pytest in a lane, and return whether it failed and its closing line."""
    left_out = [] if lane == "v5" or whole else [f"--ignore=tests/test_{name}.py" for name in ON_V5_ALONE]
    command = [python(lane), "-m", "pytest", "-n", str(WORKERS), *left_out, *arguments]
    closing = ""
    # tests start hundreds of processes: what the first has compiled, the others must not compile again
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["HF_PRUNE_IN_TURNS"] = "" if whole else " ".join(IN_TURNS)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            closing = line.strip() or closing
    return process.returncode != 0, closing


def main() -> int:
    """Install, check style and resolution, run the tests of both lanes; 1 if a test failed."""
    if sys.version_info < (3, 11):
        raise SystemExit(f"Both lanes need Python 3.11 or newer. Received: {sys.version.split()[0]}.")
    results, arguments = [], [one for one in sys.argv[1:] if one != "--whole"]
    whole = arguments != [] or "--whole" in sys.argv
    with ThreadPoolExecutor(WORKERS) as pool:
        prepare(pool)
    with stage("ruff and mypy"):
        lint()
    for lane in LANES:
        with stage(f"tests, lane {lane}"):
            results.append(run_tests(lane, arguments, whole=whole))
    for _, closing in sorted(results):  # a failed lane comes last
        print(closing)
    return int(any(failed for failed, _ in results))


if __name__ == "__main__":
    sys.exit(main())
