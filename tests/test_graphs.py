"""Capturing and replaying, on a stand-in for a GPU whose graphs do on the CPU what was recorded (fake_gpu.py)."""

from __future__ import annotations

import numpy as np
import pytest
import strict
from fake_gpu import FakeGraph, FakeStream, current_stream

import cupyep as ep
from cupyep.backend import graphs
from cupyep.backend.device import gemm
from cupyep.backend.graphs import GraphCapture, Replayer, Replays


def counted(work):
    """Return a function that does `work` and the list of its calls."""
    calls = []

    def call():
        calls.append(current_stream())
        work()

    return call, calls


def test_plain_then_captured_then_replayed(fake_gpu):
    """The host does the work twice: once plainly, once to record it. Replays compute on what the memory holds then."""
    xp, replays = fake_gpu.xp, Replays(fake_gpu.graphs)
    a, b, out = (fake_gpu.asarray(np.zeros((2, 2))) for _ in range(3))

    def square_and_add():
        gemm(a, a, out=out)
        xp.add(out, b, out=out)
        out[0] += 1

    work, calls = counted(square_and_add)
    for step in range(5):
        a[...], b[...] = fake_gpu.asarray([[step, 1.0], [2.0, 3.0]]), step
        replays.run("work", work)
        expected = np.array([[step**2 + 2, step + 3.0], [2 * step + 6, 11]]) + step + [[1], [0]]
        np.testing.assert_array_equal(fake_gpu.to_numpy(out), expected)
    assert len(calls) == 2
    assert calls[0] == 0
    assert calls[1] != 0, "the capture takes a stream of its own"
    assert [graph.launches for graph in FakeGraph.made] == [4]
    assert current_stream() == 0


def test_other_keys_are_other_work(fake_gpu):
    replays, arrays = Replays(fake_gpu.graphs), [fake_gpu.asarray(np.zeros(1)) for _ in range(2)]
    for _ in range(4):
        for number, array in enumerate(arrays):
            replays.run(number, lambda array=array, number=number: array.__iadd__(number + 1))
    assert [float(array[0]) for array in arrays] == [4, 8]
    assert [graph.launches for graph in FakeGraph.made] == [3, 3]


def test_work_without_a_key_or_a_device_that_captures_is_done_plainly(fake_gpu):
    for replayer, key in ((Replayer(fake_gpu.graphs), None), (Replayer(None), "key")):
        work, calls = counted(lambda: None)
        for _ in range(3):
            replayer.of(key).run("work", work)
        assert len(calls) == 3
    assert FakeGraph.made == []


def test_what_is_not_used_is_forgotten(fake_gpu):
    """Of many keys the last ones used are kept; work of equal names and different keys is different work."""
    replayer, (work, calls) = Replayer(fake_gpu.graphs), counted(lambda: None)
    for number in range(Replayer.KEPT + 5):
        for key in (number, "often"):
            replayer.of(key).run("work", work)
    assert len(calls) == Replayer.KEPT + 5 + 2
    assert len(replayer.graphs()) == 1
    assert replayer.of("often").graphs["work"].launches == Replayer.KEPT + 4
    for number, known in ((0, False), (Replayer.KEPT + 4, True)):
        calls.clear()
        replayer.of(number).run("work", work)
        assert (len(replayer.graphs()) == 2) == known


def allocate(device, a):
    a + 1


def read(device, a):
    bool(a[:1])


def transfer(device, a):
    device.to_numpy(a)


def copy(device, a):
    a[device.asarray(np.array([0, 0]))]


def fail(device, a):
    raise ValueError("not here\nbut there")


