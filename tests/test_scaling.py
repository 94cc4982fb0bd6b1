"""tools/scaling.py: the time of a ring by hand, where its efficiency ends, and bytes counted from the parameters."""

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("scaling")


def test_a_ring_by_hand(scaling):
    """Of four ranks each sends its quarters three times to add and three times to tell; two doublings of latency."""
    assert scaling.reduction_s(8e6, 4, 1e9, 0.0) == pytest.approx(6 * 2e6 / 1e9)
    assert scaling.reduction_s(0, 4, 1e9, 1e-5) == pytest.approx(4e-5)
    assert scaling.reduction_s(8e6, 1, 1e9, 1e-5) == 0
    assert scaling.efficiency(0.03, 0.01) == pytest.approx(0.75)


@pytest.mark.parametrize(("nbytes", "expected"), [(1e6, 1024), (20e6, 2), (2e9, 1)])
def test_where_the_efficiency_ends(scaling, nbytes, expected):
    """80 % of 0.1 s: a sum may take 0.025 s, 2 (n - 1) / n * nbytes a second."""

    def reduction(n):
        return scaling.reduction_s(nbytes, n, 1e9, 0.0)

    assert scaling.last_enough(lambda n: 0.1, reduction) == expected
    assert expected == max(n for n in range(1, 1025) if 2 * (n - 1) / n * nbytes / 1e9 <= 0.025 + 1e-12)


def test_the_tool_plans_from_a_given_step(scaling):
    words = ["--arch", "mlp:16", "--dataset", "digits", "--batch-size", "2", "--device", "cpu", "--algorithm", "bp"]
    result = CliRunner().invoke(scaling.main, [*words, "--step-ms", "1", "--link", "1,10"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    # 64 x 16 + 16 and 16 x 10 + 10 numbers of 4 bytes, whole packs of 16.
    assert lines[0].endswith("cpu: 0.00 MB of gradients a step")
    assert [line.split()[0] for line in lines[2:13]] == [str(1 << k) for k in range(11)]
    seconds = scaling.reduction_s(4 * (1024 + 16 + 160 + 16), 2, 1e9, 5e-6)
    assert lines[3].split()[1] == f"{1e-3 / (1e-3 + seconds):.1%}"
    wrong = CliRunner().invoke(scaling.main, ["--link", "0"])
    assert wrong.exit_code == 2


def test_threads_are_measured_in_turn(scaling, monkeypatch):
    """Work that takes a second, and half of it with two threads; the first, slow round does not count."""
    clock, threads, took = [0.0], [0], []
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(scaling, "set_threads", lambda count: threads.__setitem__(0, count))

    def work():
        took.append(threads[0])
        clock[0] += 1 / threads[0] + (9 if len(took) == 1 else 0)

    lines = scaling.thread_table({"ep": work}, [1, 2], 10)
    assert took == [1] + [1, 2] * scaling.ROUNDS
    assert [line.split() for line in lines[1:]] == [["1", "10.0", "100.0%"], ["2", "20.0", "100.0%"]]


def test_the_tool_measures_threads(scaling):
    words = ["--arch", "mlp:16", "--dataset", "digits", "--batch-size", "40", "--device", "cpu"]
    result = CliRunner().invoke(scaling.main, [*words, "--each-threads", "1,2"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[1:]] == ["threads", "1", "2"]
    assert CliRunner().invoke(scaling.main, ["--each-threads", "0"]).exit_code == 2
