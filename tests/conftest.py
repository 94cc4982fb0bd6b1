"""Shared fixtures: one device a backend, every random draw seeded."""

import os

import numpy as np
import pytest

from cupyep import get_device, gpu_status


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every test that takes this runs with the same body on NumPy and on CuPy."""
    if request.param == "cuda":
        usable, reason = gpu_status()
        if not usable:
            if os.environ.get("CUPYEP_REQUIRE_GPU") == "1":
                pytest.fail(f"CUPYEP_REQUIRE_GPU=1, but {reason}")
            pytest.skip(reason)
    return get_device(request.param)


@pytest.fixture
def rng():
    """A generator that starts the same in every test."""
    return np.random.default_rng(20250820)
