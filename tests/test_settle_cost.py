"""What an iteration costs: no allocation, two products an edge. Oracle: tracemalloc, and counting by hand."""

import tracemalloc

import numpy as np
import pytest
from small import CLASSES, Teacher, batch_of

import cupyep as ep
from cupyep import settling
from cupyep.heads import Head
from cupyep.ops import factors

SCHEDULES = ("synchronous", "evenodd", "sweeps")


def costly_case(pooling, precision="float32", activation="hard_sigmoid"):
    edges = [
        ep.Conv2d((16, 16, 4), 8, pooling=pooling),
        ep.Conv2d((8, 8, 8), 8),
        ep.Conv2d((8, 8, 8), 16, pooling=pooling),
        ep.Linear((4, 4, 16), 64),
    ]
    net = ep.Network(edges, CLASSES, device="cpu", feedback=0.5, precision=precision, activation=activation)
    signals = [
        ep.LocalError([1], pool=2),
        ep.LocalError([3], loss="squared_error"),
        ep.Distillation(Teacher(), [2, 4], temperature=2.0, learned=True),
    ]
    return net, batch_of(net, 32), signals


def settle_phase(net, batch, signals, phase, schedule, steps, free=None):
    if phase == "free":
        return net.settle(batch, steps=steps, schedule=schedule, relaxation=1.0)
    free = free or net.settle(batch, steps=1, schedule=schedule, relaxation=1.0)
    beta = 1.0 if phase == "tangent" else [0.5, -0.5]
    return net.settle(
        batch,
        free,
        targets=batch,
        beta=beta,
        nudge=phase,
        signals=signals,
        steps=steps,
        schedule=schedule,
        relaxation=1.0,
    )


@pytest.mark.parametrize("phase", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("pooling", "activation", "precision"),
    [
        ("max", "hard_sigmoid", "float32"),
        ("average", "sigmoid", "float64"),
        ("max", "hard_sigmoid", "tf32"),
        ("max", "hard_sigmoid", "float16"),
        ("average", "sigmoid", "bfloat16"),
    ],
)
def test_a_step_allocates_nothing_after_the_first(
    monkeypatch, algorithm, pooling, activation, precision, schedule, phase
):
    """tracemalloc's peak within each step, views and other small objects aside; the smallest state takes 8 KiB.

    NumPy's own cast buffers are made small for the test: they are no arrays of ours.
    """
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    net, batch, signals = costly_case(pooling, precision, activation)
    free = net.settle(batch, steps=1, schedule=schedule, relaxation=1.0)
    inner, peaks = settling._iterate, []

    def watched(phase, measure):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        inner(phase, measure)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)

    monkeypatch.setattr(settling, "_iterate", watched)
    buffer_size = np.setbufsize(16)
    tracemalloc.start()
    try:
        settle_phase(net, batch, signals, phase, schedule, 5, free)
    finally:
        tracemalloc.stop()
        np.setbufsize(buffer_size)
    assert len(peaks) == 5
    assert max(peaks[1:]) < 8192, peaks


@pytest.mark.parametrize("phase", ["classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forces_of_a_tangent_are_made_once(monkeypatch, schedule, phase):
    """It takes them at the free state, which does not change; other phases take a node's at every update of it."""
    net, batch, signals = costly_case("max")
    free = net.settle(batch, steps=1, schedule=schedule, relaxation=1.0)
    put_force, layers = Head.put_force, []
    monkeypatch.setattr(Head, "put_force", lambda own, *a, **k: layers.append(own.layer) or put_force(own, *a, **k))
    counts = []
    for steps in (3, 7):
        layers.clear()
        settle_phase(net, batch, signals, phase, schedule, steps, free)
        counts.append(len(layers))
    once = 5 * len(net.parts(len(batch)))  # four signals and the readout
    assert counts == [once, once] if phase == "tangent" else counts[1] - counts[0] >= 4 * once


@pytest.mark.parametrize("phase", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_computes_two_products_an_edge(monkeypatch, algorithm, schedule, phase):
    """Multiply-adds are counted where all large products pass. The first edge sees only the input, before the loop."""
    net, batch, signals = costly_case("max")
    free = net.settle(batch, steps=1, schedule=schedule, relaxation=1.0)
    gemm, work = factors.gemm, []

    def counted(a, b, out, tf32):
        work.append(2 * out.size * a.shape[-1])
        return gemm(a, b, out, tf32)

    monkeypatch.setattr(factors, "gemm", counted)
    totals = []
    for steps in (3, 7):
        work.clear()
        settle_phase(net, batch, signals, phase, schedule, steps, free)
        totals.append(sum(work))
    samples = 32 if phase in ("free", "tangent") else 64
    # kernel 3, padding 1 on 8 x 8 maps of 8 channels to 8 and 16; 256 inputs of the dense edge to 64 units
    edges = [2 * 8 * 8 * 9 * 8 * 8, 2 * 8 * 8 * 9 * 8 * 16, 2 * 256 * 64]
    assert [edge.flops() for edge in net.layers[1:]] == edges
    first = 2 * 16 * 16 * 9 * 4 * 8
    if algorithm == "winograd":  # 36 multiplications a tile of 4 x 4 instead of 144
        first, edges[:2] = first // 4, [flops // 4 for flops in edges[:2]]
    assert totals[1] - totals[0] == 4 * 2 * sum(edges) * samples
    first *= 32  # once a phase, of N images even for 2N samples
    once = totals[0] - 3 * 2 * sum(edges) * samples
    primed = {"synchronous": 0, "evenodd": edges[1], "sweeps": sum(edges)}[schedule] * samples
    assert once == {"free": first, "classical": first + primed, "deviation": 0, "tangent": 0}[phase]
