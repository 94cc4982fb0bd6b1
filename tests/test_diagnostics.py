"""The failures of EP, found and put into words. Oracle: records made by hand, just inside and outside a limit."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import cupyep as ep
from cupyep.diagnostics.probe import PhaseProbe
from cupyep.diagnostics.rules import LIMITS, Setting, find, probe_record

LAYERS = 4
SETTING = Setting((1.0,) * LAYERS, (64, 64, 16, 16), 50, "deviation", 1e-7, free_steps=6, nudged_steps=4)
HEALTHY = {
    "epoch": 3,
    "train_accuracy": 0.4,
    "kappa": None,
    "free_residual_per_layer": [0.01] * LAYERS,
    "nudged_residual_per_layer": [1e-3] * LAYERS,
    "free_distance": [0.1, 0.2, 0.3, 0.2],
    "nudged_distance": [0.6, 0.4, 0.2, 0.0],
    "free_unsettled": [0.0, 0.0, 0.2, 0.0],
    "nudged_unsettled": [0.2, 0.0, 0.0, 0.0],
    "activity": [0.3, 0.3, 0.2, 0.3],
    "saturated": [0.3, 0.2, 0.2, 0.1],
    "dead": [0.0, 0.0, 0.1, 0.4],
    "nudge_response": [0.002, 0.004, 0.02, 0.08],
    "gradient_norm": [0.02, 0.2, 0.5, 1.0, 3.0],
}


def findings(setting=SETTING, probes=None, history=(), **changes):
    return find({**HEALTHY, **changes}, setting, probes or {}, history)


def the_finding(*args, **kwargs):
    found = findings(*args, **kwargs)
    assert len(found) == 1, found
    assert "\n" not in found[0].message
    return found[0]


def probe(steps, last, before=1.0, oscillating=False):
    """A probe with residuals of 1 in every layer, but twice `before` and twice `last` in the last four iterations."""
    residual = np.full((steps + 9, LAYERS), 1.0)
    residual[-4:-2], residual[-2:] = before, last
    flags = np.full(LAYERS, oscillating)
    return PhaseProbe(
        steps, residual, np.ones((LAYERS, 2)), np.full((LAYERS, 2), 0.9), flags, np.ones(LAYERS), np.zeros(LAYERS)
    )


def test_a_healthy_epoch_is_not_warned_about():
    assert findings() == []
    assert find({"epoch": 1, "activity": [0.1]}, Setting((1.0,), (3,), 8), {}) == [], "nothing known, nothing said"


@pytest.mark.parametrize("feedback", [0.3, 0.1, 0.01])
def test_weak_feedback_is_not_a_vanishing_nudge(feedback):
    """A response of lambda^(L - n) is by design: 1e-6 in layer 1 of 4 for lambda 0.01, the gradient as for 1."""
    weights = tuple(feedback ** (n - LAYERS) for n in range(1, LAYERS + 1))
    response = [r / a for r, a in zip(HEALTHY["nudge_response"], weights, strict=True)]
    assert findings(dataclasses.replace(SETTING, weights=weights), nudge_response=response) == []
    if feedback == 0.01:
        assert the_finding(nudge_response=response).signature == "vanishing", "the same response with lambda 1"


# --- convergence ---------------------------------------------------------------------------------------------------


def test_a_free_phase_that_does_not_settle_is_named_with_layers_samples_and_knobs():
    finding = the_finding(free_unsettled=[0.0, 0.26, 0.9, 0.3], free_distance=[0.1, 0.5, 0.8, 0.5])
    assert finding.signature == "convergence"
    assert finding.layers == (2, 3, 4)
    assert finding.message == (
        "the free phase does not settle: after 6 sweeps layer 3 has 80% of its size left to go, too much in 90% of the "
        "samples (layers 2-4); raise --free-steps, or lower --feedback or --gain"
    )


def test_a_nudged_phase_has_its_own_words():
    found = the_finding(nudged_unsettled=[1.0, 0.0, 0.5, 0.0], nudged_distance=[0.97, 0.3, 0.8, 0.1])
    assert found.message == (
        "the nudged phase does not settle: after 4 sweeps the response of layer 1 would still change by 97%, too much "
        "in 100% of the samples (layers 1, 3); raise --nudged-steps, or lower --feedback or --gain"
    )


def test_the_knob_depends_on_how_it_fails():
    change = {"nudged_unsettled": [1.0, 0.0, 0.0, 0.0], "nudged_distance": [0.9, 0.0, 0.0, 0.0]}
    growing = the_finding(probes={"nudged": probe(4, last=2.0)}, **change).message
    assert growing.endswith("it grows all the time: lower --feedback or --gain, or raise --free-steps")
    plain = the_finding(dataclasses.replace(SETTING, plain=True), {"nudged": probe(4, last=2.0)}, **change).message
    assert plain == f"{growing}, or train anew with --weights standardized"
    for late in (probe(4, last=0.5), probe(4, last=2.0, before=3.0)):
        text = the_finding(probes={"nudged": late}, **change).message
        assert text.endswith("raise --nudged-steps, or lower --feedback or --gain")
    absent = dataclasses.replace(probe(4, last=2.0), distance=np.ones((LAYERS, 2)))
    text = the_finding(probes={"nudged": absent}, **change).message
    assert text.endswith("raise --nudged-steps, the nudge has not reached layer 1 yet"), "not growing, but new there"
    synchronous = dataclasses.replace(SETTING, schedule="synchronous", free_steps=1)
    change = {"free_unsettled": [0.0, 1.0, 0.0, 0.0], "free_distance": [0.0, 1.0, 0.0, 0.0]}
    swinging = the_finding(synchronous, {"free": probe(1, last=1.0, oscillating=True)}, **change).message
    assert "after 1 step layer 2" in swinging
    assert swinging.endswith("it swings between two states: use --schedule evenodd or sweeps")


def test_with_a_tolerance_the_residual_counts():
    setting = dataclasses.replace(SETTING, tolerance=1e-3)
    text = the_finding(
        setting, free_unsettled=[0.0, 0.0, 0.3, 0.0], free_residual_per_layer=[1e-4, 2e-4, 2e-3, 0]
    ).message
    assert "layer 3 has residual 2.0e-03, above the tolerance 1e-03 in 30% of the samples (layer 3)" in text
    assert text.endswith("or raise --tolerance")


@pytest.mark.parametrize(("relaxation", "rate", "said"), [(1.6, 0.67, True), (1.6, 0.72, False), (1.0, 0.05, False)])
def test_an_iteration_that_leaves_what_over_relaxation_does(relaxation, rate, said):
    residual = np.repeat(rate ** np.arange(15.0), LAYERS).reshape(15, LAYERS)
    seen = dataclasses.replace(probe(6, 0), residual=residual)
    setting = dataclasses.replace(SETTING, schedule="evenodd", relaxation=relaxation)
    found = the_finding(setting, {"free": seen}, free_unsettled=[0.0, 0.3, 0.0, 0.0])
    knob = "--relaxation, --feedback or --gain" if said else "--feedback or --gain"
    assert found.message.endswith(f"; raise --free-steps, or lower {knob}")


def test_unsettled_samples_are_counted_by_their_distance():
    """Limits 0.5 free, 0.75 nudged; a tolerance has its own count, of all samples of the epoch."""
    far = np.array([[0.4, 0.6, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4]])
    probes = {
        name: PhaseProbe(2, np.ones((11, 2)), far, far, np.zeros(2, bool), np.ones(2), np.zeros(2))
        for name in ("free", "nudged")
    }
    record = probe_record(probes, None)
    assert record["free_unsettled"] == [0.75, 0.0]
    assert record["nudged_unsettled"] == [0.5, 0.0]
    np.testing.assert_allclose(record["free_distance"], [0.675, 0.25])
    names = {f"{phase}_{name}" for phase in probes for name in ("contraction", "distance")}
    assert set(probe_record(probes, 1e-3)) == names
    assert probe_record({}, None) == {}


# --- vanishing response --------------------------------------------------------------------------------------------


def test_responses_are_compared_by_their_norm():
    """Layers 1 and 2 have four times the units of the last, so their norms count twice: half the limit of the means."""
    limit = LIMITS["response"].value * HEALTHY["nudge_response"][-1] / 2
    assert findings(nudge_response=[1.01 * limit, 0.004, 0.02, 0.08]) == []
    finding = the_finding(nudge_response=[0.5 * limit, 0.9 * limit, 0.02, 0.08])
    assert (finding.signature, finding.layers) == ("vanishing", (1, 2))
    assert finding.message == (
        "the nudge vanishes on its way down: layer 1 responds with 0.05% of the last layer's strength, its gradient "
        "has 2% (layers 1-2); add signals (--aug le or kd), or lower --feedback"
    )


def test_a_tiny_gradient_is_enough_and_the_readout_is_no_layer():
    finding = the_finding(gradient_norm=[9e-4, 0.2, 0.5, 1.0, 1e-9])
    assert (finding.signature, finding.layers) == ("vanishing", (1,))
    assert "its gradient has 0.09%" in finding.message


def test_the_remedy_knows_of_signals_and_of_the_classical_form():
    setting = dataclasses.replace(SETTING, signals=True, form="classical", precision=1e-16)
    text = the_finding(setting, nudge_response=[1e-9, 0.004, 0.02, 0.08]).message
    assert text.endswith("raise --kappa, or lower --feedback, or use --nudge deviation")


def test_a_network_that_does_not_respond_at_all():
    text = the_finding(nudge_response=[0.0] * 4, gradient_norm=[0.0] * 5).message
    assert text.startswith("no layer responds to the nudge")
    assert "lower --learning-rate" in text


def test_a_nudge_that_has_not_arrived_does_not_vanish():
    response = {"nudge_response": [0.0, 0.004, 0.02, 0.08], "gradient_norm": [0.0, 0.2, 0.5, 1.0, 3.0]}
    late = {"nudged_unsettled": [1.0, 0.0, 0.0, 0.0], "nudged_distance": [1.0, 0.0, 0.0, 0.0]}
    assert the_finding(**response, **late).signature == "convergence"
    assert the_finding(**response).signature == "vanishing"


def test_a_nudge_that_is_too_strong_for_a_derivative():
    assert findings(nonlinearity=[0.1, 0.2, 0.3, 0.49]) == []
    finding = the_finding(nonlinearity=[0.1, 0.6, 0.3, 0.75])
    assert (finding.signature, finding.layers) == ("nonlinearity", (2, 4))
    assert "75% of the response of layer 4 is no multiple of that to half the nudge (layers 2, 4)" in finding.message
    assert finding.message.endswith("; lower --beta, or use --scheme tangent, its limit")
    classical = dataclasses.replace(SETTING, form="classical", precision=1e-16)
    assert "; use --nudge deviation, or lower --beta" in the_finding(classical, nonlinearity=[0.6] * 4).message


def test_rounding_drowns_the_classical_form_only():
    """100 spacings of 1e-7 of a state of 0.3 are 3e-6; deviations keep their digits."""
    weights = (1e6, 1e4, 1e2, 1.0)
    small = {"nudge_response": [2.9e-6, 2e-5, 1e-3, 0.08]}
    classical = dataclasses.replace(SETTING, form="classical", weights=weights)
    finding = the_finding(classical, **small)
    assert (finding.signature, finding.layers) == ("vanishing", (1,))
    assert finding.message.startswith(
        "the nudge is lost in rounding: the states of layer 1 respond by 1e-05 of their size"
    )
    assert findings(dataclasses.replace(classical, form="deviation"), **small) == []
    assert findings(classical, nudge_response=[3.1e-6, 2e-5, 1e-3, 0.08]) == []
    assert findings(dataclasses.replace(classical, precision=1e-16), **small) == []


# --- collapse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saturated", "dead", "layers"),
    [
        ([0.76, 0.2, 0.2, 0.2], [0.0] * 4, (1,)),
        ([0.74, 0.2, 0.2, 0.2], [0.0] * 4, None),
        ([0.0] * 4, [0.0, 0.0, 0.76, 0.0], (3,)),
        ([0.0] * 4, [0.0, 0.0, 0.74, 0.0], None),
        ([0.1, 0.4, 0.0, 0.4], [0.0, 0.36, 0.0, 0.4], (2, 4)),
        ([0.0, 0.4, 0.0, 0.37], [0.0, 0.34, 0.0, 0.23], None),
    ],
)
def test_units_that_do_not_respond(saturated, dead, layers):
    found = findings(saturated=saturated, dead=dead)
    assert [f.layers for f in found] == ([] if layers is None else [layers])
    assert all(f.signature == "collapse" for f in found)


def test_few_images_leave_channels_still_by_chance():
    assert findings(dead=[0.9] * 4)[0].signature == "collapse"
    assert findings(dataclasses.replace(SETTING, batch_size=15), dead=[0.9] * 4) == []


def test_the_knob_of_a_collapse():
    saturated, dead = {"saturated": [0.8] * 4}, {"dead": [0.0, 0.0, 0.0, 0.8], "saturated": [0.1] * 4}
    text = the_finding(**saturated).message
    assert text.startswith(
        "units do not respond: in layer 4 80% of the units are saturated and 40% of the channels are dead"
    )
    assert text.endswith("(layers 1-4); lower --gain, or --learning-rate")
    assert the_finding(**dead).message.endswith("raise --gain, or lower --learning-rate")
    both = the_finding(dead=[0.0, 0.0, 0.0, 0.5], saturated=[0.0, 0.0, 0.0, 0.4]).message
    assert both.endswith("lower --gain, or --learning-rate"), "what is thrown to both ends is driven too hard"
    text = the_finding(dead=[0.0, 0.0, 0.0, 0.8], saturated=[0.0] * 4).message
    assert "in layer 4 80% of the channels are dead (layer 4)" in text
    assert the_finding(**saturated, kappa=1.0).message.endswith("lower --kappa, or --learning-rate")
    assert the_finding(**saturated, kappa=[0.1, 2.0]).message.endswith("lower --kappa, or --learning-rate")
    assert the_finding(**saturated, kappa=0.9).message.endswith("lower --gain, or --learning-rate")
    first = {**HEALTHY, "epoch": 1, "train_accuracy": 0.3}
    assert the_finding(**saturated, history=[first]).message.endswith("in the first epoch: lower --learning-rate")
    full = {**first, **saturated}
    assert the_finding(**saturated, history=[full]).message.endswith("lower --gain, or --learning-rate")


def test_a_falling_accuracy():
    history = [{**HEALTHY, "epoch": n, "train_accuracy": a} for n, a in ((1, 0.2), (2, 0.4), (3, 0.35))]
    assert findings(history=history, train_accuracy=0.31) == []
    finding = the_finding(history=history, train_accuracy=0.29, kappa=0.45)
    assert (finding.signature, finding.layers) == ("collapse", ())
    assert finding.message == (
        "the training accuracy fell from 40.0% in epoch 2 to 29.0% with kappa at 0.45; lower --kappa"
    )
    assert the_finding(history=history, train_accuracy=0.29).message.endswith("to 29.0%; lower --learning-rate")


# --- settings ------------------------------------------------------------------------------------------------------


def test_the_setting_of_a_learner():
    net = ep.vgg(5, input_shape=(16, 16, 3), width=0.03, feedback=0.5, device="cpu")
    learner = ep.EquilibriumPropagation(
        net,
        0.3,
        7,
        5,
        nudge="classical",
        schedule="evenodd",
        tolerance=1e-3,
        signals=[ep.LocalError([1])],
        relaxation=1.3,
    )
    units = tuple(int(np.prod(shape)) for shape in net.state_shapes)
    expected = Setting((8, 4, 2, 1), units, 50, "classical", 2.0**-23, "evenodd", 1e-3, 7, 5, 1.3, True, True)
    assert Setting.of(learner, 50) == expected
    assert Setting.of(ep.EquilibriumPropagation(net, scheme="tangent", schedule="synchronous"), 50).form == "tangent"
    assert Setting.of(ep.Backpropagation(net), 50).form is None
    own = ep.vgg(5, input_shape=(16, 16, 3), width=0.03, weights="standardized", device="cpu")
    assert not Setting.of(ep.EquilibriumPropagation(own), 50).plain


def test_every_limit_says_where_it_comes_from():
    assert all(limit.value > 0 and len(limit.why) > 20 for limit in LIMITS.values())


def test_records_of_other_algorithms_are_judged_by_what_they_have():
    record = {key: value for key, value in HEALTHY.items() if not key.startswith(("free", "nudged"))}
    record |= {"nudge_response": None, "saturated": [0.9] * 4}
    found = find(record, SimpleNamespace(**vars(SETTING)), {})
    assert [f.signature for f in found] == ["collapse"]