REFUSED = {
    allocate: "RefusedWhileRecording: .* would allocate",
    read: "RefusedWhileRecording: the host reads",
    transfer: "RefusedWhileRecording: a transfer",
    copy: "RefusedWhileRecording: a transfer",
    fail: "ValueError: not here \\(CUPYEP_GRAPHS=0",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_capture_that_fails_is_reported_once_and_plain_launches_go_on(fake_gpu, wrong):
    """The work is done in every step all the same; nothing of a broken capture is left behind."""
    replays, a = Replays(fake_gpu.graphs), fake_gpu.asarray(np.zeros(2))

    def work():
        a[...] += 1
        if wrong is not fail or current_stream():
            wrong(fake_gpu, a)

    replays.run("work", work)
    with pytest.warns(ep.GraphWarning, match=REFUSED[wrong]) as caught:
        replays.run("work", work)
    assert "\n" not in str(caught[0].message)
    assert fake_gpu.graphs.failed
    for key in ("work", "other work", "other work"):
        replays.run(key, work)
    np.testing.assert_array_equal(fake_gpu.to_numpy(a), 5)
    assert (strict.Tape.current, current_stream()) == (None, 0)


def test_what_is_wrong_with_the_work_itself_is_raised(fake_gpu):
    replays = Replays(fake_gpu.graphs)
    replays.run("work", lambda: None)
    with pytest.warns(ep.GraphWarning, match="ValueError: not here"), pytest.raises(ValueError, match="not here"):
        replays.run("work", lambda: fail(None, None))


def test_an_interrupt_ends_the_capture_and_is_no_failure(fake_gpu):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake_gpu.graphs.capture(interrupted)
    assert (strict.Tape.current, current_stream(), fake_gpu.graphs.failed) == (None, 0, False)
    assert fake_gpu.graphs.capture(lambda: None) is not None


def test_a_capture_whose_end_fails_falls_back(fake_gpu, monkeypatch):
    """So CUDA reports an operation that it could not record and CuPy did not check."""

    def end(self):
        self._tape.__exit__()
        raise RuntimeError("cudaErrorStreamCaptureInvalidated: operation failed due to a previous error")

    monkeypatch.setattr(FakeStream, "end_capture", end)
    replays, a = Replays(fake_gpu.graphs), fake_gpu.asarray(np.zeros(1))
    replays.run("work", lambda: a.__iadd__(1))
    with pytest.warns(ep.GraphWarning, match="cudaErrorStreamCaptureInvalidated"):
        replays.run("work", lambda: a.__iadd__(1))
    assert float(a[0]) == 2


def test_temporaries_come_from_a_pool_of_their_own(monkeypatch):
    """Within a capture, and only there, CuPy's allocator is that of a pool that outlives the graph."""
    events = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            events.append(f"enter {self.name}")
            return self

        def __exit__(self, *error):
            events.append(f"leave {self.name}")

        def begin_capture(self, mode):
            events.append(f"begin, mode {mode}")

        def end_capture(self):
            events.append("end")

    class Cuda:
        runtime = type("runtime", (), {"streamCaptureModeRelaxed": 2})

        class MemoryPool:
            malloc = "malloc of the pool"

        Device = staticmethod(lambda index: Recorded(f"device {index}"))
        using_allocator = staticmethod(lambda malloc: Recorded(malloc))

        @staticmethod
        def Stream(non_blocking):
            assert non_blocking
            return Recorded("stream")

    capture = GraphCapture(type("xp", (), {"cuda": Cuda}), 3)
    capture.capture(lambda: events.append("work"))
    around = ["device 3", "malloc of the pool", "stream"]
    assert events == [
        *(f"enter {name}" for name in around),
        *("begin, mode 2", "work", "end"),
        *(f"leave {name}" for name in reversed(around)),
    ]


@pytest.mark.parametrize(("value", "wanted"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_switches_graphs_off(monkeypatch, value, wanted):
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(graphs.VARIABLE, value)
    assert graphs.graphs_wanted() is wanted


def test_another_value_of_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv(graphs.VARIABLE, "no")
    with pytest.raises(ep.ConfigurationError, match="CUPYEP_GRAPHS must be 0 .* not 'no'"):
        graphs.graphs_wanted()


def test_on_the_cpu_nothing_is_captured(monkeypatch):
    monkeypatch.setenv(graphs.VARIABLE, "1")
    assert ep.get_device("cpu").graphs is None
