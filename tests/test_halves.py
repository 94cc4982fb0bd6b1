"""Networks in float16, bfloat16 and TF32. Oracles: BPTT in float64, the strict device, the kernels through the shim."""

import warnings

import numpy as np
import pytest
import strict
from small import Teacher, batch_of, hosts, network, on_host, signals_of
from strict import StrictDevice

import cupyep as ep
from cupyep import backend
from cupyep.backend.precision import Precision
from cupyep.learning.check import compare

NARROW = ["tf32", "float16", "bfloat16"]
HALVES = ["float16", "bfloat16"]
FORMS = ["classical", "deviation", "tangent"]
SCHEDULES = ["synchronous", "evenodd", "sweeps"]
CLIP = {"pooling": "max", "activation": "hard_sigmoid"}


@pytest.fixture(autouse=True)
def ml_dtypes():
    """Bfloat16 needs it; the tests of the other precisions run without."""
    return pytest.importorskip("ml_dtypes")


def learner_of(net, form, schedule="sweeps", **options):
    how = {"scheme": "tangent", "nudge": "deviation"} if form == "tangent" else {"nudge": form}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ep.PrecisionWarning)  # of the classical form
        steps = {"free_steps": 60, "nudged_steps": 20, "relaxation": 1.0}
        return ep.EquilibriumPropagation(net, schedule=schedule, **{"beta": 0.3, **steps, **how, **options})


def all_signals():
    return [
        ep.LocalError([1], pool=2),
        ep.LocalError([3], loss="squared_error"),
        ep.Distillation(Teacher(), [2], temperature=2.0, learned=True),
        ep.FeatureDistillation(Teacher(), {2: "middle"}),
    ]


# --- What is stored in which type ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NARROW)
def test_type_of_every_array(name, form):
    """States, deviations, drives and what is multiplied in halves; everything else in float32, winners in bytes."""
    net = network("conv", "cpu", precision=name, loss="squared_error", **CLIP)
    stored, single = net.precision.stored, np.dtype(np.float32)
    learner, batch = learner_of(net, form, signals=all_signals(), tolerance=1e-3, schedule="evenodd"), batch_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ep.ConvergenceWarning)
        free = learner.settle_free(net.batch(batch)).copy()
        result = [learner.step(batch) for _ in range(2)][1]  # the first one makes the block of memory
    assert net.batch(batch).images.dtype == stored
    assert {s.dtype for s in free.layers} == {stored}
    phases = [buffers for buffers in net.memory._laid_out.values() if hasattr(buffers, "values")]
    assert len(phases) == 2
    for buffers in phases:
        assert {a.dtype for a in [*buffers.states, *buffers.values.values()]} == {stored}
        wide = [
            *(buffers.drives or []),
            *(buffers.slopes or []),
            *buffers.remembered,
            *buffers.targets,
            *buffers.scales,
        ]
        wide += [buffers.residual, buffers.scratch, *buffers.force.values(), *buffers.nudged.values()]
        assert {a.dtype for a in wide} == {single}
        assert {a.dtype for a in buffers.winners if a is not None} <= {np.dtype(np.uint8)}
    parameters = learner.parameters()
    optimizer = ep.Adam(parameters, 0.01)
    optimizer.step(result.gradients)
    narrow = [*parameters.values(), *result.gradients.values(), result.loss, result.activity, result.nudge_response]
    assert {array.dtype for array in narrow} == {single}
    assert {a.dtype for key, a in optimizer.state_dict().items() if np.ndim(a)} == {single}
    assert learner.scores(batch).dtype == net.settle(batch, steps=2, schedule="synchronous").drives[0].dtype == single


