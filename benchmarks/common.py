"""What all benchmark scripts share: one JSON a script, with command, versions, hardware and date in each record."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from hf_prune.report import environment

RESULTS = Path(__file__).parent / "results"


def load_records(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["records"] if path.is_file() else []


def add_record(name: str, record: dict[str, Any], *, key: tuple[str, ...]) -> None:
    """Write one record; an older one with the same key is replaced."""
    same = lambda other: all(other.get(k) == record.get(k) for k in key)  # noqa: E731
    given = [Path(one).name if one.startswith("/") else one for one in sys.argv[1:]]  # not where it lay on this machine
    command = shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *given])
    told = record | {"command": command, "environment": environment()}
    records = [old for old in load_records(name) if not same(old)] + [told]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"records": records}, indent=1) + "\n")
    print(json.dumps(record), flush=True)
