"""Settings that every test runs under, and which lane this is."""

from __future__ import annotations

import os
import zlib

# Before torch and transformers are imported; tests that start processes of their own hand these on.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}

from importlib.metadata import version

import pytest
import torch

LANE = "optimum" if version("transformers").startswith("4.") else "v5"

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave to the other lane what `tests/lanes.py` says it runs."""
    in_turns = {f"test_{name}" for name in os.environ.get("HF_PRUNE_IN_TURNS", "").split()}
    others = [item for item in items if item.module.__name__ in in_turns and not runs_here(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def runs_here(item: pytest.Item) -> bool:
    """Whether a test runs on this lane where lanes take turns: it goes by the name alone, as lists differ by lane."""
    return (
        "lane" in getattr(item, "fixturenames", ()) or ("optimum", "v5")[zlib.crc32(item.nodeid.encode()) % 2] == LANE
    )


@pytest.fixture(scope="session")
def lane() -> str:
    """Return `"optimum"` (transformers 4.57) or `"v5"` (transformers 5)."""
    return LANE


@pytest.fixture(autouse=True)
def _environment_of_accelerate():
    """TrainingArguments write how to compile, and in which precision, into the environment of all tests that follow."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)
