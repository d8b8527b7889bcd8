"""Checkpoints that earlier versions wrote in mid-schedule go on as they would have then."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from write_states import CASES, HALF, STATES, STEPS, start

from hf_prune.resume import read_state

WRITTEN = sorted(folder.name for folder in STATES.iterdir())


def test_every_case_was_written_once():
    assert set(WRITTEN) == {f"{form}-{case}" for form in ("flat", "parts") for case in CASES}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_older_state_goes_on(name):
    folder, case = STATES / name, name.partition("-")[2]
    model, pruning, go = start(case)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # tied weights are written once
    model.tie_weights()
    pruning.load_state_dict(read_state(folder / "pruning_state.safetensors"))
    assert pruning.steps == HALF
    go(HALF, STEPS)
    expected = load_file(folder / "expected.safetensors")
    for mask, one in {**pruning.alive, **pruning.masks}.items():
        assert torch.equal(one, expected[f"masks/{mask}"]), mask
    for weight, one in model.state_dict().items():
        torch.testing.assert_close(one, expected[f"weights/{weight}"], atol=1e-6, rtol=1e-5)
        assert torch.equal(one == 0, expected[f"weights/{weight}"] == 0), weight
