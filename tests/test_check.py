"""The comparison of two gradients. Oracle: hand values, and the gradients themselves put into formulas here."""

import math

import numpy as np
import pytest
from small import batch_of, network, on_host, signals_of

import cupyep as ep
from cupyep.learning.check import compare, compare_precisions
from cupyep.state import State


def test_compare_by_hand():
    row = compare(np.array([[3.0, 0.0], [4.0, -1.0]]), np.array([[3.0, 0.0], [-4.0, -1.0]]))
    # products 9 - 16 + 1 = -6, both norms sqrt(26); difference (0, 0, 8, 0); signs agree in 2 of 3 entries not zero
    assert row["cosine"] == pytest.approx(-6 / 26)
    assert row["relative_error"] == pytest.approx(8 / math.sqrt(26))
    assert row["sign_agreement"] == pytest.approx(2 / 3)


def test_compare_knows_size_from_direction():
    truth = np.array([1.0, -2.0, 2.0])
    row = compare(1.5 * truth, truth)
    assert row["cosine"] == pytest.approx(1.0)
    assert row["relative_error"] == pytest.approx(0.5)
    assert compare(2.0 * truth, truth)["relative_error"] == pytest.approx(1.0)
    assert compare(truth, 2.0 * truth)["relative_error"] == pytest.approx(0.5)


def test_compare_does_not_underflow():
    row = compare(np.array([3e-200, 4e-200]), np.array([4e-200, 3e-200]))
    assert row["cosine"] == pytest.approx(24 / 25)
    assert row["relative_error"] == pytest.approx(math.sqrt(2) / 5)


@pytest.mark.parametrize(("a", "b"), [([0.0, 0.0], [1.0, 0.0]), ([1.0, 0.0], [0.0, 0.0])])
def test_a_gradient_of_zero_has_no_direction(a, b):
    assert all(math.isnan(value) for value in compare(np.array(a), np.array(b)).values())


