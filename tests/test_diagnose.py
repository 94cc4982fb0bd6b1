"""A close look at a batch. Oracles: the step and the gradient check themselves; settings known to fail."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from quadrants import SILENT, quadrant_data
from small import batch_of, network

import cupyep as ep
from cupyep.commands.diagnose import diagnose, examine
from cupyep.commands.release import release_run
from cupyep.learning.check import compare_forms
from cupyep.training import build, runs
from cupyep.training.config import make_config
from cupyep.training.display import Display

SMALL = {"arch": "vgg5", "width": 0.06, "batch_size": 16, "device": "cpu", "epochs": 1}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Train a small network on the quadrants; return its folder."""
    dataset = quadrant_data(train=48)
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)

    def train(name="run", **options):
        options = {"data_dir": str(tmp_path / "data"), **options}
        trainer = runs.start_run(make_config(SMALL, options), tmp_path / name, Display(quiet=True, write=str))
        trainer.run()
        capsys.readouterr()  # its warnings
        return tmp_path / name

    return train


@pytest.mark.parametrize("schedule", ["synchronous", "sweeps"])
def test_rows_are_those_of_the_step_and_of_the_gradient_check(device, schedule):
    net = network("conv", device, feedback=0.5)
    batch = batch_of(net)
    learner = ep.EquilibriumPropagation(net, 0.05, 30, 10, schedule=schedule, relaxation=1.0)
    report = examine(learner, batch, bptt=True)
    result = learner.step(batch)
    assert [row["name"] for row in report.rows] == ["1", "2", "3", "readout"]
    host = {
        name: device.to_numpy(getattr(result, name)) for name in ("nudge_response", "activity", "saturated", "dead")
    }
    for n, row in enumerate(report.rows[:3]):
        for name, values in host.items():
            assert row[name] == pytest.approx(float(values[n]), rel=1e-12)
        assert row["scaled_response"] == pytest.approx(host["nudge_response"][n] * 0.5 ** (n - 2), rel=1e-12)
        last, units = report.rows[2], [np.prod(shape) for shape in net.state_shapes]
        share = row["scaled_response"] / last["scaled_response"] * np.sqrt(units[n] / units[2])
        assert row["response_share"] == pytest.approx(share, rel=1e-12)
        assert row["gradient_share"] == pytest.approx(row["gradient_norm"] / last["gradient_norm"], rel=1e-12)
        parts = [device.to_numpy(result.gradients[f"layers.{n + 1}.{part}"]) for part in ("weight", "bias")]
        assert row["gradient_norm"] == pytest.approx(np.sqrt(sum((p**2).sum() for p in parts)), rel=1e-12)
    settings = {"beta": 0.05, "free_steps": 30, "nudged_steps": 10, "schedule": schedule}
    expected = compare_forms(net, batch, forms=("deviation",), **settings)["deviation"]
    assert [row["cosine"] for row in report.rows] == pytest.approx([row["cosine"] for row in expected], rel=1e-9)
    assert "nudge_response" not in report.rows[3]


def test_the_table_has_a_line_a_layer_and_only_columns_with_content():
    net = network("conv")
    learner = ep.EquilibriumPropagation(net, 0.05, 30, 10, schedule="synchronous")
    lines = examine(learner, batch_of(net), "what").lines()
    assert lines[0] == "what"
    assert "free phase" in lines[1]
    assert lines[2].split()[:3] == ["layer", "residual", "to"]
    assert [line.split()[0] for line in lines[3:7]] == ["1", "2", "3", "readout"]
    assert not any(word in lines[2] for word in ("cosine", "swings"))
    assert all(len(line) <= 130 for line in lines[1:7])
    plain = examine(ep.Backpropagation(net), batch_of(net)).lines()
    assert "residual" not in " ".join(plain[:3])


def test_an_oscillating_network_is_seen_and_said():
    net = ep.Network([ep.Linear((1,), 1), ep.Linear((1,), 1)], 2, device="cpu", precision="float64", feedback=1.0)
    for path, value in {"layers.1.weight": 1.0, "layers.2.weight": -5.0, "layers.2.bias": 1.0}.items():
        net.parameters()[path][...] = value
    batch = ep.Batch(np.ones((20, 1)), np.arange(20) % 2)
    report = examine(ep.EquilibriumPropagation(net, 0.5, 11, 4, schedule="synchronous"), batch)
    assert [row["free_oscillating"] for row in report.rows[:2]] == [True, True]
    assert "swings" in report.lines()[2]
    assert any("it swings between two states: use --schedule evenodd or sweeps" in line for line in report.lines())


