"""tools/benchmark.py: it runs, counts operations as a hand does, writes its report, and times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from residual import residual
from threadpoolctl import threadpool_info

import cupyep as ep
from cupyep.backend import get_precision
from cupyep.learning import equilibrium
from cupyep.learning.operations import OperationCounter, Operations
from cupyep.ops import factors, winograd

TOOLS = Path(__file__).parents[1] / "tools"
SMALL = (
    "--arch",
    "vgg5",
    "--width",
    "0.03125",
    "--image-size",
    "16",
    "--batch-size",
    "2",
    "--device",
    "cpu",
    "--quick",
)
FEW = (*SMALL, "--free-steps", "3", "--nudged-steps", "2")


@pytest.fixture
def load(monkeypatch):
    """Import a module of tools/ as a script there would."""
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module
    for name in ("benchmark", "gate", "measuring", "parts", "scaling", "torch_reference"):
        sys.modules.pop(name, None)


@pytest.fixture
def torch():
    """PyTorch on one thread: for networks this small, several mostly wait for each other."""
    module = pytest.importorskip("torch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


@pytest.fixture
def benchmark(load, capsys):
    """Run the tool; return (exit code, stdout, stderr)."""
    tool = load("benchmark")

    def run(*args):
        with pytest.raises(SystemExit) as end:
            tool.main([str(a) for a in args], prog_name="benchmark.py")
        streams = capsys.readouterr()
        return end.value.code, streams.out, streams.err

    return run


def test_scaling_tells_what_threads_give_and_what_ranks_would(benchmark, torch, monkeypatch):
    """PyTorch has as many threads as cupyep; afterwards cupyep has as many as before."""
    from cupyep.backend.threads import get_threads

    before, had = get_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: had.append((count, get_threads())))
    code, out, err = benchmark(*FEW, "--scaling", "--against", "torch")
    assert (code, err) == (0, "")
    heads, rows = ("EP, images/s", "BP, images/s", "EP, torch, images/s"), ("threads", "1", "ranks", "1024", "80%")
    assert all(head in out for head in heads)
    assert set(rows) <= {line.split()[0] for line in out.splitlines() if line}
    assert had
    assert all(own == theirs for own, theirs in had)
    assert get_threads() == before


def test_scaling_writes_no_report(benchmark, tmp_path):
    code, _, err = benchmark(*FEW, "--scaling", "--json", tmp_path / "report.json")
    assert (code, err) == (2, "Error: --scaling takes no --json and no --parts\n")


def test_quick_run_writes_its_report(benchmark, tmp_path):
    path = tmp_path / "report.json"
    code, out, err = benchmark(*FEW, "--json", path)
    assert (code, err) == (0, "")
    for title in (
        "edges",
        "settle",
        "learning",
        "sweeps, free + nudged",
        "residual 0.0001",
        "peak memory",
        "mean nothing",
    ):
        assert title in out
    report = json.loads(path.read_text(encoding="utf-8"))
    figures = {
        *("gemm_gflops", "ep_step_s", "ep_step_deviation_s", "bptt_step_s", "bp_step_s", "images_per_s", "ep_over_bp"),
        *("weak_ep_over_bp", "weak_ep_one_nudged_sweep_over_bp", "weak_tangent_over_bp"),
        *("peak_memory_bytes", "bptt_bytes_per_step"),
    }
    # A difference of two times; for a network this small the noise may be larger.
    differences = ("settle_step_s", "settle_fraction_of_gemm", "settle_done_fraction_of_gemm")
    assert all(isinstance(report[name], float) for name in differences)
    for name in ("synchronous", "evenodd", "relaxed"):
        reached = report[f"{name}_steps_to_residual"]
        assert (reached is None) == (report[f"{name}_to_residual_s"] is None)
        assert (reached is None) == (f"30 steps, {name}" in out)
    assert all(report[name] > 0 for name in figures)
    assert report["ep_step_speedup_vs_torch"] is None
    assert report["images_per_s"] == pytest.approx(2 / report["ep_step_s"])
    assert report["ep_over_bp"] == pytest.approx(report["ep_step_s"] / report["bp_step_s"])
    assert report["versions"]["cupyep"] == ep.__version__
    assert (report["options"]["width"], report["options"]["free_steps"]) == (0.03125, 3)
    assert report["command"]
    assert report["date"]
    assert list(tmp_path.iterdir()) == [path]


def test_steps_by_scratch(load, benchmark, tmp_path, monkeypatch):
    """Each budget has a network of its own, whose chunks are as long as the budget allows."""
    path, tool, chunks = tmp_path / "report.json", load("benchmark"), {}

    def look(run, phases):
        for name, settle in phases.items():
            if name.endswith("MB"):
                ops = settle.func.__self__.memory.workspace(2).ops
                chunks[name] = [length for _, length in ops[1].chunks]
        return time_steps(run, phases)

    time_steps = tool.time_steps
    monkeypatch.setattr(tool, "time_steps", look)
    code, out, _ = benchmark(*FEW, "--scratch-mb", "0.001,4", "--json", path)
    assert code == 0
    assert chunks == {"0.001 MB": [1, 1], "4 MB": [2]}
    assert "settle step by the scratch of a chunk (above: 8.4 MB)" in out
    found = json.loads(path.read_text(encoding="utf-8"))["settle_step_s_by_scratch_mb"]
    assert {name: type(value) for name, value in found.items()} == {"0.001": float, "4": float}


def test_against_torch(torch, benchmark, tmp_path):
    path = tmp_path / "report.json"
    code, out, _ = benchmark(*FEW, "--against", "torch", "--json", path)
    assert code == 0
    assert "PyTorch's against EP's" in out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["ep_step_speedup_vs_torch"] > 0
    assert isinstance(report["settle_step_speedup_vs_torch"], float)
    assert "torch" in report["versions"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--against", "tensorflow"), "choose from torch"),
        (("--scratch-mb", "8,0"), "--scratch-mb takes numbers above 0"),
        (("--against", "torch", "--schedule", "sweeps"), "--schedule synchronous"),
        (("--arch", "vgg6"), "did you mean"),
        (("--batch-size", "0"), "batch-size"),
        (("--json", "nowhere/report.json"), "no folder 'nowhere'"),
    ],
)
def test_wrong_use_is_one_line(benchmark, monkeypatch, tmp_path, args, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = benchmark(*SMALL, *args)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert told in err


def test_without_torch_the_reference_is_refused(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = benchmark(*SMALL, "--against", "torch")
    assert (code, out) == (2, "")
    assert "needs PyTorch" in err


# ------------------------------------------------------------------------------------------- the gate before timing


@pytest.mark.parametrize("wrong", ["state", "gradient"])
def test_a_wrong_reference_is_not_timed(torch, benchmark, load, monkeypatch, wrong):
    reference = load("torch_reference").TorchReference
    broken = "phi" if wrong == "state" else "loss"  # a loss of the wrong sign leaves the free phase right
    right = getattr(reference, broken)
    monkeypatch.setattr(reference, broken, lambda *args: -right(*args))
    code, out, err = benchmark(*FEW, "--against", "torch")
    assert code == 1
    assert f"{wrong} " in err
    assert "nothing was timed" in err
    assert "GFLOP/s" not in out


def test_a_wrong_gradient_is_not_timed(benchmark, monkeypatch):
    """Without PyTorch the gate compares EP with BPTT."""
    right = ep.BackpropagationThroughTime.step_from

    def negated(self, *args):
        result = right(self, *args)
        for gradient in result.gradients.values():
            gradient *= -1
        return result

    monkeypatch.setattr(ep.BackpropagationThroughTime, "step_from", negated)
    code, out, err = benchmark(*FEW)
    assert code == 1
    assert "cosine -" in err
    assert "GFLOP/s" not in out


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("activation", ["hard_sigmoid", "half_hard_sigmoid"])
def test_reference_and_cupyep_agree(torch, load, loss, pooling, activation):
    """Independent code for one mathematics, lambda below 1 included; float64, a few unsettled steps."""
    how = {"activation": activation, "pooling": pooling, "loss": loss, "feedback": 0.5, "gain": 0.9}
    net = ep.vgg(5, 4, (16, 16, 3), 1 / 32, **how, device="cpu", precision="float64")
    for path, array in net.parameters().items():
        if path.endswith("bias"):
            array[...] = np.random.default_rng(1).uniform(0, 0.3, array.shape)
    generator = np.random.default_rng(2)
    x, labels = generator.standard_normal((3, 16, 16, 3)), np.array([0, 3, 1])
    reference = load("torch_reference").TorchReference(net, dtype="float64")
    theirs = reference.settle(reference.images(x), reference.zeros(3), 6)
    for own, their in zip(net.settle(x, steps=6, schedule="synchronous").layers, theirs, strict=True):
        np.testing.assert_allclose(reference.state_channels_last(their), own, rtol=0, atol=1e-13)
    steps = (80, 40)  # settled, so that no pooling winner changes with the last update
    gradients = reference.ep_step(reference.images(x), reference.labels(labels), 0.3, *steps)
    learner = ep.EquilibriumPropagation(net, 0.3, *steps, nudge="classical", schedule="synchronous")
    expected = learner.step(x, labels).gradients
    assert gradients.keys() == expected.keys()
    for path, gradient in expected.items():
        found = reference.channels_last(path, gradients[path])
        assert np.linalg.norm(found - gradient) < 1e-7 * np.linalg.norm(gradient), path


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_reference_multiplies_as_precisely_as_the_network(torch, load, precision):
    """float32 is not TF32, whatever PyTorch does by default on a GPU, or another reference asks for in between."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        make, options = (
            load("torch_reference").TorchReference,
            {"input_shape": (16, 16, 1), "width": 1 / 64, "feedback": 1.0},
        )
        reference = make(ep.vgg(5, 4, device="cpu", precision=precision, **options))
        other = make(ep.vgg(5, 4, device="cpu", precision="float32" if precision == "tf32" else "tf32", **options))
        x = np.zeros((1, 16, 16, 1), np.float32)
        for each in (reference, other, reference):
            each.settle(each.images(x), each.zeros(1), 1)
        assert [backend.allow_tf32 for backend in backends] == [precision == "tf32"] * 2
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def test_reference_takes_images_in_halves(torch, load):
    """PyTorch does not know NumPy's bfloat16."""
    pytest.importorskip("ml_dtypes")
    net = ep.vgg(5, 4, (16, 16, 1), 1 / 64, device="cpu", precision="bfloat16", feedback=1.0)
    images = net.batch(np.full((1, 16, 16, 1), 0.3)).images
    found = load("torch_reference").TorchReference(net).images(images)
    np.testing.assert_array_equal(found.numpy(), images.astype(np.float32).transpose(0, 3, 1, 2))