@pytest.mark.parametrize("name", ["float32", *NARROW])
def test_no_array_of_a_step_is_float64(monkeypatch, name):
    """On the strict device every result of every operation is seen."""
    net = network("conv", StrictDevice(), precision=name, **CLIP)
    learners = [learner_of(net, form, signals=all_signals()) for form in FORMS]
    learners += [ep.BackpropagationThroughTime(net, 3, 3, schedule="synchronous"), ep.Backpropagation(net)]
    batch, seen, inner = batch_of(net), set(), strict._wrap

    def watched(value):
        found = inner(value)
        if isinstance(found, strict.DeviceArray):
            seen.add(found.dtype)
        return found

    monkeypatch.setattr(strict, "_wrap", watched)
    for learner in learners:
        result = learner.step(batch)
        ep.SGD(learner.parameters(), 0.1, momentum=0.9, weight_decay=1e-3).step(result.gradients)
    assert np.dtype(np.float32) in seen
    assert np.dtype(np.float64) not in seen
    halves = {dtype for dtype in seen if dtype.itemsize == 2}
    assert halves == ({net.precision.stored} if net.precision.half else set())


@pytest.mark.parametrize("name", NARROW)
def test_masters_take_up_steps_that_a_half_would_lose(name):
    """A hundred steps of 1e-5 from 1/2: halves stay where they are, or jump by more."""
    net = network("dense", "cpu", precision=name)
    weight = net.parameters()["layers.1.weight"]
    weight[...] = 0.5
    sgd = ep.SGD(net.parameters(), 1.0, momentum=0.0)
    gradients = {path: np.zeros_like(p) for path, p in net.parameters().items()}
    gradients["layers.1.weight"][...] = 1e-5
    for _ in range(100):
        sgd.step(gradients)
    np.testing.assert_allclose(weight, 0.5 - 100 * 1e-5, rtol=1e-5)
    batch = batch_of(net)
    before = net.settle(batch, steps=2, schedule="synchronous").drives[0].copy()
    weight[...] = 0.25
    assert np.abs(net.settle(batch, steps=2, schedule="synchronous").drives[0] - before).max() > 0.1, (
        "new weights are taken up"
    )


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_strict_device_gives_the_same_bits(name, schedule, form):
    ends = []
    for device in ("cpu", StrictDevice()):
        net = network("conv", device, precision=name, feedback=0.5, **CLIP)
        result = learner_of(net, form, schedule, free_steps=4, nudged_steps=3, signals=all_signals()).step(
            batch_of(net)
        )
        ends.append([np.array(net.device.to_numpy(g)) for g in [*result.gradients.values(), result.nudge_response]])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_on_both(name, make, fake_gpu):
    """Compare gradients by array code and by kernels: another order of sums may round a state to its neighbour."""
    ends = []
    for device in ("cpu", fake_gpu):
        net = network("conv", device, precision=name, feedback=0.5, **CLIP)
        ends.append(on_host(net, make(net).step(batch_of(net)).gradients))
    for path in ends[0]:
        assert compare(ends[1][path], ends[0][path])["relative_error"] < 4 * net.precision.spacing, path


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_compute_what_numpy_emulates(fake_gpu, name, schedule, form):
    """The whole GPU path on its stand-in, products of halves and of TF32 included, graphs captured and replayed."""
    how = {"free_steps": 8, "nudged_steps": 6}
    assert_same_on_both(name, lambda net: learner_of(net, form, schedule, signals=all_signals(), **how), fake_gpu)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("algorithm", ["onesided", "bptt", "bp"])
def test_the_kernels_compute_the_other_algorithms(fake_gpu, name, algorithm):
    make = {
        "onesided": lambda net: learner_of(net, "classical", scheme="onesided", free_steps=5, nudged_steps=3),
        "bptt": lambda net: ep.BackpropagationThroughTime(net, 5, 4, signals=all_signals(), schedule="synchronous"),
        "bp": lambda net: ep.Backpropagation(net, all_signals()),
    }
    assert_same_on_both(name, make[algorithm], fake_gpu)


# --- Gradients -----------------------------------------------------------------------------------------------------


def deep(precision, feedback, gain, **options):
    """Return five convolutions, two of them pooled, of 16 channels."""
    edges = [ep.Conv2d((8, 8, 2), 16, pooling="max"), *(ep.Conv2d((4, 4, 16), 16) for _ in range(3))]
    edges.append(ep.Conv2d((4, 4, 16), 16, pooling="max"))
    return ep.Network(edges, 3, feedback=feedback, gain=gain, device="cpu", precision=precision, seed=2, **options)


