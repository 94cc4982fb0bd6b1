"""tools/parts.py: the parts of a training step, what they launch, and its products. Oracle: counts by hand."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
from test_benchmark import SMALL, TOOLS

import cupyep as ep
from cupyep.ops.reduction import SOURCE


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module("parts")
    for name in ("benchmark", "gate", "measuring", "parts"):
        sys.modules.pop(name, None)


def network(device):
    edges = [ep.Conv2d((6, 6, 3), 8), ep.Conv2d((6, 6, 8), 8, pooling="max"), ep.Linear((3, 3, 8), 5)]
    return ep.Network(edges, classes=4, feedback=0.1, device=device)


def ep_step(parts, device, samples=2, free_steps=3):
    how = {"free_steps": free_steps, "nudged_steps": 2, "schedule": "sweeps"}
    return parts.TrainingStep(ep.EquilibriumPropagation(network(device), **how), samples)


def test_products_of_backpropagation(parts):
    """Three products an edge, but for the top-down one of the first; the readout's are not the edges'."""
    step = parts.TrainingStep(ep.Backpropagation(network("cpu")), 2)
    times = step.time_parts(1)
    assert times["step"].work[-1].products == 3 * 3 - 1
    assert times["pass up"].work[-1].products == 3
    drives = {((72, 27, 8), False), ((72, 72, 8), False), ((2, 72, 5), False)}
    gradients = {((27, 72, 8), True), ((72, 72, 8), True), ((72, 2, 5), True)}
    topdowns = {((72, 72, 8), False), ((2, 5, 72), False)}
    shapes = {((product.rows, product.inner, product.columns), product.adds) for product in step.products()}
    assert shapes == drives | gradients | topdowns


def test_parts_make_the_step(parts):
    """Phases and gradient have all products of the edges, and the parts take no more time than the step."""
    times = ep_step(parts, "cpu").time_parts(3)
    assert list(times)[0] == "loader"
    within = ("free phase", "loss and levels", "nudged phases", "gradient")
    step = times["step"]
    assert sum(times[name].work[-1].products for name in within) == step.work[-1].products
    assert times["free phase"].work[-1].products == 1 + 3 * 2 * 2  # of two edges in each of three sweeps up and down
    assert all(len(row.done) == 3 for row in times.values())
    for call in range(3):
        assert sum(times[name].done[call] for name in within) <= step.done[call]


def test_nothing_is_left_behind(parts):
    """Afterwards the methods are the classes' own, and a step does what it did."""
    step = ep_step(parts, "cpu")
    before = {(owner, name): getattr(owner, name).__func__ for owner, name in step.places().values()}
    step.time_parts(1)
    assert {(owner, name): getattr(owner, name).__func__ for owner, name in step.places().values()} == before


def test_launches_on_a_gpu(parts, fake_gpu):
    """One kernel a parameter, one graph an iteration; what is in graphs is found with plain launches."""
    step = ep_step(parts, fake_gpu)
    times = step.time_parts(1)
    assert times["optimizer"].work[-1].kernels == len(step.learner.parameters())
    assert times["free phase"].work[-1].graphs == 3
    assert times["nudged phases"].work[-1].graphs == 2
    inside = sum(product.adds is False for product in step.products().elements())
    assert inside > times["step"].work[-1].products
    assert fake_gpu.graphs is not None
    levels = [name for name in fake_gpu.launcher(SOURCE).launched if name.startswith("level_shares")]
    assert len(levels) == 3 * (parts.WARM_UP + 2)


def test_bytes_are_those_of_the_arguments(parts):
    """A product reads two matrices and writes one; one that adds reads that, too."""
    recorder = parts.Recorder(ep.get_device("cpu"))
    factors = parts.Factors(ep.backend.get_precision("float64"), False)
    a, b, out = np.ones((3, 4)), np.ones((4, 5)), np.zeros((3, 5))
    with recorder.watching():
        factors.product(a, b, out)
        factors.add_product(a, b, out, np.empty_like(out))
    factors.product(a, b, out)
    assert recorder.work == parts.Work(products=2, nbytes=8 * (2 * (12 + 20 + 15) + 15))
    assert [str(product) for product in recorder.products] == [
        "3 x 4 x 5 float64 -> float64",
        "gradient 3 x 4 x 5 float64 -> float64",
    ]


def test_the_command(parts, tmp_path, capsys):
    """--parts prints tables and writes them."""
    tool, path = importlib.import_module("benchmark"), tmp_path / "parts.json"
    options = (
        *SMALL,
        "--parts",
        "--schedule",
        "sweeps",
        "--free-steps",
        "2",
        "--nudged-steps",
        "1",
        "--scratch-mb",
        "1,3",
        "--json",
        str(path),
    )
    parts.COPIED_BYTES["cpu"] = 1 << 16
    with pytest.raises(SystemExit) as end:
        tool.main(list(options))
    out, report = capsys.readouterr().out, json.loads(path.read_text())
    assert end.value.code == 0
    assert "parts of a training step, EP 2 + 1, sweeps" in out
    assert report["BP"]["parts"]["step"]["products"] == 3 * 4 - 1
    assert all(0 < len(report[name]["products_s"]) <= parts.SHOWN_PRODUCTS for name in ("EP 2 + 1, sweeps", "BP"))
    assert sorted(report["step_s_by_scratch_mb"]) == [
        f"{name}, {mb} MB" for name in ("BP", "EP 2 + 1, sweeps") for mb in (1, 3)
    ]
    assert min(report["bytes_per_s"].values()) > 0
    assert "graphs: none; scratch of a chunk: " in out


def test_what_only_moves_numbers(parts):
    """The reductions of every state once, of the type that is stored; bytes by hand. They are the training's own."""
    net = network("cpu")
    cases = parts.moving_cases(net, 2)
    names = ["72 x 8 float32", "18 x 8 float32", "2 x 5 float32"]
    assert list(cases)[1:] == [f"{what} of {name}" for name in names for what in ("sum", "levels")]
    assert [nbytes for _, nbytes in cases.values()][1::2] == [4 * 72 * 8, 4 * 18 * 8, 4 * 2 * 5]
    case, _ = cases["sum of 72 x 8 float32"]
    case.call()
    np.testing.assert_array_equal(case.call.args[1], np.full(8, 72.0))
    assert "copy of" in parts.moving_table({"copy of 1 MB": (1e-3, 2e6)})


def test_every_budget_is_that_of_its_chunks(parts, fake_gpu, monkeypatch):
    """Networks of other budgets keep theirs; the device has its own again, and what graphs do is told."""
    tool = importlib.import_module("benchmark")
    planned = []
    monkeypatch.setattr(tool.Run, "build", lambda run: network(fake_gpu))
    monkeypatch.setattr(tool, "TrainingStep", lambda made, samples: lambda: planned.append(fake_gpu.scratch_bytes))
    monkeypatch.setattr(tool, "moving_cases", lambda *_: {})
    run = tool.Run(
        {"free_steps": 1, "nudged_steps": 1, "schedule": "sweeps", "scratch_mb": [2.0, 5.0]},
        network(fake_gpu),
        [0] * 2,
        None,
    )
    usual = fake_gpu.scratch_bytes
    with pytest.raises(AttributeError):  # there is no stopwatch
        tool.measure_parts(run)
    assert planned == [usual] * 2 + [2_000_000] * 2 + [5_000_000] * 2
    assert fake_gpu.scratch_bytes == usual
    assert "graphs: captured" in parts.graphs_text(fake_gpu)
    fake_gpu.graphs.failed = True
    assert "graphs: a capture has failed" in parts.graphs_text(fake_gpu)