def test_reference_refuses_what_it_has_not(torch, load):
    net = ep.vgg(5, 4, (16, 16, 1), 1 / 64, activation="tanh", device="cpu", feedback=1.0)
    with pytest.raises(ep.ConfigurationError, match="no activation 'tanh'"):
        load("torch_reference").TorchReference(net)
    for other in (residual(), ep.Network([ep.Linear((4,), 3)], 2, weights="standardized", device="cpu", feedback=1.0)):
        with pytest.raises(ep.ConfigurationError, match="takes chains with plain weights"):
            load("torch_reference").TorchReference(other)


# ----------------------------------------------------------------------------------------------- counts and clocks


def test_operations_of_vgg5_counted_by_hand(load):
    """Products on maps of 16 x 16, 8 x 8 and (unpadded) 2 x 2, batch 128: 82 GFLOP a step."""
    count = Operations(ep.vgg(5, device="cpu", feedback=1.0), 128)
    first = 2 * 32 * 32 * 27 * 128 * 128
    second, third, fourth = 2 * 16**2 * 1152 * 256 * 128, 2 * 8**2 * 2304 * 512 * 128, 2 * 2**2 * 4608 * 512 * 128
    assert count.edges == [first, second, third, fourth]
    assert count.settle_step() == 2 * (second + third + fourth)
    assert 81.5e9 < count.settle_step() < 82.5e9
    assert count.bp_step() == 2 * first + 3 * (second + third + fourth)


