"""benchmarks/gpu.py on a CPU, with tiny models: what needs a GPU says so, and everything else is right."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

NEEDS_GPU = {
    "units in fp16",
    "weights in fp16",
    "accelerate fsdp2",
    "trainer fsdp2",
    "2:4 zeros",
    "CUDA graph, batch 1",
    "CUDA graph, batch 8",
    "CUDA graph, batch 32",
    "CUDA graph, long",
}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a CPU"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def gpu():
    """Import the script, and leave this process as it was."""
    environment, verbosity = dict(os.environ), transformers.utils.logging.get_verbosity()
    import gpu

    yield gpu
    os.environ.clear()
    os.environ.update(environment)
    transformers.utils.logging.set_verbosity(verbosity)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["case"]: one for one in json.loads((folder / "gpu.json").read_text())["records"]}


@pytest.fixture(scope="module")
def found(gpu, tmp_path_factory):
    """Run all parts once; the exit status goes with the records."""
    folder = tmp_path_factory.mktemp("gpu")
    status = gpu.main(["--small", "--here", "--results", str(folder)])
    return status, records(folder)


def test_every_case_is_right_or_says_why_not(found):
    """What overflows has a test of its own."""
    told = {case: record for case, record in found[1].items() if "overflow" not in case}
    assert {case for case, record in told.items() if "skipped" in record} == NEEDS_GPU
    assert all("needs a GPU" in told[case]["skipped"] for case in NEEDS_GPU)
    assert {case: record for case, record in told.items() if not record.get("right", True)} == {}
    assert len(told) == 6 + 4 + 9 + 10 + 1


def test_figures_are_those_of_each_part(found):
    told = found[1]
    assert told["units in bf16"]["wall"] > 0.5
    assert told["fully_shard"]["sharded"]
    assert told["fully_shard"]["masked_matrices"] > 0
    assert told["llama in bf16"]["dense_masked"] > 10 * told["llama in bf16"]["masked_shrunk"]
    assert told["compiled, batch 8"]["ms"].keys() == {"dense", "pruned in 64s"}
    assert told["to a third of the MACs"]["macs_left"] <= 1 / 3
    assert all(record["environment"]["date"] and record["command"] for record in told.values())


def test_what_overflows_is_right(found):
    status, told = found
    skipping = [record for case, record in told.items() if "overflow" in case]
    assert len(skipping) == 2
    assert all(record["right"] and record["skipped_steps"] > 0 for record in skipping)
    assert status == 0


def test_a_failure_is_told_and_does_not_stop_the_rest(gpu, tmp_path):
    def broken() -> dict[str, Any]:
        raise ValueError("not today")

    options = gpu.parse(["--small", "--here", "--results", str(tmp_path)])
    right = gpu.run_here(options, "any", lambda size: {"one": broken, "two": lambda: {"right": True}})
    told = records(tmp_path)
    assert (right, told["one"]["right"], told["two"]["right"]) == (False, False, True)
    assert told["one"]["error"] == "ValueError: not today"
    assert "in broken" in "".join(told["one"]["traceback"])


def test_a_part_that_takes_too_long_is_stopped(gpu, tmp_path):
    assert gpu.main(["--small", "--only", "3", "--seconds", "0.2", "--results", str(tmp_path)]) == gpu.WRONG
    assert records(tmp_path)["the whole part"]["error"] == "the part was stopped after 0.2 s"


def test_a_trainer_that_fails_lets_the_other_one_go_on(gpu, tmp_path, monkeypatch):
    import overhead
    from gpu_models import SIZES, build

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("not today")

    monkeypatch.setitem(overhead.PRUNING, "stops", Stops)
    settings = Namespace(batch=2, steps=3, bf16=False, fp16=False)
    with pytest.raises(ValueError, match="not today"):
        overhead.compare_time("stops", build("bert", SIZES["small"]), settings, str(tmp_path))
