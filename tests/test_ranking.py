"""The n-th smallest of many numbers: the way of a CPU and the way of a GPU find the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from hf_prune.ranking import from_bits, nth_of_bits, nth_smallest, ordered_bits

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NUMBERS = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1.0])


@pytest.mark.parametrize("dtype", TYPES)
@given(st.data())
def test_both_ways_find_what_a_sort_finds(dtype, data):
    values = tensor(data.draw(st.lists(NUMBERS, min_size=1, max_size=40)), dtype=dtype)
    n = data.draw(st.integers(1, len(values)))
    expected = float(values.double().sort().values[n - 1])
    assert nth_smallest(values, n) == expected
    parts = [ordered_bits(part) for part in values.chunk(3)]
    assert float(from_bits(nth_of_bits(parts, n, int), dtype)) == expected
