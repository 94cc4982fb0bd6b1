"""tools/loading.py: batches come from memory and from a file, and every pass takes all of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cupyep.data import stored
from cupyep.data.stored import StoredImages


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(stored, "RESIDENT_BYTES", stored.RESIDENT_BYTES)  # which the tool sets
    path = Path(__file__).parents[1] / "tools" / "loading.py"
    spec = importlib.util.spec_from_file_location("loading", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_is_in_memory_and_the_other_in_its_file(tool, tmp_path):
    held, left = (data.train.images for data in tool.files(40, 8, tmp_path))
    assert isinstance(held, np.ndarray)
    assert isinstance(left, StoredImages)
    np.testing.assert_array_equal(held, left[np.arange(len(left))])


def test_the_fastest_pass_counts_after_one_that_does_not(tool, monkeypatch):
    clock, seen = iter([0, 1, 10, 16, 20, 24]), []
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(clock))
    assert tool.milliseconds(lambda: "ab", seen.append, 2) == 2000
    assert seen == list("ababab")


def test_it_runs(tool):
    options = ["--arch", "4p 8p", "--images", "40", "--size", "8", "--batch-size", "20", "--repeats", "1"]
    result = CliRunner().invoke(tool.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == ["a", "memory", "file", "images"]
