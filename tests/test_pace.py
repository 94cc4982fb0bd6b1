"""Steps that follow the settling. Oracle: eigenvalues of linear networks; a straight run for a resumed one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from quadrants import SILENT, TINY, Recorder, assert_same_state, numbers, run
from ranks import in_ranks

import cupyep as ep
from cupyep.activations import Clip
from cupyep.diagnostics.contraction import WANTED, contraction, steps_to_rest
from cupyep.diagnostics.pace import Pace
from cupyep.diagnostics.probe import PhaseProbe, probe_settling
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.parallel import Communicator
from cupyep.training import runs
from cupyep.training.config import make_config
from cupyep.training.run_directory import RunDirectory
from cupyep.training.trained import load_trained

AUTO = {"free_steps": "auto", "nudged_steps": "auto"}


def pair(weight, feedback=1.0, activation=None, bias=0.0):
    """Two units, one above the other: a sweep multiplies their way to rest by ``feedback * weight**2``."""
    activation = activation or Clip("linear", 1.0, -1e300, 1e300)
    layers = [ep.Linear((1,), 1), ep.Linear((1,), 1)]
    net = ep.Network(layers, 2, activation=activation, feedback=feedback, device="cpu", precision="float64")
    for path, value in {"layers.1.weight": 1.0, "layers.2.weight": weight, "layers.2.bias": bias}.items():
        net.parameters()[path][...] = value
    return net, ep.Batch(np.array([[1.0], [0.7]]), np.array([0, 1]))


def learner_of(net, steps=2, **more):
    return ep.EquilibriumPropagation(net, 0.5, steps, steps, **({"schedule": "sweeps", "scheme": "tangent"} | more))


def probe_of(residual, size=1.0, rounding=0.0):
    table = np.array(residual, float).reshape(len(residual), -1)
    layers = table.shape[1]
    one = np.ones((layers, 1))
    return PhaseProbe(2, table, one, one, np.zeros(layers, bool), np.full(layers, size), np.full(layers, rounding))


# --- what is read from residuals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_a_geometric_series(rho):
    """Residuals rho^t: after t iterations ``rho^t / (1 - rho)`` is left, from rho = 0.5 on beyond what was recorded."""
    probe = probe_of([rho**t for t in range(12)])
    assert contraction(probe) == pytest.approx(rho, rel=1e-9)
    needed = next(t for t in range(1, 200) if rho**t / (1 - rho) <= WANTED * (1 + 1e-9))
    assert steps_to_rest(probe) == pytest.approx(needed, abs=1 if rho < 0.2 else 0)


def test_the_slowest_layer_counts_and_every_second_move():
    slow, fast = 0.6, 0.1
    assert contraction(probe_of([[fast**t, 3 * slow**t] for t in range(12)], 3.0)) == pytest.approx(slow)
    alternating = [0.6**t if t % 2 else 0.0 for t in range(25)]
    assert contraction(probe_of(alternating)) == pytest.approx(0.6, rel=0.15)


def test_rounding_is_left_out():
    """A layer that still moves by its rounding is at rest, however long it does."""
    residual = [max(0.1**t, 3e-2) for t in range(12)]
    assert steps_to_rest(probe_of(residual, rounding=5e-2)) == 2
    assert contraction(probe_of(residual, rounding=5e-2)) < 0.5
    assert steps_to_rest(probe_of(residual)) is None


@pytest.mark.parametrize(
    "residual", [[1.0] * 11, [1.1**t for t in range(11)], [1e4**t for t in range(11)], [1.0, np.inf] + [np.nan] * 9]
)
def test_what_does_not_contract(residual):
    for size in (1.0, max(residual), np.inf):  # which grows with what does
        assert contraction(probe_of(residual, size)) >= 1
        assert steps_to_rest(probe_of(residual, size)) is None


def test_no_more_than_wanted_is_enough():
    """Of two moves of what may be left, the first leaves just that."""
    for second, steps in ((WANTED, 1), (1.01 * WANTED, 2)):
        assert steps_to_rest(probe_of([WANTED, second] + [0.0] * 10)) == steps


def test_what_does_not_move():
    assert contraction(probe_of([0.0] * 11)) is None
    assert steps_to_rest(probe_of([0.0] * 11)) == 1


# --- networks whose contraction is known --------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "feedback"), [(0.5, 1.0), (1.0, 0.1), (2.0, 0.1), (0.9, 1.0), (-1.5, 0.3)])
def test_two_linear_units_contract_by_feedback_times_the_square_of_their_weight(weight, feedback):
    net, batch = pair(weight, feedback)
    probes = probe_settling(learner_of(net), batch)
    for phase in ("free", "nudged"):
        assert contraction(probes[phase]) == pytest.approx(feedback * weight**2, rel=1e-6), phase
    net, batch = pair(1.1 / weight, 1.0)
    net.parameters()["layers.2.weight"][...] = 1.1
    for phase, probe in probe_settling(learner_of(net), batch).items():
        assert contraction(probe) == pytest.approx(1.21, rel=1e-3), phase
        assert steps_to_rest(probe) is None, phase


@pytest.mark.parametrize("radius", [0.6, 0.8, 0.95])
def test_linear_layers_contract_by_the_largest_eigenvalue_of_a_step(radius):
    """Synchronous steps of a linear network are ``s <- M s + c``, M the symmetric matrix of its weights."""
    layers = [ep.Linear((4,), 5), ep.Linear((5,), 6), ep.Linear((6,), 3)]
    net = ep.Network(
        layers, 3, activation=Clip("linear", 1.0, -1e300, 1e300), feedback=1.0, device="cpu", precision="float64"
    )
    second, third = (net.parameters()[f"layers.{n}.weight"] for n in (2, 3))
    matrix = np.zeros((14, 14))
    matrix[5:11, :5], matrix[11:, 5:11] = second.reshape(5, 6).T, third.reshape(6, 3).T
    scale = radius / np.abs(np.linalg.eigvals(matrix + matrix.T)).max()
    second *= scale
    third *= scale
    batch = ep.Batch(np.random.default_rng(0).normal(size=(4, 4)), np.array([0, 1, 2, 0]))
    for phase, probe in probe_settling(learner_of(net, 30, schedule="synchronous"), batch).items():
        assert contraction(probe) == pytest.approx(radius, rel=0.1), phase


def test_the_steps_leave_no_more_than_wanted():
    """The distance of the state after so many sweeps from the rest point of the linear solve, as a part of it."""
    for weight in (0.3, 0.6, 0.8):
        net, batch = pair(weight)
        steps = steps_to_rest(probe_settling(learner_of(net), batch)["free"])
        rest = 1 / (1 - weight**2)  # of s1, for an image of 1: s1 = x + w s2, s2 = w s1
        for count, enough in ((steps, True), (steps - 2, False)):
            if count >= 1:
                s1, s2 = (float(s[0, 0]) for s in net.settle(batch.images, steps=count, schedule="sweeps").layers)
                left = max(abs(s1 - rest) / rest, abs(s2 - weight * rest) / (weight * rest))
                assert (left <= WANTED) == enough, (weight, count, left)


def nonlinearity(learner, batch):
    return probe_settling(learner, batch)["nudged"].nonlinearity


@pytest.mark.parametrize(("low", "high"), [(-1e300, 1e300), (0.0, 0.1)])
def test_the_response_of_a_linear_network_is_proportional_and_a_clipped_one_is_not(low, high):
    """Two units at 0.05 with targets 1 and 0: each nudged state is ``clip((d + beta y) / (1 + beta))``."""
    net = ep.Network([ep.Linear((2,), 2)], 2, activation=Clip("c", 1.0, low, high), loss="squared_error",
                     device="cpu", precision="float64")  # fmt: skip
    for array in net.parameters().values():
        array[...] = 0.0
    net.parameters()["layers.1.bias"][...] = 0.05
    batch = ep.Batch(np.ones((2, 2)), np.array([0, 1]))

    def response(beta):
        states = [[(0.05 + b * y) / (1 + b) for y in (1, 0)] for b in (beta, -beta)]  # s = d - b (s - y)
        return np.subtract(*np.clip(states, low, high))

    def learner(scheme="centered"):
        return ep.EquilibriumPropagation(net, 0.5, 4, 60, schedule="sweeps", scheme=scheme)

    whole, half = response(0.5), response(0.25)
    expected = np.linalg.norm(whole - (whole @ half) / (half @ half) * half) / np.linalg.norm(whole)
    assert (expected > 0.1) == (high == 0.1)
    assert nonlinearity(learner(), batch) == pytest.approx([expected], abs=1e-6)
    for scheme in ("random", "tangent"):
        assert nonlinearity(learner(scheme), batch) is None


# --- decisions ----------------------------------------------------------------------------------------------------


def follow(net, batch, on_unsettled="warn", auto=("free", "nudged"), **more):
    learner = learner_of(net, **more)
    pace = Pace(learner, batch, auto, on_unsettled)
    findings = pace.follow(probe_settling(learner, batch), Communicator())
    return pace, findings


def test_steps_follow_the_contraction_and_feedback_stays_where_it_is_fine():
    for weight, steps in ((0.1, 1), (0.3, 2), (0.8, 8)):
        net, batch = pair(weight)
        pace, findings = follow(net, batch)
        assert pace.now() == {"free_steps": 2, "nudged_steps": 2, "feedback": 1.0}, "not before the next epoch"
        pace.begin()
        assert pace.learner.free_steps == pytest.approx(steps, abs=2)
        assert (net.feedback, findings, pace.ends) == (1.0, [], False)
    pace, *_ = follow(*pair(0.6), auto=("free",))
    assert pace.next["nudged_steps"] == 2
    assert pace.next["free_steps"] > 2


@pytest.mark.parametrize(("weight", "contracts"), [(0.6, True), (1.1, False)])
def test_the_first_steps_are_those_of_the_network_before_it_is_trained(weight, contracts):
    """A phase that does not contract keeps its own."""
    net, batch = pair(weight)
    learner = learner_of(net)
    pace, probes = Pace(learner, batch, ("free",)), probe_settling(learner, batch, Communicator())
    needed = steps_to_rest(probes["free"])
    assert (needed is not None) == contracts
    found = pace.start(probes)
    assert [finding.signature for finding in found] == ([] if contracts else ["contraction"])
    assert all("does not contract" in finding.message for finding in found)
    assert pace.now() == {"free_steps": 2, "nudged_steps": 2, "feedback": 1.0}
    pace.begin()
    assert pace.now() == {"free_steps": needed or 2, "nudged_steps": 2, "feedback": 1.0}
    assert needed is None or needed > 2


def test_a_slow_phase_gets_the_most_and_is_told_of():
    pace, findings = follow(*pair(0.97))
    assert (pace.next["free_steps"], pace.next["nudged_steps"]) == (8, 8)
    (finding,) = findings
    assert finding.signature == "contraction"
    assert "more than the 8 that it is given: a sweep multiplies what is left to go by 0.941" in finding.message
    pace, findings = follow(*pair(0.97), steps=60, schedule="evenodd", relaxation=1.0)
    assert 20 < pace.next["free_steps"] <= 200
    assert findings == []


@pytest.mark.parametrize("on_unsettled", ["warn", "lower", "stop"])
def test_what_does_not_contract_is_told_lowered_or_ended(on_unsettled):
    """Weight 3: a sweep multiplies by 9 lambda: by 1.1 at 0.125, by 0.56 at 0.0625, the first to be enough."""
    net, batch = pair(3.0)
    pace, findings = follow(net, batch, on_unsettled)
    (finding,) = findings
    assert "does not contract: a sweep multiplies what is left to go by 9" in finding.message
    assert net.feedback == 1.0, "this epoch has been judged with it"
    assert pace.ends == (on_unsettled == "stop")
    pace.begin()
    if on_unsettled == "lower":
        assert net.feedback == 0.0625
        assert f"the feedback goes from 1 to {net.feedback:g}" in finding.message
        assert net.energy.feedback == net.feedback
        assert net.energy.weights == [1 / net.feedback, 1.0]
        assert pace.learner.free_steps <= 8
    else:
        assert (net.feedback, pace.learner.free_steps) == (1.0, 2)
        remedies = {
            "warn": "; lower --feedback or --gain (or use --on-unsettled lower)",
            "stop": "; the run ends here (--on-unsettled stop); lower --feedback or --gain",
        }
        assert finding.message.endswith(remedies[on_unsettled])


def test_several_ranks_lower_as_one_process_does():
    """Of the two images each rank has one, a third rank none; all look again after each halving."""

    def decide(ranks):
        net, batch = pair(3.0)
        first, last = (2 * n // ranks.size for n in (ranks.rank, ranks.rank + 1))
        own = replace(batch.part(slice(first, max(last, first + 1))), share=(last - first, 2))
        learner = learner_of(net, scheme="centered")
        pace = Pace(learner, own, ("free", "nudged"), "lower")
        return pace.follow(probe_settling(learner, own, ranks), ranks), pace.next

    findings, then = decide(Communicator())
    assert then["feedback"] == 0.0625
    for found, other in in_ranks(3, decide):
        assert (found, other) == (findings, then)


def test_lowering_ends_and_says_so():
    net, batch = pair(100.0)  # 10^4 lambda, beyond five halvings
    pace, (finding,) = follow(net, batch, "lower")
    assert pace.next["feedback"] == 0.5**5
    assert "which is not enough: the free phase does not contract" in finding.message


def test_a_feedback_that_cannot_be_lowered_stays_and_the_remedy_is_told(monkeypatch):
    """Weights of layers would be too large for the numbers."""
    net, batch = pair(3.0)

    def refuse(feedback):
        if feedback < 1:
            raise ConfigurationError("too large")

    monkeypatch.setattr(net, "checked_feedback", refuse)
    pace, (finding,) = follow(net, batch, "lower")
    assert pace.next["feedback"] == net.feedback == 1.0
    assert finding.message.endswith("; lower --feedback or --gain")


# --- whole runs ---------------------------------------------------------------------------------------------------

WILD = {
    **AUTO,
    "arch": "mlp:8,8,8",
    "width": 1.0,
    "activation": "relu",
    "feedback": 1.0,
    "gain": 1.5,
    "on_unsettled": "lower",
}


def test_a_healthy_run_keeps_one_or_two_sweeps(quadrants, tmp_path):
    trainer = run({**AUTO, "epochs": 3, "width": 0.06}, tmp_path / "run")
    trainer.run()
    for record in trainer.records:
        assert record["free_steps"] in (1, 2)
        assert record["nudged_steps"] in (1, 2, 3)
        assert 0 < record["free_contraction"] < 0.5
        assert record["feedback"] == 0.01
        assert max(record["nonlinearity"]) < 0.2
    assert not [f for record in trainer.records for f in record["findings"] if f["signature"] == "contraction"]
    assert 'free_steps = "auto"' in (tmp_path / "run" / "config.toml").read_text()
    assert trainer.directory.settling()["free"]["contraction"] == trainer.records[-1]["free_contraction"]


def test_the_first_epoch_settles_by_what_was_seen_before_it(quadrants, tmp_path):
    options = {**AUTO, "schedule": "evenodd", "feedback": 1.0, "epochs": 1}
    trainer = run(options, tmp_path / "run")
    probes = probe_settling(trainer.learner, trainer.checkup.batch, Communicator())
    trainer.run()
    needed = {f"{phase}_steps": steps_to_rest(probe) for phase, probe in probes.items()}
    assert needed == {name: trainer.records[0][name] for name in needed}
    assert needed["free_steps"] < 60, "what a run without auto takes"


def test_a_run_without_auto_records_and_keeps_its_steps(quadrants, tmp_path):
    trainer = run({"epochs": 2}, tmp_path / "run")
    trainer.run()
    assert [(r["free_steps"], r["nudged_steps"], r["feedback"]) for r in trainer.records] == [(6, 4, 0.01)] * 2
    assert trainer.directory.load().settling == {}


def test_lowered_feedback_is_resumed_bit_for_bit_and_judged_as_recorded(quadrants, tmp_path):
    """Stopped within an epoch and between two; best.h5 and checkpoint.h5 settle as the epoch that they end did."""
    straight = run({**WILD, "epochs": 3}, tmp_path / "straight")
    straight.run()
    feedbacks = [record["feedback"] for record in straight.records]
    assert feedbacks[0] == 1.0
    assert feedbacks[1] < 1.0, "lowered after the first epoch"
    stopped = run({**WILD, "epochs": 3}, tmp_path / "stopped")
    for place, after in (("on_batch", 1), ("on_epoch", 1), ("on_batch", 2), ("on_epoch", 1)):  # 3 batches an epoch
        left = [after]

        def stop(_, left=left):
            left[0] -= 1
            return left[0] == 0

        setattr(stopped, place, stop)
        stopped.run()
        stopped = runs.resume_run(tmp_path / "stopped", {}, SILENT)
    stopped.run()
    assert numbers(stopped.directory) == numbers(straight.directory)
    one, two = straight.directory.load(), stopped.directory.load()
    assert_same_state(one, two)
    assert one.settling == two.settling
    for which in ("best", "last"):
        saved = straight.directory.load(which)
        record = straight.records[saved.epoch - 1]
        trained = load_trained(tmp_path / "straight", which)
        assert trained.network.feedback == record["feedback"] == saved.settling["feedback"]
        assert trained.learner.free_steps == record["free_steps"]
        line = runs.evaluate_run(tmp_path / "straight", which, {}, SILENT)[1]
        assert line.startswith(f"test accuracy {record['test_accuracy']:.2%}, loss {record['test_loss']:.4f}")
    assert load_trained(tmp_path / "straight", "last", {"free_steps": 3}).learner.free_steps == 3


def test_a_run_that_does_not_settle_ends_cleanly(quadrants, tmp_path):
    display = Recorder()
    trainer = runs.start_run(
        make_config(TINY, {**WILD, "on_unsettled": "stop", "epochs": 5}), tmp_path / "run", display
    )
    summary = trainer.run()
    assert summary.epoch == 1
    assert any(text.startswith("epoch 1: the ") and "the run ends here" in text for text in display.texts("warning"))
    going_on = runs.resume_run(tmp_path / "run", {"on_unsettled": "lower"}, SILENT)
    going_on.run()
    assert (going_on.epochs_done, going_on.network.feedback < 1) == (5, True)


def test_another_feedback_and_damaged_settling_are_refused(quadrants, tmp_path):
    trainer = run({**WILD, "epochs": 2}, tmp_path / "run")
    trainer.run()
    with pytest.raises(ConfigurationError, match="--feedback 0.7 is not the run's 1.0"):
        runs.resume_run(tmp_path / "run", {"feedback": 0.7, "epochs": 3}, SILENT)
    config = RunDirectory.open(tmp_path / "run")
    config.config.feedback = 0.5
    config.write_config()
    with pytest.raises(CheckpointError, match="feedback"):
        runs.resume_run(tmp_path / "run", {"epochs": 3}, SILENT)


def test_options(invoke, tmp_path):
    for options, words in {
        ("--free-steps", "often"): "'often' is not a valid integer",
        ("--free-steps", "auto", "--tolerance", "0.1"): "--tolerance ends every phase by itself",
        ("--on-unsettled", "stop"): "--on-unsettled needs --free-steps auto or --nudged-steps auto",
        ("--nudged-steps", "auto", "--algorithm", "bptt"): "--nudged-steps auto needs --algorithm ep",
    }.items():
        code, _, err = invoke("train", *options, "--run-dir", tmp_path / "run")
        assert (code, words in err) == (2, True), err
    with pytest.raises(ConfigurationError, match=r"--free-steps must be an integer or auto \(got 'often'\)"):
        make_config({"free_steps": "often"})
    with pytest.raises(ConfigurationError, match="--free-steps must be at least 1"):
        make_config({"free_steps": 0})


def test_fit_keeps_the_feedback_of_its_best_epoch(quadrants):
    net = ep.build(
        "mlp:8,8,8", classes=2, input_shape=(16, 16, 3), activation="relu", feedback=1.0, gain=1.5, device="cpu"
    )
    how = {"on_unsettled": "lower", "batch_size": 16, "quiet": True, **AUTO}
    result = ep.fit(net, quadrants, epochs=2, **how)
    feedbacks = [record["feedback"] for record in result.history]
    assert feedbacks[1] < feedbacks[0] == 1.0
    assert result.network.feedback == feedbacks[1]
    assert result.best.feedback == feedbacks[result.summary.best_epoch - 1]
    assert json.dumps(result.history)


@pytest.mark.parametrize(("place", "after"), [("on_epoch", 2), ("on_batch", 5), ("on_epoch", 1)])
def test_fit_goes_on_with_a_network_whose_feedback_was_lowered(place, after, quadrants, tmp_path):
    """The straight run, number by number: with the network as it was left, its best one, and one made anew."""

    def make(feedback=1.0):
        return ep.build("mlp:8,8,8", 2, (16, 16, 3), activation="relu", feedback=feedback, gain=1.5, device="cpu")

    how = {"on_unsettled": "lower", "batch_size": 16, "quiet": True, "epochs": 4, **AUTO}
    straight = ep.fit(make(), quadrants, run_dir=tmp_path / "straight", **how)
    assert [record["feedback"] < 1 for record in straight.history] == [False, True, True, True]
    for name in ("network", "best", "new"):
        left = [after]

        def stop(_, left=left):
            left[0] -= 1
            return left[0] == 0

        path = tmp_path / name
        stopped = ep.fit(make(), quadrants, run_dir=path, **how, **{place: stop})
        net = {"network": stopped.network, "best": stopped.best, "new": make()}[name]
        longer = ep.fit(net, quadrants, run_dir=path, resume=True, **how)
        one, two = (RunDirectory(tmp_path / run, None) for run in ("straight", name))
        assert numbers(one) == numbers(two)
        assert longer.network.feedback == straight.network.feedback
    for wrong in (0.7, 0.3):
        with pytest.raises(CheckpointError, match="belongs to another network: feedback: saved 1.0, this network"):
            ep.fit(make(wrong), quadrants, run_dir=path, resume=True, **how | {"epochs": 5})