def images_and_labels(samples=8):
    return np.random.default_rng(0).uniform(0, 1, (samples, 8, 8, 2)).astype(np.float32), np.arange(samples) % 3


def cosines_to_float64_bptt(name, feedback, gain, form="deviation", beta=0.02, signal="plain"):
    """Return the cosine of each weight gradient; float64 settles on from the free state of the precision."""
    net, exact = deep(name, feedback, gain), deep("float64", feedback, gain)
    exact.load_parameters({path: p.astype(np.float64) for path, p in net.parameters().items()})
    x, y = images_and_labels()
    learner = learner_of(net, form, free_steps=100, nudged_steps=30, beta=beta, signals=signals_of(signal))
    batch = net.batch(x, y)
    free = learner.settle_free(batch)
    start = ep.State([s.astype(np.float64) for s in free.layers])
    gradients = on_host(net, learner.step_from(batch, free).gradients)
    truth = ep.BackpropagationThroughTime(exact, 100, 40, signals=signals_of(signal), schedule="synchronous")
    true = truth.step_from(exact.batch(x, y), exact.settle(exact.batch(x, y), start, steps=100, schedule="sweeps"))
    return {path: compare(gradients[path], true.gradients[path])["cosine"] for path in gradients if "weight" in path}


@pytest.mark.parametrize(("feedback", "gain", "beta"), [(1.0, 0.4, 2e-4), (0.1, 1.2, 0.02)])
@pytest.mark.parametrize("signal", ["plain", "le"])
@pytest.mark.parametrize(("name", "least"), [("tf32", 0.99), ("float16", 0.99), ("bfloat16", 0.97)])
def test_deviations_keep_the_gradient(name, least, signal, feedback, gain, beta):
    cosines = cosines_to_float64_bptt(name, feedback, gain, signal=signal, beta=beta)
    assert min(cosines.values()) > least, cosines


@pytest.mark.parametrize("name", HALVES)
def test_the_classical_form_in_halves_loses_it(name):
    """The contrast that the warning speaks of: nothing of it is left in the first layer."""
    assert cosines_to_float64_bptt(name, 0.1, 1.2, "classical")["layers.1.weight"] < 0.5


@pytest.mark.parametrize("scheme", ["centered", "onesided", "tangent"])
@pytest.mark.parametrize("name", HALVES)
def test_tiny_responses_survive_halves(name, scheme):
    """With lambda 1e-3 the first of five layers answers a nudge by 1e-12, far below what float16 can hold."""
    net, exact = deep(name, 1e-3, 1.2), deep("float64", 1e-3, 1.2)
    exact.load_parameters({path: p.astype(np.float64) for path, p in net.parameters().items()})
    x, y = images_and_labels()
    beta = {"centered": 0.1, "onesided": 0.003, "tangent": 1.0}[scheme]
    result = ep.EquilibriumPropagation(net, beta, 8, 8, scheme=scheme, schedule="sweeps").step(x, y)
    true = ep.EquilibriumPropagation(exact, beta, 8, 8, scheme=scheme, schedule="sweeps").step(x, y)
    assert 0 < result.nudge_response[0] / (1 if scheme == "tangent" else beta) < 1e-11
    np.testing.assert_allclose(result.nudge_response, true.nudge_response, rtol=0.05)
    for path, gradient in result.gradients.items():
        row = compare(gradient, true.gradients[path])
        assert row["cosine"] > (0.995 if name == "float16" else 0.97), (path, row)
        assert row["relative_error"] < (0.1 if name == "float16" else 0.25), (path, row)


@pytest.mark.parametrize("kappa", [0.1, 3000.0])
@pytest.mark.parametrize("beta", [1e-4, 0.5])
def test_the_scale_of_float16_suits_every_beta_and_kappa(beta, kappa):
    """A nudge that would vanish in float16, and one that would overflow it: as in float32 by the same scheme."""
    ends = []
    for name in ("float16", "float32"):
        net = deep(name, 0.1, 1.2)
        signals = [ep.LocalError([2, 4], kappa=kappa, annealing="constant")]
        learner = ep.EquilibriumPropagation(net, beta, 20, 10, scheme="tangent", signals=signals, schedule="sweeps")
        centered = ep.EquilibriumPropagation(net, beta, 20, 10, signals=signals, schedule="sweeps")
        x, y = images_and_labels()
        ends.append([*learner.step(x, y).gradients.values()] + [*centered.step(x, y).gradients.values()])
        ends[-1] = [np.array(g) for g in ends[-1]]
    for half, single in zip(*ends, strict=True):
        assert np.isfinite(half).all()
        assert compare(half, single)["cosine"] > 0.98


