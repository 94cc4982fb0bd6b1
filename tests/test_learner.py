"""What every step reports of the states. Oracle: the feed-forward states of the oracle, counted by hand."""

import numpy as np
import pytest
from oracle import Oracle
from small import batch_of, network, signals_of

import cupyep as ep


@pytest.mark.parametrize(("activation", "top"), [("hard_sigmoid", 1.0), ("relu6", 6.0), ("tanh", 1.0), ("relu", None)])
def test_activity_saturated_and_dead(device, activation, top):
    """Weights this large drive units to both ends of the range; one channel is switched off by its bias."""
    net = network("conv", device, activation=activation, gain=9.0, pooling="max")
    net.parameters()["layers.2.weight"][..., 1] = 0
    net.parameters()["layers.2.bias"][1] = 0.0
    batch = batch_of(net)
    result = ep.Backpropagation(net).step(batch)
    states = Oracle(net).forward(device.to_numpy(batch.images))
    found = {name: device.to_numpy(getattr(result, name)) for name in ("activity", "saturated", "dead")}
    np.testing.assert_allclose(found["activity"], [np.abs(s).mean() for s in states], rtol=1e-10)
    full = [0.0 if top is None else np.mean(np.abs(s) >= 0.99 * top) for s in states]
    np.testing.assert_allclose(found["saturated"], full, rtol=1e-12)
    still = [[np.abs(s[..., k]).max() <= 1e-3 for k in range(s.shape[-1])] for s in states]
    np.testing.assert_allclose(found["dead"], [np.mean(flags) for flags in still], rtol=1e-12)
    assert found["dead"][1] >= 1 / 4, "the channel that was switched off is among the four"
    assert top is None or found["saturated"].max() > 0.1


def test_half_a_permille_is_still_dead_and_two_are_not():
    net = ep.Network([ep.Linear((1,), 4)], 2, device="cpu", precision="float64", feedback=1.0)
    net.parameters()["layers.1.weight"][...] = [[0.0005, 0.002, 0.985, 0.995]]
    result = ep.Backpropagation(net).step(np.ones((3, 1)), np.array([0, 1, 0]))
    assert (float(result.dead[0]), float(result.saturated[0])) == (0.25, 0.25)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 1.0), (-1.0, 2.0)])
def test_saturated_at_the_end_that_is_further_from_zero(low, high):
    net = ep.Network([ep.Linear((1,), 4)], 2, activation=ep.Clip("skew", 1.0, low, high), device="cpu",
                     precision="float64", feedback=1.0)  # fmt: skip
    net.parameters()["layers.1.weight"][...] = [[-3.0, -0.5, 1.0, 3.0]]
    result = ep.Backpropagation(net).step(np.ones((3, 1)), np.array([0, 1, 0]))
    assert float(result.saturated[0]) == 0.25


LEARNERS = {
    "ep": lambda net, signals: ep.EquilibriumPropagation(net, 0.3, 3, 2, signals=signals, schedule="synchronous"),
    "tangent": lambda net, signals: ep.EquilibriumPropagation(
        net, 0.3, 3, 2, "tangent", schedule="sweeps", signals=signals
    ),
    "bptt": lambda net, signals: ep.BackpropagationThroughTime(net, 3, 4, signals=signals, schedule="synchronous"),
    "bptt, sweeps": lambda net, signals: ep.BackpropagationThroughTime(net, 1, 4, "sweeps", signals=signals),
    "bp": lambda net, signals: ep.Backpropagation(net, signals=signals),
}


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", LEARNERS)
def test_what_a_learner_trains_is_what_it_evaluates(device, name, micro_batch):
    """Far from rest the loss depends on the step: that of `evaluate` is that of `step`, and so are the hits."""
    net = network("conv", device, pooling="max", feedback=0.8, gain=1.5)
    learner, batch = LEARNERS[name](net, signals_of("le")), batch_of(net, 5)
    learner.micro_batch = micro_batch
    result = learner.step(batch)
    loss, correct = learner.evaluate(batch)
    assert float(loss) / len(batch) == pytest.approx(float(result.loss), rel=1e-12)
    assert int(correct) == int(result.correct)
    shared = net.outputs(learner.settle_free(batch).layers[-1]) if hasattr(learner, "settle_free") else None
    same = shared is not None and np.allclose(
        device.to_numpy(shared), device.to_numpy(learner.scores(batch)), atol=1e-6
    )
    assert same == (name in ("ep", "tangent")), "BPTT's state after its free steps is another one"


def test_a_signal_is_taken_once():
    """Twice it would count twice, and an optimizer would find its maps under two paths; an equal one is another."""
    net = network("conv", "cpu")
    one, other = ep.LocalError([1]), ep.LocalError([1])
    for make in (ep.EquilibriumPropagation, ep.BackpropagationThroughTime, ep.Backpropagation):
        with pytest.raises(ep.ConfigurationError, match="a signal is given twice; raise its kappa instead"):
            make(net, signals=[one, other, one])
        assert make(net, signals=[one, other]).signals == [one, other]