@pytest.mark.parametrize("schedule", ["synchronous", "sweeps"])
@pytest.mark.parametrize("signal", ["plain", "kd"])
def test_rows_compare_ep_with_bptt_from_one_free_state(device, signal, schedule):
    net = network("conv", device, pooling="max", activation="hard_sigmoid")
    batch, signals = batch_of(net), signals_of(signal)
    rows = ep.check_gradients(
        net, batch, beta=0.2, free_steps=60, nudged_steps=7, schedule=schedule, signals=signals, nudge="classical"
    )
    how = {"signals": signals, "schedule": schedule}
    free = net.settle(batch, steps=60, schedule=schedule, relaxation=1.0)
    found = ep.EquilibriumPropagation(net, 0.2, 30, 7, nudge="classical", **how).step_from(batch, free)
    # The same number of synchronous steps, or so many that more change nothing.
    unrolled, rel = (7, 1e-9) if schedule == "synchronous" else (200, 2e-5)
    true = on_host(net, ep.BackpropagationThroughTime(net, 30, unrolled, **how).step_from(batch, free).gradients)
    gradients = on_host(net, found.gradients)
    names = [path.removesuffix(".weight") for path in gradients if path.endswith(".weight")]
    assert [row["name"] for row in rows] == names
    response = net.device.to_numpy(found.nudge_response)
    for row in rows:
        a, b = (g[f"{row['name']}.weight"].ravel() for g in (gradients, true))
        assert row["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=rel)
        assert row["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=max(rel, 1e-6))
        assert row["sign_agreement"] == pytest.approx(np.mean(np.sign(a[b != 0]) == np.sign(b[b != 0])))
        assert row["gradient_norm"] == pytest.approx(np.linalg.norm(a), rel=1e-9)
        layer = row["name"].split(".")
        expected = response[int(layer[1]) - 1] if layer[0] == "layers" else None
        assert row["nudge_response"] == (expected if expected is None else pytest.approx(expected, rel=1e-9))


def test_both_phases_are_relaxed_as_told():
    """Three nudged steps, far from rest: as those of a learner with this relaxation, and not with the network's own."""
    net, how = network("conv"), {"schedule": "evenodd", "relaxation": 0.7}
    batch = batch_of(net)
    rows = ep.check_gradients(net, batch, beta=0.2, free_steps=40, nudged_steps=3, **how)
    free = net.settle(batch, steps=40, **how)
    norms = []
    for relaxation in (0.7, None):
        learner = ep.EquilibriumPropagation(net, 0.2, 40, 3, **how | {"relaxation": relaxation})
        gradients = on_host(net, learner.step_from(batch, free).gradients)
        norms.append([np.linalg.norm(gradients[f"{row['name']}.weight"]) for row in rows])
    np.testing.assert_allclose([row["gradient_norm"] for row in rows], norms[0], rtol=1e-9)
    assert not np.allclose(*norms, rtol=0.01)


def test_a_truth_that_does_not_converge_is_said():
    net = network("conv", activation="tanh", gain=4.0)
    with pytest.raises(ep.DivergenceError, match="no stable equilibrium; raise --free-steps, or lower --feedback"):
        ep.check_gradients(net, batch_of(net), free_steps=3, nudged_steps=3, schedule="sweeps")


def deep(precision):
    """A network of nine dense layers that has several equilibria."""
    layers = [ep.Linear((6, 6, 2), 16), *(ep.Linear((16,), 16) for _ in range(8))]
    net = ep.Network(layers, 4, activation="hard_sigmoid", gain=0.55, precision=precision, device="cpu", feedback=1.0)
    for path, array in net.parameters().items():
        if path.endswith("bias"):
            array[...] = 0.3
    return net, []


def test_states_in_halves_are_at_rest_when_they_are_compared(monkeypatch):
    """Over-relaxed updates leave them flickering by a digit; one more plain update must not move them."""

    def moved(net, batch, free):
        more = net.settle_free(batch, free, steps=1, schedule="evenodd")
        return max(
            np.abs(a.astype(float) - b.astype(float)).max() for a, b in zip(free.layers, more.layers, strict=True)
        )

    def look(self, batch, free):
        if self.network.precision.name == "float16":
            found.append(moved(self.network, batch, free.copy()))
        return step_from(self, batch, free)

    found, step_from = [], ep.EquilibriumPropagation.step_from
    monkeypatch.setattr(ep.EquilibriumPropagation, "step_from", look)
    batch = batch_of(deep("float32")[0], 8)
    how = {"free_steps": 100, "schedule": "evenodd"}
    compare_precisions(deep, "float16", batch.images, batch.labels, forms=["deviation"], relaxation=1.6, **how)
    net = deep("float16")[0]
    halves = batch_of(net, 8)
    assert moved(net, halves, net.settle_free(halves, steps=100, schedule="evenodd", relaxation=1.6).copy()) > 0
    assert found == [0, 0]


def test_a_precision_is_compared_where_it_holds_the_free_state_and_where_it_finds_one():
    """Step by step: float32 from zeros and float16 on from there; float16 from zeros and float32 on from there."""
    how = {"steps": 60, "schedule": "evenodd"}
    nets = {name: deep(name)[0] for name in ("float32", "float16")}
    images, labels = batch_of(nets["float32"], 8).images, np.arange(8) % 4
    batches = {name: net.batch(images, labels) for name, net in nets.items()}

    def settle(name, start=None):
        if start is not None:
            start = State([s.astype(name) for s in start.layers])
        return nets[name].settle_free(batches[name], start, **how).copy()

    def gradients(name, free):
        learner = ep.EquilibriumPropagation(nets[name], 0.1, 60, 10, schedule="evenodd", relaxation=1.0)
        return learner.step_from(batches[name], free).gradients

    def cosines(a, b):
        return [compare(a[path], b[path])["cosine"] for path in a if path.endswith("weight")]

    free = settle("float32")
    found = settle("float16", settle("float16"))
    expected = {
        "cosine_float32": cosines(gradients("float16", settle("float16", free)), gradients("float32", free)),
        "cosine_from_zeros": cosines(gradients("float16", found), gradients("float32", settle("float32", found))),
    }
    settings = {"forms": ["deviation"], "betas": [0.1], "free_steps": 60, "nudged_steps": 10, "schedule": "evenodd"}
    rows = compare_precisions(deep, "float16", images, labels, **settings)[0.1]["deviation"]
    for key, values in expected.items():
        np.testing.assert_allclose([row[key] for row in rows], values, rtol=1e-12, err_msg=key)
    assert not np.allclose(expected["cosine_float32"], expected["cosine_from_zeros"], rtol=1e-6)


def test_no_unrolled_steps_are_refused():
    net = network()
    batch = batch_of(net, 2)
    with pytest.raises(ep.ConfigurationError, match="unrolled_steps"):
        ep.check_gradients(net, batch.images, batch.labels, unrolled_steps=0)
