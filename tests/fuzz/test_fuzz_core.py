"""The fuzz targets of the core, driven by Hypothesis."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import fuzz_intervals, fuzz_slices


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=18 * 24))
def test_interval_maps_take_anything(data):
    fuzz_intervals(data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=18 * 24))
def test_slices_take_anything(data):
    fuzz_slices(data)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [fuzz_intervals, fuzz_slices])
def test_long_runs(target, seed):
    """Sequences longer than Hypothesis likes, from a fixed seed."""
    import random

    target(random.Random(seed).randbytes(18 * 1500))