def test_a_run_and_its_checkpoint_alone_say_the_same(run, tmp_path):
    path = run(aug="le")
    alone = shutil.copy(path / "checkpoint.h5", tmp_path / "alone.h5")
    first, second = diagnose(path), diagnose(alone)
    assert first.rows == second.rows
    assert first.lines()[1:] == second.lines()[1:]
    assert first.lines()[-1].startswith("healthy: ")
    assert first.title.endswith("epoch 1: vgg5, 16 training images of cifar10")


def test_options_that_differ_from_the_run(run):
    path = run()
    report = diagnose(path, "best", {"batch_size": 8, "schedule": "synchronous", "free_steps": 3, "nudged_steps": 5})
    assert (report.trace["images"], report.trace["schedule"], report.trace["free"]["steps"]) == (8, "synchronous", 3)
    assert report.findings[0].signature == "convergence"


def test_another_schedule_comes_with_its_own_relaxation(run):
    """Over-relaxed even/odd updates of the run would be refused for synchronous ones."""
    path = run("relaxed", feedback=1.0, schedule="evenodd", free_steps=4, nudged_steps=3)

    def trace(**given):
        return diagnose(path, "best", given).trace

    assert trace() == trace(relaxation=1.6) != trace(relaxation=1.0)
    assert trace(schedule="evenodd", relaxation=1.2) == trace(relaxation=1.2) != trace()
    assert trace(schedule="synchronous") == trace(schedule="synchronous", relaxation=1.0)


def test_the_signals_of_a_run_belong_to_its_nudge(run):
    """Local error reaches the first layer of a network whose own nudge is far away."""
    path = run(aug="le", kappa=2.0, kappa_annealing="constant", learning_rate=1e-5)
    plain = run("plain", learning_rate=1e-5)
    with_signal, without = (diagnose(p).rows[0]["scaled_response"] for p in (path, plain))
    assert with_signal > 5 * without


def test_a_released_run_is_shown_without_its_learned_maps(run, tmp_path):
    path = run(aug="kd", teacher_epochs=1)
    release_run(path, tmp_path / "given", display=SILENT)
    report = diagnose(tmp_path / "given", "best")
    lacks = f"'{tmp_path / 'given' / 'best.h5'}' lacks their learned maps"
    assert report.notes == [f"without the intermediate signals of the run: {lacks}"]


def test_a_missing_teacher_is_said_and_the_rest_shown(run):
    path = run(aug="kd", teacher_epochs=1)
    assert diagnose(path).notes == []
    (path / "teacher.h5").unlink()
    assert diagnose(path).notes == []  # there is the cache
    (teacher,) = (path.parent / "cache" / "teachers").glob("*.h5")
    teacher.unlink()
    report = diagnose(path)
    assert report.notes == [f"without the distillation of the run: its teacher file {teacher} is not there"]
    assert f"note: {report.notes[0]}" in report.lines()


def test_the_command_draws_and_writes_and_exits_0_for_an_unhealthy_network(run, invoke):
    pytest.importorskip("matplotlib")
    path = run(gain=5.0, feedback=0.1, beta=0.5)
    target = path / "diagnosis.json"
    code, out, err = invoke("diagnose", path, "--bptt", "--json", target, "--plot", path / "d.svg")
    assert (code, err) == (0, "")
    assert "warning: units do not respond: in layer" in out
    assert "note: BPTT's gradient does not converge, the free state is no stable equilibrium" in out
    assert out.splitlines()[-2:] == [f"written to {target}", f"drawn in {path / 'd.svg'}"]
    content = json.loads(target.read_text())
    assert {finding["signature"] for finding in content["findings"]} >= {"collapse"}
    assert len(content["layers"]) == 5
    assert len(content["settling"]["free"]["residual"]) == 2 + 9
    assert (path / "d.svg").read_text().startswith("<?xml")
    assert "units do not respond" in (path / "d.svg").read_text()