@pytest.mark.parametrize("form", ["deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_scale_changes_nothing_but_what_is_stored(monkeypatch, schedule, form):
    """A power of two in float32: the same bits of gradients, residuals, responses and states."""
    ends = []
    for scale in (1.0, 2.0**-9, 2.0**10):
        monkeypatch.setattr(Precision, "scale", lambda self, size, scale=scale: scale)
        net = network("conv", "cpu", precision="float32", feedback=0.25, **CLIP)
        batch, signals = batch_of(net), all_signals()
        learner = learner_of(net, form, schedule, free_steps=5, nudged_steps=4, signals=signals)
        result = learner.step(batch)
        free = net.settle(batch, steps=5, schedule=schedule, relaxation=1.0)
        beta = 1.0 if form == "tangent" else [0.3, -0.3]
        how = {"targets": batch, "nudge": form, "schedule": schedule, "relaxation": 1.0, "signals": signals}
        nudged = net.settle(batch, free, beta=beta, steps=4, **how)
        assert nudged.scales == [scale * a for a in (16.0, 4.0, 1.0)]
        found = [*result.gradients.values(), result.nudge_response, result.nudged.per_sample, *nudged.layers]
        found += ep.Backpropagation(net, signals).step(batch).gradients.values()
        found += (
            ep.BackpropagationThroughTime(net, 3, 3, signals=signals, schedule="synchronous")
            .step(batch)
            .gradients.values()
        )
        ends.append([np.array(array) for array in found])
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("algorithm", ["bp", "bptt"])
def test_the_other_algorithms(name, algorithm):
    ends = []
    for precision in (name, "float64"):
        net = deep(precision, 0.1, 1.2)
        signals = signals_of("le")
        learner = {
            "bp": lambda net=net, own=signals: ep.Backpropagation(net, own),
            "bptt": lambda net=net, own=signals: ep.BackpropagationThroughTime(
                net, 20, 8, signals=own, schedule="synchronous"
            ),
        }[algorithm]()
        x, y = images_and_labels()
        result = learner.step(x, y)
        ends.append(on_host(net, result.gradients) | {"loss": np.array([float(result.loss)])})
    for path in ends[0]:
        cosine = compare(ends[0][path], ends[1][path])["cosine"]
        assert cosine > (0.98 if name == "bfloat16" else 0.999), (path, cosine)


# --- Residuals, energy, warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES)
def test_residuals_are_those_of_the_true_scale(name):
    """Early in a phase, where changes are large, the residuals are those of float32 to a few digits."""
    ends = []
    for precision in (name, "float32"):
        net = deep(precision, 0.3, 0.9)
        batch = net.batch(*images_and_labels())
        free = net.settle(batch, steps=30, schedule="evenodd", relaxation=1.0)
        nudged = net.settle(
            batch,
            free,
            targets=batch,
            beta=[0.3, -0.3],
            nudge="deviation",
            steps=2,
            record=True,
            schedule="synchronous",
        )
        ends.append([nudged.stats.residual, nudged.stats.trace[0]])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05)


def test_rounded_states_come_to_rest_exactly():
    """Sweeps of a network of finitely many states end in one: a tolerance far below the spacing is reached."""
    net = deep("float16", 0.1, 1.2)
    stats = net.settle(images_and_labels()[0], steps=200, schedule="sweeps", tolerance=1e-9).stats
    assert stats.converged
    assert stats.residual.max() == 0


def test_the_oscillation_test_is_done_in_float32():
    """Squares of distances of 1e-4 are no numbers of float16: a phase that merely creeps is not taken for a cycle."""
    net = network("dense", "cpu", precision="float16", gain=0.9)
    with pytest.warns(ep.ConvergenceWarning):
        stats = net.settle(batch_of(net), steps=6, tolerance=1e-9, schedule="synchronous").stats
    assert not stats.oscillating


@pytest.mark.parametrize(("beta", "swings"), [(0.99, True), (0.5, False)])
@pytest.mark.parametrize("nudge", ["classical", "deviation"])
@pytest.mark.parametrize("name", [*HALVES, "float32"])
def test_an_oscillation_is_seen_however_what_moves_is_stored(name, nudge, beta, swings):
    """``s <- d - beta (s - y)`` moves by ``-beta`` times its last move: two steps undo 0.99 of it, or a half."""
    wide = ep.Clip("wide", 1.0, -10.0, 10.0)
    net = ep.Network([ep.Linear((2,), 2)], 2, activation=wide, loss="squared_error", device="cpu", precision=name)
    x, y = np.ones((3, 2), np.float32), np.array([0, 1, 0])
    free = net.settle(x, steps=4)
    how = {"nudge": nudge, "steps": 6, "schedule": "synchronous", "tolerance": 1e-6}
    with pytest.warns(ep.ConvergenceWarning):
        assert net.settle(x, free, targets=y, beta=beta, **how).stats.oscillating is swings


@pytest.mark.parametrize("name", HALVES)
def test_energy_is_that_of_the_states_in_float32(name):
    net, exact = deep(name, 0.5, 0.9), deep("float64", 0.5, 0.9)
    exact.load_parameters({path: p.astype(np.float64) for path, p in net.parameters().items()})
    x, y = images_and_labels()
    free = net.settle(x, steps=20, schedule="synchronous")
    layers = hosts(net, free.layers)
    found = net.energy.value(x, free.layers, net.nudges(net.batch(x, y)), 0.1)
    expected = exact.energy.value(x, layers, exact.nudges(exact.batch(x, y)), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def risks(**options):
    network_options = {key: options.pop(key) for key in ("precision", "activation") if key in options}
    net = network("dense", "cpu", **network_options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ep.EquilibriumPropagation(net, **{"schedule": "synchronous", "relaxation": 1.0} | options)
    assert {w.category for w in caught} <= {ep.PrecisionWarning}
    return [str(w.message) for w in caught]


def test_unsafe_combinations_warn_in_one_line_each():
    assert risks(precision="float32", nudge="classical", tolerance=1e-6) == []
    assert risks(precision="float16") == risks(precision="bfloat16", activation="relu") == []
    assert risks(precision="tf32", nudge="classical") == []
    (line,) = risks(precision="float16", nudge="classical", schedule="sweeps", tolerance=1e-6)
    assert "precision float16 with nudge 'classical': states near 1/2 are stored 0.0005 apart" in line
    assert line.endswith("use nudge 'deviation', or precision float32")
    (line,) = risks(precision="bfloat16", tolerance=1e-3)
    assert "may never reach a tolerance of 0.001" in line
    assert line.endswith("or a tolerance of at least 0.004")
    assert len(risks(precision="tf32", tolerance=1e-6)) == 1
    relaxed = {"schedule": "evenodd", "relaxation": 1.6, "tolerance": 1e-6}
    assert risks(precision="tf32", **relaxed) == risks(precision="float16", **relaxed | {"relaxation": 1}) == []
    (line,) = risks(precision="float16", **relaxed)
    assert "precision float16 with relaxation 1.6 may never reach a tolerance of 1e-06" in line
    assert line.endswith("use relaxation 1, or a tolerance of at least 0.0005")
    (line,) = risks(precision="float16", activation="relu")
    assert "ends at 65504 and activation 'relu' has no upper bound; use precision bfloat16" in line
    both = risks(precision="float16", nudge="classical", tolerance=1e-6, activation="gelu")
    assert len(both) == 3
    assert all("\n" not in line for line in both)


def test_every_precision_is_offered_by_config_and_network():
    from cupyep.training.config import OPTIONS

    assert OPTIONS["precision"].metadata["choices"] == backend.PRECISIONS
    for name in backend.PRECISIONS:
        assert ep.vgg(5, width=0.02, device="cpu", precision=name, feedback=1.0).config["precision"] == name


# --- Heads in nudged phases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("name", HALVES)
def test_large_logits_of_a_teacher_do_not_overflow(name, pool):
    """Deviations are scaled up to 1024 times the loss; errors of 100 must not end as infinities in float16."""
    net = network("conv", "cpu", precision=name)
    head = net.bind(ep.Distillation(Teacher(), [1], loss="squared_error", pool=pool)).term(1)
    s = np.random.default_rng(0).uniform(0, 1, (2, 3, 3, 3)).astype(np.float32)
    target, scale = np.array([[100, -100, 50], [0, 1, 2]], np.float32), np.array([1000, -1000], np.float32)
    force, expected = np.full(s.shape, np.nan, np.float32), np.zeros(s.shape, np.float32)
    head.add_force(s, target, scale, expected)
    seen = np.ascontiguousarray(s[:, :2, :2] if pool else s)
    if pool:
        seen = s[:, :2, :2].mean(axis=(1, 2), keepdims=True)
    head.refresh()
    head.put_force(seen.astype(net.precision.stored), target, scale, force, np.empty(head.scratch_size(2), "f4"), False)
    for found, right in zip(force, expected, strict=True):
        np.testing.assert_allclose(found, right, atol=4 * net.precision.spacing * np.abs(right).max())


@pytest.mark.parametrize("kind", ["readout", "fixed"])
@pytest.mark.parametrize("name", HALVES)
def test_changed_maps_are_taken_up(name, kind):
    """The rounded copy of a map is that of the current one, in every phase."""
    deviations = []
    for change in ("before", "after", "never"):
        net = network("conv", "cpu", precision=name, **CLIP)
        signal = net.bind(ep.LocalError([2]))
        batch = net.batch(batch_of(net))
        weight = (net.readout if kind == "readout" else signal.term(2)).weight
        for moment in ("before", "after"):
            if change == moment:
                weight[...] = weight[::-1].copy()
            free = net.settle(batch, steps=3, schedule="synchronous")
            end = net.settle(
                batch,
                free,
                targets=batch,
                beta=0.1,
                nudge="deviation",
                steps=3,
                signals=[signal],
                schedule="synchronous",
            )
        deviations.append([np.array(eps) for eps in end.deviations])
    for before, after in zip(*deviations[:2], strict=True):
        np.testing.assert_array_equal(after, before)
    assert any(np.abs(a.astype(float) - c).max() > 1e-3 for a, c in zip(deviations[1], deviations[2], strict=True))


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_ones_own_sees_states_in_float32(name, form):
    """And the force of one that is a head, but adds its own way, is added."""
    seen = []

    class Own(ep.heads.Head):
        def add_force(self, state, target, scale, force, scratch=None):
            seen.append((state.dtype, state.shape[1:], state.copy()))
            super().add_force(state, target, scale, force)

    class Signal(ep.LocalError):
        def make_term(self, layer, shape):
            term = Own(layer, shape, self.criterion, self.classes, pool=self.pool)
            term.initialize(np.random.default_rng([self.seed, layer]), self.gain, self.device, self.dtype)
            return term

    ends = []
    for kind in (Signal, ep.LocalError):
        net = network("conv", "cpu", precision=name, feedback=0.5, **CLIP)
        learner = learner_of(net, form, signals=[kind([1, 3], pool=2)], free_steps=4, nudged_steps=3)
        ends.append(on_host(net, learner.step(batch_of(net)).gradients))
    assert {dtype for dtype, *_ in seen} == {np.dtype(np.float32)}
    assert {shape for _, shape, _ in seen} == {net.state_shapes[0], net.state_shapes[2]}
    if form != "classical":  # a rest point in halves would be another one
        assert any((s != s.astype(net.precision.stored)).any() for *_, s in seen)
    most = (8 if form != "classical" else 64) * net.precision.spacing  # states near 1/2 have few digits of a response
    for path in ends[0]:
        assert compare(ends[1][path], ends[0][path])["relative_error"] < most, path
