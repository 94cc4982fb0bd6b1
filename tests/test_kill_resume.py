"""A few kills of tests/kill_resume.py, which deals more of them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("fcntl")  # without it (Windows) there is no SIGKILL either

from kill_resume import WAYS, deal_kills, straight_run  # noqa: E402


@pytest.mark.slow
def test_a_run_that_is_killed_ends_like_a_straight_one(tmp_path):
    seconds = straight_run(tmp_path / "straight")
    for way in WAYS:
        assert deal_kills(tmp_path, way, 5, random.Random(1), seconds) >= 1