def test_the_picture_shows_the_limits_and_what_is_beyond_them():
    pytest.importorskip("matplotlib")
    from cupyep.commands.plots.diagnosis import diagnosis

    row = {"nudge_response": 0.1, "gradient_share": 1.0, "saturated": 0.5, "dead": 0.2, "free_unsettled": 0.0}
    shares, unsettled = (1e-5, 0.0, 1.0), (0.9, 0.26, 0.25)
    rows = [
        {**row, "name": str(n + 1), "response_share": shares[n], "nudged_unsettled": unsettled[n]} for n in range(3)
    ]
    phases = {phase: {"steps": 2, "residual": [[0.1] * 3] * 11} for phase in ("free", "nudged")}
    trace = {"epoch": 1, "images": 8, "schedule": "sweeps", "tolerance": None, **phases}
    figure = diagnosis([*rows, {"name": "readout"}], trace, "title", ["warning: what"])
    free, nudged, reach, units = figure.subfigs[0].axes[:4]
    assert free.get_title() == "free phase: states"
    assert nudged.get_title() == "nudged phase: layers 1-2 unsettled"
    response, zeros, gradient, limit = (line.get_ydata() for line in reach.get_lines())
    assert list(zeros) == [reach.get_ylim()[0]], "what is 0 lies at the lower end"
    np.testing.assert_array_equal(response, [1e-5, np.nan, 1.0])
    assert (list(gradient), set(limit)) == ([1.0] * 3, {1e-3})
    assert [bar.get_height() for bar in units.patches] == pytest.approx([50.0] * 3 + [20.0] * 3)
    assert set(units.get_lines()[0].get_ydata()) == {75.0}
    assert [text.get_text() for axis in (reach, units) for text in axis.texts] == ["vanishing below", "collapse above"]
    figure.canvas.draw()
    assert reach.get_position().height > 0.3, "the panels fill the figure"


def test_the_picture_lies_in_the_run_unless_there_is_none(run, invoke, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = run()
    assert f"drawn in {path / 'plots' / 'diagnosis.png'}" in invoke("diagnose", path)[1]
    assert "drawn" not in invoke("diagnose", path / "best.h5")[1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = invoke("diagnose", path)
    assert code == 0
    assert "not drawn: figures need matplotlib" in out
    code, out, err = invoke("diagnose", path, "--plot", tmp_path / "x.png")
    assert (code, out) == (2, "")
    assert 'pip install "cupyep[plot]"' in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none"], 1, "'none' is not a run directory"),
        (["config.toml"], 1, "config.toml"),
        (["none", "--plot", "no/d.png"], 2, "--plot: there is no folder 'no'"),
        (["none", "--json", "no/d.json"], 2, "--json: there is no folder 'no'"),
        (["none", "--plot", "d.gif"], 2, "--plot must end in .png or .svg (got 'd.gif')"),
        (["none", "--checkpoint", "bst"], 2, "did you mean 'best'?"),
        (["best.h5", "--checkpoint", "previous"], 2, "--checkpoint is for a run: 'best.h5' is one checkpoint"),
        (["none", "--epochs", "3"], 2, "no such option '--epochs'"),
    ],
)
def test_wrong_use_is_one_line(arguments, code, words, invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("epochs = 1\n")
    (tmp_path / "best.h5").write_bytes(b"")
    found, out, err = invoke("diagnose", *arguments)
    assert (found, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("bp", ["healthy: no layer has collapsed"]),
        ("bptt", ["healthy: the free phase has ", "left to go in the mean", "no layer has collapsed"]),
        (
            "ep",
            ["more than 50% in ", "more than 75% in ", "of the samples (limit 25%)", "the nudge reaches every layer"],
        ),
    ],
)
def test_a_verdict_says_what_was_measured_only(run, algorithm, said):
    """Backpropagation has no phases and no nudge; without a tolerance nothing has "settled"."""
    report = diagnose(run(algorithm=algorithm))
    verdict = report.lines()[-1]
    assert all(words in verdict for words in said), verdict
    assert "settles" not in verdict
    assert ("phase" in verdict) == (algorithm != "bp")
    assert ("nudge" in verdict) == (algorithm == "ep")


def test_a_verdict_names_the_tolerance_that_judged(run):
    verdict = diagnose(run(), given={"tolerance": 100.0}).lines()[-1]
    assert verdict.startswith("healthy: the free phase is above --tolerance 100 in 0% of the samples (limit 25%), the")