@pytest.fixture
def work(monkeypatch):
    """The operations of all large products, counted where they pass; float64 so that no count is rounded."""
    done = []

    def counting(multiply):
        def counted(a, b, out, *others, **options):
            done.append(2 * out.size * a.shape[-1])
            return multiply(a, b, out, *others, **options)

        return counted

    for name in ("gemm", "add_gemm"):
        monkeypatch.setattr(factors, name, counting(getattr(factors, name)))
    return done


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
@pytest.mark.parametrize("form", ["classical", "deviation", "tangent"])
def test_operations_are_those_done(load, work, algorithm, form, schedule):
    """Padded edges: their products in both directions are of one size, as in the count."""
    net = ep.vgg(7, 4, (16, 16, 3), 1 / 32, device="cpu", feedback=1.0)
    direct, done = (Operations(net, 2, each).ep_step(3, 2, form, schedule) for each in (False, True))
    load("benchmark").learner(net, 3, 2, form, schedule).step(np.zeros((2, 16, 16, 3)), np.array([0, 1]))
    assert sum(work) == done
    least, most = {"columns": (1, 1), "winograd": (1 / 4, 4 / 9)}[algorithm]  # tiles of 4 x 4 or of 2 x 2
    assert least * direct <= done <= most * direct


def test_operations_depend_on_the_batch(load, work, monkeypatch):
    """Two nudged phases in one are by Winograd, or by larger tiles, where the free phase of half their size is not."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", {2: 0, 4: 0})
    monkeypatch.setattr(winograd, "LEAST_WORK", 0)
    # Four samples have as many tiles of 4 x 4 in 16 x 16 maps, edges 1 and 2, or of 2 x 2 in 8 x 8 maps, edges 3 and 4.
    monkeypatch.setattr(winograd, "LEAST_ROWS", 4 * 16)
    monkeypatch.setattr(equilibrium, "_takes_large_tiles", lambda network: False)  # of which the classical form warns
    net = ep.vgg(7, 4, (16, 16, 3), 1 / 32, device="cpu", feedback=1.0)
    count = Operations(net, 2, done=True)
    same = [2 * one == pair for one, pair in zip(count.edges, count.pairs, strict=True)]
    assert same == [False, False, False, False, True, True]
    for form in ("classical", "deviation"):
        work.clear()
        load("benchmark").learner(net, 3, 2, form).step(np.zeros((2, 16, 16, 3)), np.array([0, 1]))
        assert sum(work) == count.ep_step(3, 2, form)


def test_operations_of_bp_and_bptt_are_those_done(load, work, algorithm):
    net = ep.vgg(7, 4, (16, 16, 3), 1 / 32, device="cpu", feedback=1.0)
    count = Operations(net, 2, done=True)
    x, y = np.zeros((2, 16, 16, 3)), np.array([0, 1])
    ep.Backpropagation(net).step(x, y)
    assert sum(work) == count.bp_step()
    work.clear()
    ep.BackpropagationThroughTime(net, 4, 3, schedule="synchronous").step(x, y)
    assert sum(work) == count.bptt_step(4, 3)


GRAPH_CASES = [
    ({"schedule": schedule, "scheme": scheme, "nudge": nudge})
    for schedule in ("synchronous", "evenodd", "sweeps")
    for scheme, nudge in (
        ("centered", "classical"), ("centered", "deviation"), ("onesided", "classical"), ("onesided", "deviation"),
        ("tangent", "deviation"),
    )
]  # fmt: skip


@pytest.mark.parametrize("how", GRAPH_CASES, ids=lambda how: "-".join(how.values()))
def test_operations_of_a_residual_network_are_those_done(work, algorithm, how):
    """Counted from the program, and where all products pass."""
    net = residual()
    learner = ep.EquilibriumPropagation(net, 0.3, 3, 2, relaxation=1.0, **how)
    counted = Operations(net, 2, done=True)
    learner.step(np.zeros((2, 8, 8, 3)), np.array([0, 1]))
    assert sum(work) == counted.step(learner)
    work.clear()
    learner.scores(net.batch(np.zeros((2, 8, 8, 3))))
    assert sum(work) == counted.prediction(learner)


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
def test_operations_of_other_algorithms_on_a_residual_network(work, algorithm, schedule):
    net, x = residual(), np.zeros((2, 8, 8, 3))
    counted = Operations(net, 2, done=True)
    for learner in (ep.Backpropagation(net), ep.BackpropagationThroughTime(net, 4, 3, schedule, relaxation=1.0)):
        work.clear()
        learner.step(x, np.array([0, 1]))
        assert sum(work) == counted.step(learner)
        work.clear()
        learner.scores(net.batch(x))
        assert sum(work) == counted.prediction(learner)


@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_a_counter_follows_steps_in_parts_and_predictions(work, tolerance):
    """As long as phases really are, of every part of a batch; direct convolutions do what is counted."""
    net = residual()
    learner = ep.EquilibriumPropagation(
        net, 0.3, 40, 2, schedule="evenodd", tolerance=tolerance, micro_batch=2, relaxation=1.0
    )
    counter, x, y = OperationCounter(learner), np.zeros((3, 8, 8, 3)), np.array([0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ep.ConvergenceWarning)  # of the nudged phases
        learner.step(x, y)
        learner.evaluate(x, y)
    assert sum(work) == counter.operations
    parts = [Operations(net, n) for n in (2, 1)]
    longest = sum(part.step(learner) + part.prediction(learner) for part in parts)
    assert (counter.operations == longest) == (tolerance is None)


def test_timings_are_taken_next_to_their_product(load):
    timing = load("measuring").Timing(np.array([1.0, 2.0, 4.0]), np.array([8.0, 4.0, 2.0]), flops=4.0)
    assert (timing.median, timing.rate) == (2.0, 2.0)
    assert timing.fraction == 0.5  # in every round, though the machine's rate differs by four
    assert timing.spread == pytest.approx((3.0 - 1.5) / 2)
    assert timing.done_fraction is None
    twice = load("measuring").Timing(timing.seconds, timing.product, flops=18.0, done=8.0)
    assert (twice.fraction, twice.done_fraction) == (2.25, 1.0)
    step = timing.per_step(load("measuring").Timing(np.array([0.5, 1.0, 2.0]), timing.product), 5, 1.0)
    np.testing.assert_allclose(step.seconds, [0.1, 0.2, 0.4])


def test_stopwatch_measures_every_case_in_every_round(load):
    calls = []
    watch = load("measuring").Stopwatch(ep.get_device("cpu"), get_precision("float32"), 8, repeats=3, shortest=0)
    case = load("measuring").Case
    rows = watch.measure({"a": case(lambda: calls.append("a")), "b": case(lambda: calls.append("b"), 5.0)})
    assert calls[-6:] == ["a", "b"] * 3
    assert [len(row.seconds) for row in rows.values()] == [3, 3]
    assert (rows["a"].fraction, rows["b"].flops) == (None, 5.0)
    assert len(watch.product_rates) == 6


def test_on_a_gpu_replays_are_timed_beside_plain_launches(load, fake_gpu):
    """By events; a stand-in for a GPU gives times that mean nothing."""
    net = ep.vgg(5, 4, (16, 16, 3), 1 / 32, device=fake_gpu, feedback=1.0)
    watch = load("measuring").Stopwatch(fake_gpu, net.precision, 8, repeats=1, shortest=0)
    tool = load("benchmark")
    run = tool.Run({}, net, tool.noise(net, 2), watch)
    rows = tool.time_settle_steps(run)
    names = [f"settle step, {name}" for name in ("synchronous", "evenodd", "sweeps")]
    assert list(rows) == [row for name in names for row in (name, f"{name}, plain launches")]
    assert run.report["settle_step_plain_launches_s"] == rows[f"{names[0]}, plain launches"].median
    assert len(net.memory.workspace(2).replayer.graphs()) == 6, "measured or not, for each schedule"
    assert fake_gpu.graphs is not None


def test_threads_are_those_of_cupyep_and_of_blas(load):
    measuring = load("measuring")
    with measuring.limit_threads(3):
        assert ep.get_threads() == 3
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {3}
    ep.set_threads(None)
