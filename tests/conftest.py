"""Settings that every test runs under, and which lane this is."""

from __future__ import annotations

import os

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
