"""What ranks would do: by hand, where the efficiency ends, and a training over a link whose clock is virtual."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from quadrants import SILENT, TINY

from cupyep.cli import main as command_line
from cupyep.parallel import planning
from cupyep.training import runs, sharing
from cupyep.training.config import make_config

TOOLS = Path(__file__).parents[1] / "tools"
DIGITS = ["--arch", "mlp:16", "--dataset", "digits", "--batch-size", "2", "--device", "cpu"]
NUMBERS = 1024 + 16 + 160 + 16  # 64 x 16 + 16 and 16 x 10 + 10 of 4 bytes, whole packs of 16


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("scaling")


def test_a_reduction_by_hand():
    """Of four ranks each sends a half and a quarter to add, the same to tell; three small messages double twice."""
    assert planning.reduction_s(8e6, 4, 1e9, 0.0) == pytest.approx(2 * (4e6 + 2e6) / 1e9)
    assert planning.reduction_s(0, 4, 1e9, 1e-5) == pytest.approx((4 + 3 * 2) * 1e-5)
    assert planning.reduction_s(8e6, 1, 1e9, 1e-5) == 0
    assert planning.efficiency(0.03, 0.01) == pytest.approx(0.75)


@pytest.mark.parametrize(("nbytes", "expected"), [(1e6, 1024), (20e6, 2), (2e9, 1)])
def test_where_the_efficiency_ends(nbytes, expected):
    """80 % of 0.1 s: a sum may take 0.025 s, 2 (n - 1) / n * nbytes a second."""

    def reduction(n):
        return planning.reduction_s(nbytes, n, 1e9, 0.0)

    assert planning.last_enough(lambda n: 0.1, reduction) == expected
    assert expected == max(n for n in range(1, 1025) if 2 * (n - 1) / n * nbytes / 1e9 <= 0.025 + 1e-12)


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize(("bandwidth", "latency"), [(1e6, 0.0), (1e12, 1e-3), (5e6, 1e-4)])
def test_a_training_over_a_slow_link_takes_as_long_as_was_planned(
    scaling, quadrants, tmp_path, monkeypatch, size, bandwidth, latency
):
    """From the begin of a step to that of the next, on a clock that only work and messages move."""
    clock, begins = [0.0], []
    link = scaling.SlowLink(size, bandwidth, latency, lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    run = runs.start_run(make_config(TINY | {"batch_size": 16, "epochs": 1}), tmp_path / "run", SILENT, link)
    work, plain = run.learner.step, sharing.step

    def worked(*args, **more):
        clock[0] += 0.01
        return work(*args, **more)

    def begun(*args):
        begins.append(clock[0])
        return plain(*args)

    monkeypatch.setattr(run.learner, "step", worked)
    monkeypatch.setattr(sharing, "step", begun)
    run.run()
    nbytes = run.learner.gradient_size * run.learner.network.dtype.itemsize
    expected = 0.01 + planning.reduction_s(nbytes, size, bandwidth, latency)
    assert len(begins) > 2
    few = 128 * np.log2(size) / bandwidth  # the bytes of the small messages, which the plan leaves out
    np.testing.assert_array_less(expected - 1e-12, np.diff(begins))
    np.testing.assert_array_less(np.diff(begins), expected + few + 1e-12)


def test_the_command_and_the_tool_plan_alike_from_a_given_step(scaling, tmp_path):
    """As the sum by hand does."""
    words = [*DIGITS, "--step-ms", "1", "--link", "1,10"]
    result = CliRunner().invoke(scaling.main, [*words, "--algorithm", "bp"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1] == "0.00 MB of gradients a step"
    assert [line.split()[0] for line in lines[3:14]] == [str(1 << k) for k in range(11)]
    seconds = planning.reduction_s(4 * NUMBERS, 2, 1e9, 5e-6)
    assert lines[4].split()[1] == f"{1e-3 / (1e-3 + seconds):.1%}"
    path = tmp_path / "plan.json"
    more = ["--ranks", "1024", "--steps", "2", "--json", str(path)]
    result = CliRunner().invoke(command_line, ["memory", *words, *more])
    assert result.exit_code == 0, result.output
    assert "\n".join(lines[2:]) in result.output
    found = json.loads(path.read_text())["ranks"]
    assert (found["nbytes"], found["step_s"], found["links_gb"], found["ranks"]) == (4 * NUMBERS, 1e-3, [1, 10], 1024)
    assert CliRunner().invoke(scaling.main, ["--link", "0"]).exit_code == 2


def test_a_plan_ends_at_the_ranks_asked_for_and_measures_the_step(tmp_path):
    result = CliRunner().invoke(command_line, ["memory", *DIGITS, "--steps", "2", "--ranks", "6"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()[-6:]
    assert lines[0].split() == ["ranks", "50", "GB/s,", "a", "rank", "50", "GB/s,", "in", "all"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "4", "6", "80%"]
    assert "ms a step (EP, T = 2, measured on cpu)" in result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--link", "10"], "--link needs --ranks"),
        (["--step-ms", "10"], "--step-ms needs --ranks"),
        (["--ranks", "2", "--link", "0"], "--link must be above 0"),
        (["--ranks", "2", "--link", "nan"], "--link must be above 0"),
        (["--ranks", "2", "--step-ms", "0"], "--step-ms must be above 0"),
        (["--ranks", "2", "--step-ms", "inf"], "--step-ms must be above 0"),
        (["--ranks", "2", "--latency-us", "-1"], "--latency-us must be at least 0"),
        (["--ranks", "2000"], "2000"),
    ],
)
def test_plans_that_make_no_sense_are_refused(words, told):
    result = CliRunner().invoke(command_line, ["memory", *DIGITS, *words])
    assert result.exit_code == 2
    assert told in result.output


def test_steps_over_a_link_that_sleeps_are_shown_beside_the_plan(scaling):
    result = CliRunner().invoke(scaling.main, [*DIGITS, "--algorithm", "bp", "--simulate", "4", "--link", "1"])
    assert result.exit_code == 0, result.output
    head, line = result.output.splitlines()[-2:]
    assert head.endswith("of a step on 4 ranks, a batch each")
    assert line.split()[:2] == ["1", "GB/s"]
    assert all(float(number) > 0 for number in line.split()[2:])
    assert "of 2, 4, 8" in CliRunner().invoke(scaling.main, [*DIGITS, "--simulate", "3"]).output


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
