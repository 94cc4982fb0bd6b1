"""Experiments: what is measured is kept, what is missing is measured, what the report says is what was measured."""

import dataclasses
import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import cupyep as ep
from cupyep.cli import main
from cupyep.errors import CheckpointError, ConfigurationError, DivergenceError, Interrupted, OutOfTime
from cupyep.experiments import EXPERIMENTS, cells, find, findings, load_results, reproduce, runner, write_report
from cupyep.experiments.cells import operations_cell, train_cell
from cupyep.experiments.design import Column, Experiment, Results, Row, Scale, cell_name, seen
from cupyep.experiments.loading import load_experiments
from cupyep.experiments.processes import side_by_side
from cupyep.experiments.report import open_text, report_text, table
from cupyep.learning.operations import OperationCounter
from cupyep.training.config import make_config
from cupyep.training.trainer import Trainer

pytest.importorskip("matplotlib")

REPORTS = Path(__file__).parents[1] / "docs" / "results"

ROWS = (Row("one", "first row", {"width": 0.5}, {"loss": 1.25}, "a paper"), Row("two", "second row"))


def study(measure, rows=ROWS, base=None, **more):
    rows = [dataclasses.replace(row, options={**(base or {}), **row.options}) for row in rows]
    fields = {
        "name": "study",
        "title": "a study",
        "claim": "It is so.",
        "scales": {"small": Scale("little", rows, 2), "full": Scale("much", rows, 1)},
        "measure": measure,
        "columns": (Column("loss", lambda cell: cell.get("loss"), ".2f"),),
        "figures": {},
        "verdict": lambda results: f"mean {results.mean('one', lambda cell: cell.get('loss')):.2f}",
    }
    return Experiment(**{**fields, **more})


class Measure:
    """Returns the next of some losses, or raises what stands in its place; remembers its cells."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.cells = []

    def __call__(self, cell):
        self.cells.append((cell.row.key, cell.seed, cell.options))
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return {"loss": outcome, "minutes": 3.0}


def silent(text):
    pass


AT_SCALES = [(experiment, scale) for experiment in EXPERIMENTS.values() for scale in experiment.scales]
at_every_scale = pytest.mark.parametrize(("experiment", "scale"), AT_SCALES, ids=lambda x: getattr(x, "name", x))


@at_every_scale
def test_every_row_is_a_valid_run(experiment, scale):
    plan = experiment.at(scale)
    assert len({row.key for row in plan.rows}) == len(plan.rows)
    for row in plan.rows:
        assert set(row.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_")
        assert not row.published or row.source
        config = make_config(row.options)
        ep.build(
            config.arch, input_shape=(32, 32, 3), width=0.01, activation=config.activation, device="cpu", feedback=1.0
        )
    assert plan.seeds >= 1
    assert plan.setting


@at_every_scale
def test_every_column_figure_and_verdict_knows_its_rows(experiment, scale):
    """A template that names a row or column that is not there would fail after hours of measuring."""
    course = {"train_loss": [2.0], "test_accuracy": [0.4], "nudge_response": [[1e-3, 1e-2]], "minutes": 1.0}
    course["free_residual"] = 0.1
    probes = [{"operations": 1e12, "bptt": [0.9, None], "bp": [0.8]}]
    memory = {name: {kind: [1e6] * 3 for kind in ("ep", "bptt", "bp")} for name in ("planned", "measured")}
    forms = {form: {"cosine": [0.5, 0.9]} for form in ("classical", "deviation")}
    cell = {**course, "probes": probes, "elapsed_minutes": [3.0], **memory, **forms}
    plan = experiment.at(scale)
    results = Results(plan.rows, {cell_name(row.key, 0): cell for row in plan.rows}, 1)
    assert experiment.verdict(results)
    assert "{" not in f"{experiment.verdict(results)} {plan.setting}"
    for column in experiment.columns:
        assert all(len(results.values(row.key, column.value)) == 1 for row in plan.rows)
    for draw in experiment.figures.values():
        inspect.signature(draw).bind(results)


@pytest.mark.parametrize("report", sorted(REPORTS.glob("*/REPORT.md")), ids=lambda path: path.parent.name)
def test_a_committed_report_is_what_its_results_say(report):
    experiment = find(report.parent.name.rpartition("-")[0])
    results, about = load_results(experiment, report.parent)
    assert report_text(experiment, results, about).encode() == report.read_bytes()


STUDY = """
title = "a study"
claim = "It is so."
order = 2
measure = "training"
columns = ["loss"]
verdict = "{lowest[o.*].label} {rows[one].loss:.1f}"
[figures]
courses = {}
curve = {kind = "against", option = "beta", label = "beta", lines = {all = ".*"}, columns = ["loss"]}
[options]
arch = "vgg7"
epochs = 3
gain = 0.9
[rows]
one = {label = "first", beta = 0.1}
two = {label = "second", use = "weak", beta = 0.2, free_steps = 7}
[medium]
seeds = 4
setting = "All of it, {epochs} epochs, gain {gain}, {text}"
use = "paper-small"
gain = 0.7
only = ["two", "one"]
[medium.rows]
one = {beta = 0.15, published = {"training loss" = 1.5}, source = "a paper"}
[full]
seeds = 1
setting = "much"
rows.three = {label = "third", use = "vgg5-plain-mse", epochs = 1}
"""


def test_an_experiment_is_a_file(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "zeroth.toml").write_text(STUDY.replace("order = 2", "order = 1"))
    (tmp_path / "again.toml").write_text(STUDY.replace("order = 2", ""))
    found = load_experiments(tmp_path)
    assert list(found) == ["zeroth", "study", "again"]
    study = found["study"]
    assert list(study.scales) == ["medium", "full"]
    medium = study.at("medium")
    assert (medium.seeds, [row.key for row in medium.rows]) == (4, ["two", "one"])
    assert medium.setting.startswith("All of it, 3 epochs, gain 0.7, of 16 to 64 channels")
    two, one = medium.rows
    assert (one.published, one.source, two.published) == ({"training loss": 1.5}, "a paper", {})
    # Last counts: used by the scale, shared by all rows, the scale's own, used by the row, the row's own.
    names = ("arch", "epochs", "gain", "beta", "free_steps", "limit_train", "learning_rate")
    assert [one.options[name] for name in names] == ["vgg7", 3, 0.7, 0.15, 5, 4000, 0.02]
    assert [two.options[name] for name in names] == ["vgg7", 3, 0.7, 0.2, 7, 4000, 1e-3]
    assert study.at("full").rows[0].options == {"arch": "vgg7", "epochs": 3, "gain": 0.9, "beta": 0.1}
    third = study.at("full").rows[2]
    assert (third.options["loss"], third.options["epochs"], third.options["arch"]) == ("squared_error", 1, "vgg5")
    losses = {"one/0": {"train_loss": [9.0, 2.0]}, "two/0": {"train_loss": [1.0]}}
    assert study.verdict(Results(medium.rows, losses, 1)) == "first 2.0"
    with pytest.raises(ep.ConfigurationError, match="experiment 'study' has no scale 'small', only medium and full"):
        study.at("small")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "a study"', "", "its file lacks 'title'"),
        ('label = "first", ', "", "its file lacks 'label'"),
        ('"loss"]\nverdict', '"los"]\nverdict', "unknown column 'los'; did you mean 'loss'"),
        ('"training"', '"trainin"', "unknown measurement 'trainin'; did you mean 'training'"),
        ("[figures]", "[figures]\ncurves = {}", "unknown figure 'curves'; did you mean 'courses'"),
        ("order = 2", "order = 2\nremark = ''", "unknown entry 'remark'; did you mean 'remarks'"),
        ("paper-small", "paper-smal", "no recipe and no file 'paper-smal'"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, old, new, message):
    assert old in STUDY
    (tmp_path / "study.toml").write_text(STUDY.replace(old, new))
    with pytest.raises(ep.ConfigurationError, match="experiment 'study': ") as error:
        load_experiments(tmp_path)
    assert message in str(error.value)


def test_cells_are_measured_once_seed_by_seed(tmp_path):
    measure = Measure(1.0, 5.0, 2.0, 6.0)
    results = reproduce(study(measure, base={"width": 0.25, "arch": "vgg7"}), tmp_path, report=silent)
    assert [cell[:2] for cell in measure.cells] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert measure.cells[0][2] == {"width": 0.5, "arch": "vgg7", "seed": 0}
    assert measure.cells[3][2] == {"width": 0.25, "arch": "vgg7", "seed": 1}
    assert results.complete
    again = Measure()
    kept = reproduce(study(again, base={"width": 0.25, "arch": "vgg7"}), tmp_path, report=silent)
    assert again.cells == []
    np.testing.assert_array_equal(kept.values("one", lambda cell: cell["loss"]), [1.0, 2.0])
    more = Measure(3.0, 7.0)
    reproduce(study(more, base={"width": 0.25, "arch": "vgg7"}), tmp_path, seeds=3, report=silent)
    assert [cell[:2] for cell in more.cells] == [("one", 2), ("two", 2)]
    fewer = reproduce(study(Measure(), base={"width": 0.25, "arch": "vgg7"}), tmp_path, seeds=1, report=silent)
    assert sorted(fewer.cells) == ["one/0", "two/0"]
    whole = reproduce(study(Measure(), base={"width": 0.25, "arch": "vgg7"}), tmp_path, seeds=3, report=silent)
    np.testing.assert_array_equal(whole.values("one", lambda cell: cell["loss"]), [1.0, 2.0, 3.0])


def test_rows_are_measured_in_the_order_in_which_they_are_named(tmp_path):
    measure = Measure(1.0, 5.0, 2.0, 6.0)
    reproduce(study(measure), tmp_path, rows=["two", "one"], report=silent)
    assert [cell[:2] for cell in measure.cells] == [("two", 0), ("one", 0), ("two", 1), ("one", 1)]


def test_a_report_without_its_work_is_gone_on_with(tmp_path):
    """As those in docs/results are: of a folder, REPORT.md and results.json."""
    (tmp_path / "kept").mkdir()
    with pytest.raises(RuntimeError, match="power cut"):
        reproduce(study(Measure(1.0, 5.0, RuntimeError("power cut"))), tmp_path / "report", report=silent)
    (tmp_path / "report" / "results.json").rename(tmp_path / "kept" / "results.json")
    rest = Measure(2.0, 6.0)
    results = reproduce(study(rest), tmp_path / "kept", report=silent)
    assert [cell[:2] for cell in rest.cells] == [("one", 1), ("two", 1)]
    np.testing.assert_array_equal(results.values("two", lambda cell: cell["loss"]), [5.0, 6.0])


def test_a_failed_measurement_keeps_those_before(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        reproduce(study(Measure(1.0, RuntimeError("power cut"))), tmp_path, report=silent)
    rest = Measure(5.0, 2.0, 6.0)
    assert reproduce(study(rest), tmp_path, report=silent).complete
    assert [cell[:2] for cell in rest.cells] == [("two", 0), ("one", 1), ("two", 1)]


def test_time_that_is_up(tmp_path):
    lines = []
    results = reproduce(
        study(Measure(1.0, OutOfTime(), OutOfTime(), OutOfTime())), tmp_path, max_minutes=5, report=lines.append
    )
    assert not results.complete
    assert lines[-1] == "5 minutes are used up: 1 of 4 cells are measured"
    text = report_text(study(Measure()), results, {"scale": "small"})
    assert "Open: 3 of 4 cells are not measured yet (two/0, one/1, two/1)." in text
    assert "| second row | open | - |" in text


def test_rows_by_name_come_first(tmp_path):
    lines, measure = [], Measure(5.0, 6.0)
    results = reproduce(study(measure), tmp_path, rows=["two"], report=lines.append)
    assert [cell[:2] for cell in measure.cells] == [("two", 0), ("two", 1)]
    assert (results.complete, [line for line in lines if "used up" in line]) == (False, [])
    rest = Measure(1.0, 2.0)
    assert reproduce(study(rest), tmp_path, report=silent).complete
    assert [cell[:2] for cell in rest.cells] == [("one", 0), ("one", 1)]
    with pytest.raises(ConfigurationError, match="unknown row .tow.*two"):
        reproduce(study(rest), tmp_path, rows=["one", "tow"], report=silent)


def test_dates_are_those_of_the_cells(tmp_path):
    results = reproduce(study(Measure(1.0, 5.0, 2.0, 6.0)), tmp_path, report=silent)
    today = results.cells["one/0"]["date"]
    assert f"on {today}; " in report_text(study(None), results, {"scale": "small", "date": "1999-12-31"})
    results.cells["one/0"]["date"] = "2001-02-03"
    assert f"from 2001-02-03 to {today}; " in report_text(study(None), results, {"scale": "small"})
    del results.cells["two/0"]["date"]
    assert f"from 1999-12-31 to {today}; " in report_text(
        study(None), results, {"scale": "small", "date": "1999-12-31"}
    )


def test_defaults_are_for_rows_that_do_not_name_them(tmp_path):
    measure, rows = Measure(1.0, 2.0), (Row("named", "a", {"precision": "bfloat16"}), Row("free", "b"))
    experiment = study(measure, rows, base={"arch": "vgg7"})
    reproduce(experiment, tmp_path, seeds=1, defaults={"precision": "float16", "arch": "vgg9"}, report=silent)
    found = {key: (options["precision"], options["arch"]) for key, _, options in measure.cells}
    assert found == {"named": ("bfloat16", "vgg7"), "free": ("float16", "vgg7")}


def test_divergence_is_a_result(tmp_path):
    experiment = study(Measure(1.0, DivergenceError("the loss is not finite in epoch 2"), 2.0, 6.0))
    results = reproduce(experiment, tmp_path, report=silent)
    text = report_text(experiment, results, {"scale": "small"})
    assert "- second row, seed 0: the loss is not finite in epoch 2" in text
    assert "| second row | 6.00 | - |" in text


def test_table_by_hand():
    cells = {"one/0": {"loss": 1.0}, "one/1": {"loss": 2.0}, "two/0": {"failed": "x"}, "two/1": {"failed": "x"}}
    lines = table(study(None), Results(ROWS, cells, 2)).splitlines()
    assert lines == [
        "|  | loss | published |",
        "| --- | ---: | ---: |",
        "| first row | 1.50 ± 0.71 | 1.25 (loss), a paper |",
        "| second row | failed | - |",
    ]


def test_report_is_made_of_results_json(tmp_path):
    experiment = study(Measure(1.0, 5.0, 2.0, 6.0))
    reproduce(experiment, tmp_path, command="cupyep reproduce study", report=silent)
    results, about = load_results(experiment, tmp_path)
    text = write_report(experiment, results, about, tmp_path).read_text(encoding="utf-8")
    assert "**Verdict.** mean 1.50" in text
    assert "Made by `cupyep reproduce study`" in text
    assert "12 minutes" in text  # four cells of three


def test_folders_that_are_not_ours(tmp_path):
    reproduce(study(Measure(1.0, 5.0, 2.0, 6.0)), tmp_path, report=silent)
    with pytest.raises(CheckpointError, match=r"holds experiment 'study' at scale 'small'; give another --output"):
        reproduce(study(Measure()), tmp_path, scale="full", report=silent)
    with pytest.raises(CheckpointError, match="was measured with other options"):
        reproduce(study(Measure(), base={"width": 9.0}), tmp_path, report=silent)
    with pytest.raises(CheckpointError, match="is of experiment 'study', not 'signals'"):
        load_results(find("signals"), tmp_path)
    path = tmp_path / "results.json"
    header = json.dumps({"experiment": "study", "scale": "small", "seeds": 2})[:-1]
    wrong = ("{", "[]", "[" * 100_000, '{"a": "\xff"}', header + "}", header + ', "cells": {"one/0": 1}}')
    for content in wrong:
        path.write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match="is damaged .*; remove it") as error:
            reproduce(study(Measure()), tmp_path, report=silent)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scale": None}, "is damaged (no scale of 'study')"),
        ({"seeds": None}, "is damaged (no seeds); leave out --report-only"),
        ({"cells": None}, "is damaged (no cells, or one without minutes); remove it to measure anew"),
        ({"cells": {"one/0": {"loss": 1.0}}}, "is damaged (no cells, or one without minutes)"),
        ({"seeds": 0}, "nothing has been measured yet; leave out --report-only"),
    ],
)
def test_results_that_lack_something_are_one_line(more, message, tmp_path):
    content = {"experiment": "study", "scale": "small", "seeds": 2, "cells": {}, **more}
    kept = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "results.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_results(study(None), tmp_path)


def test_stopped_before_its_first_cell_a_report_is_open(tmp_path, monkeypatch):
    def stop(cells):
        raise Interrupted

    monkeypatch.setattr(runner, "kept", stop)
    with pytest.raises(Interrupted):
        reproduce(study(None), tmp_path, report=silent)
    assert open_text(load_results(study(None), tmp_path)[0]).startswith("open: 4 of 4 cells are not measured yet")


DIGITS = {
    "dataset": "digits",
    "image_size": 16,
    "arch": "vgg5",
    "width": 0.02,
    "limit_train": 64,
    "limit_test": 20,
    "epochs": 2,
    "batch_size": 32,
}


def test_a_training_that_was_stopped_goes_on(tmp_path, digits_free_stop):
    straight = reproduce(study(train_cell, ROWS[1:], DIGITS), tmp_path / "a", seeds=1, report=silent)
    stopped = reproduce(
        study(digits_free_stop, ROWS[1:], DIGITS), tmp_path / "b", seeds=1, max_minutes=1e9, report=silent
    )
    assert not stopped.complete
    resumed = reproduce(study(train_cell, ROWS[1:], DIGITS), tmp_path / "b", seeds=1, report=silent)
    one, two = (r.cells[cell_name("two", 0)] for r in (straight, resumed))
    for name in ("train_loss", "test_loss", "test_accuracy", "nudge_response", "gradient_norm"):
        assert one[name] == two[name]
    assert len(one["train_loss"]) == 2
    assert len(one["nudge_response"][0]) == 4


@pytest.fixture
def digits_free_stop():
    """A training whose time is up after its first epoch."""

    def measure(cell):
        def deadline():
            raise OutOfTime

        return train_cell(dataclasses.replace(cell, deadline=deadline))

    return measure


def test_probes_are_kept_by_epoch(tmp_path):
    seen = []

    def probe(network, config):
        seen.append(network)
        return {"cosines": [float(len(seen))], "beta": config.beta}

    experiment = study(lambda cell: train_cell(cell, probe, every_epoch=True), ROWS[1:], DIGITS)
    results = reproduce(experiment, tmp_path, seeds=1, report=silent)
    assert results.cells["two/0"]["probes"] == [
        {"epoch": 1, "cosines": [1.0], "beta": 0.05},
        {"epoch": 2, "cosines": [2.0], "beta": 0.05},
    ]


@pytest.mark.parametrize(
    "content", ["", "[", "{}x", "[" * 100_000, "[3]", "{}", "[{}]", '[{"epoch": "1"}]', "7", "[[]]"]
)
def test_damaged_probes_are_one_clear_line(content, tmp_path):
    (tmp_path / "probes.json").write_text(content)
    with pytest.raises(CheckpointError, match="probes.json' is damaged .*; remove it to measure anew") as error:
        cells._probes(tmp_path)
    assert "\n" not in str(error.value)


def probed_cell(cell):
    def probe(network, config):
        return {"sum": float(sum(abs(p).sum() for p in network.parameters().values())), "epochs": config.epochs}

    return train_cell(cell, probe, every_epoch=True)


def cell_in(out, **more):
    return runner.cells_of(study(None, ROWS[1:], DIGITS | more), out, "small", report=silent, quiet=True)[0]


def after_checks(count):
    """Return a deadline that ends a training when it has been asked so often: after a batch, of training or test."""
    left = iter(range(count - 1))

    def deadline():
        if next(left, None) is None:
            raise OutOfTime

    return deadline


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize(("measure", "more"), [(operations_cell, {}), (probed_cell, {"ema": 0.9})])
def test_killed_before_a_probe_of_an_epoch(measure, more, epoch, tmp_path, monkeypatch):
    """The network of the last checkpoint is asked, be the training finished or not."""
    straight, killed = (cell_in(tmp_path / name, **more) for name in ("straight", "killed"))
    keep = cells._keep_probe

    def kill(folder, number, probed):
        if number == epoch:
            raise RuntimeError("power cut")
        keep(folder, number, probed)

    monkeypatch.setattr(cells, "_keep_probe", kill)
    with pytest.raises(RuntimeError, match="power cut"):
        measure(killed)
    monkeypatch.setattr(cells, "_keep_probe", keep)
    assert measure(killed)["probes"] == measure(straight)["probes"]


def test_a_run_that_lacks_probes_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    cell = cell_in(tmp_path)
    with pytest.raises(OutOfTime):  # in the second epoch: the network of the first is gone
        train_cell(dataclasses.replace(cell, deadline=after_checks(4)))
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained"))
    with pytest.raises(CheckpointError, match="holds a run without what is measured after every epoch"):
        probed_cell(cell)


@at_every_scale
def test_rows_of_a_table_see_the_same_images(experiment, scale):
    """The same data, as often and changed in the same way: else a table ranks settings that nobody can compare."""
    rows = {row.key: seen(row.options) for row in experiment.at(scale).rows}
    assert len(set(rows.values())) == 1, rows


def test_what_is_not_given_is_the_default():
    assert seen({"dataset": "mnist"}) == seen({"dataset": "mnist", "crop": make_config({}).crop, "limit_train": None})
    for name, value in {"epochs": 4, "validation": 5, "test_fraction": 0.5, "class_weights": "balanced"}.items():
        assert seen({name: value}) != seen({})
    assert seen({"data_dir": "elsewhere", "device": "cpu", "seed": 3}) == seen({})


def products_by_hand(free, nudged, form, schedule):
    """Return how often edges 1, 2 and 3 multiply (drives, top-down products, gradients), in batches, by definition."""
    phases = 1 if form == "tangent" else 2
    settled = np.array([0, 2, 2]) * (free + phases * nudged)
    first = np.array([1, 0, 0])
    if form != "classical":
        return settled + first + np.array([1, 2, 2])  # one drive of the image; the gradient's two products an edge
    primed = np.array([0, 1, 1]) * (schedule == "sweeps")  # even/odd primes winners only, and edge 3 has none
    winners = np.array([0, 1, 0])  # found anew for the gradient, of the edge with max-pooling
    return settled + 2 * first + 2 * (primed + winners + 1)


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
@pytest.mark.parametrize("form", ["classical", "deviation", "tangent"])
@pytest.mark.parametrize("kind", ["cpu", "graphs"])
def test_operations_of_replayed_graphs_count(request, rng, kind, form, schedule):
    """Step by step the same, whether a product is launched by the host or by a graph."""
    device = request.getfixturevalue("fake_gpu") if kind == "graphs" else "cpu"
    edges = [ep.Conv2d((6, 6, 2), 3), ep.Conv2d((6, 6, 3), 4, pooling="max"), ep.Linear((3, 3, 4), 5)]
    net = ep.Network(edges, classes=4, device=device, feedback=1.0)
    how = {"scheme": "tangent"} if form == "tangent" else {"nudge": form}
    learner = ep.EquilibriumPropagation(net, free_steps=4, nudged_steps=3, schedule=schedule, relaxation=1.0, **how)
    images, labels = rng.uniform(0, 1, (5, 6, 6, 2)), np.arange(5) % 4
    flops = np.array([2 * 36 * 9 * 2 * 3, 2 * 36 * 9 * 3 * 4, 2 * 36 * 5])
    counter, counts = OperationCounter(learner), []
    for _ in range(4):  # launched, captured, replayed
        before = counter.operations
        learner.step(images, labels)
        counts.append(counter.operations - before)
    assert counts == [5 * int(products_by_hand(4, 3, form, schedule) @ flops)] * 4


@pytest.mark.parametrize("kind", ["cpu", "graphs"])
def test_operations_of_other_algorithms(request, rng, kind):
    device = request.getfixturevalue("fake_gpu") if kind == "graphs" else "cpu"
    net = ep.Network([ep.Linear((6,), 4), ep.Linear((4,), 5)], classes=3, device=device, feedback=1.0)
    first, second, samples = 2 * 6 * 4, 2 * 4 * 5, 7
    images, labels = rng.uniform(0, 1, (samples, 6)), np.arange(samples) % 3
    free, unrolled = 3, 4
    bptt = first + free * 2 * second + first + unrolled * 2 * second + unrolled * (first + 4 * second)
    cases = {
        ep.Backpropagation(net): 2 * first + 3 * second,
        ep.BackpropagationThroughTime(net, free, unrolled, schedule="synchronous"): bptt,
    }
    for learner, expected in cases.items():
        counter = OperationCounter(learner)
        for _ in range(4):
            counter.operations = 0
            learner.step(images, labels)
            assert counter.operations == samples * expected


def test_operations_are_those_of_the_edges(tmp_path):
    """By hand: BP of 64 + 20 images, a forward pass of every image, for training a gradient and a top-down product."""
    experiment = study(operations_cell, (Row("bp", "BP", {"algorithm": "bp"}),), {**DIGITS, "epochs": 1})
    cell = reproduce(experiment, tmp_path, seeds=1, report=silent).cells["bp/0"]
    # VGG-5 at width 0.02 on 16 x 16 x 1: channels 3 5 10 10, maps 16 8 4 2 (unpadded), two operations a multiplication.
    edges = [2 * 9 * n * n * c * k for n, c, k in ((16, 1, 3), (8, 3, 5), (4, 5, 10), (2, 10, 10))]
    expected = 64 * (2 * sum(edges) + sum(edges[1:])) + 20 * sum(edges)
    assert cell["probes"] == [{"epoch": 1, "operations": expected}]


def test_operations_of_an_epoch_that_was_stopped_are_counted(tmp_path):
    """After the first of two batches of an epoch."""
    straight, stopped = (cell_in(tmp_path / name) for name in ("straight", "stopped"))
    with pytest.raises(OutOfTime):
        operations_cell(dataclasses.replace(stopped, deadline=after_checks(1)))
    assert operations_cell(stopped)["probes"] == operations_cell(straight)["probes"]


def test_what_another_thread_counts_meanwhile_is_kept(rng):
    net = ep.Network([ep.Linear((6,), 4)], classes=3, device="cpu")
    learner = ep.Backpropagation(net)
    counter = OperationCounter(learner)

    def counted(*_):
        counter.operations += 1
        return 10

    counter._of_batch = lambda count: SimpleNamespace(step=counted, prediction=counted)
    learner.step(rng.uniform(0, 1, (2, 6)), np.array([0, 1]))
    learner.evaluate(rng.uniform(0, 1, (2, 6)), np.array([0, 1]))
    assert counter.operations == 22


def test_cost_to_a_target():
    cell = {
        "test_accuracy": [0.2, 0.36, 0.34, 0.5],
        "elapsed_minutes": [1.0, 2.5, 3.0, 4.0],
        "probes": [{"operations": 1e12}, {"operations": 2.5e12}, {"operations": 1e13}, {"operations": 1e13}],
    }
    assert findings.epochs_to_target(cell) == 2
    assert findings.minutes_to_target(cell) == 2.5
    assert findings.operations_to_target(cell) == pytest.approx(3.5)
    never = {**cell, "test_accuracy": [0.1, 0.2]}
    assert findings.minutes_to_target(never) is findings.operations_to_target(never) is None


def test_memory_is_planned_and_measured(tmp_path):
    """A narrow network on this device, one of full width for a GPU without one."""
    memory = find("memory")
    rows = memory.at("small").rows[:1]
    narrow = dataclasses.replace(memory, scales={"small": Scale("", rows, 1)})
    wide = dataclasses.replace(memory, scales={"full": Scale("", memory.at("full").rows[-1:], 1)})
    options = {"device": "cpu", "batch_size": 16, "nudged_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "STEPS", (1, 2, 8))
        reproduce(narrow, tmp_path / "first", overrides=options, report=silent)  # what is imported and cached once
        results = reproduce(narrow, tmp_path / "small", overrides=options, report=silent)
    cell = results.cells["vgg5/0"]
    for algorithm, planned in cell["planned"].items():
        assert cell["measured"][algorithm] == pytest.approx(planned, rel=0.05)
    few, more, most = cell["planned"]["bptt"]
    assert most - more == 6 * (more - few) > 0
    assert len(set(cell["planned"]["ep"])) == 1
    worst = max(
        abs(a / b - 1)
        for name, planned in cell["planned"].items()
        for a, b in zip(planned, cell["measured"][name], strict=True)
    )
    assert f"differ by at most {100 * worst:.1f} %" in memory.verdict(Results(rows, results.cells, 1))
    full = reproduce(wide, tmp_path / "full", scale="full", overrides={"device": "cpu"}, report=silent)
    deepest = full.cells["vgg12/0"]
    assert deepest["measured"] == {}
    assert deepest["planned"]["ep"][0] < 1431e6
    text = report_text(wide, full, {"scale": "full"})
    assert "1431 (EP, MB), 25954 (BPTT, T = 250, MB)" in text
    figure = memory.figures["peaks"](full)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["VGG-12, BPTT"], np.array(deepest["planned"]["bptt"]) / 1e6)
    np.testing.assert_allclose(lines["VGG-12, EP"], deepest["planned"]["ep"][0] / 1e6)
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "log")


@pytest.mark.slow
def test_side_by_side_as_in_turn(tmp_path):
    """Two processes measure what one does; both read the experiment by its name."""
    tiny = {name: DIGITS[name] for name in ("dataset", "width")} | {"image_size": 32}
    overrides = {**tiny, "free_steps": 5, "nudged_steps": 2, "tolerance": None}
    found = [
        reproduce(find("fidelity"), tmp_path / str(jobs), seeds=1, overrides=overrides, jobs=jobs, report=silent)
        for jobs in (1, 2)
    ]
    assert found[0].complete
    for key, cell in found[0].cells.items():
        other = found[1].cells[key]
        assert {k: v for k, v in cell.items() if k != "minutes"} == {k: v for k, v in other.items() if k != "minutes"}


def test_command_line(tmp_path):
    run = CliRunner().invoke
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("text")
    listed = run(main, ["reproduce", "--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == list(EXPERIMENTS)
    for arguments, code, text in (
        (["signal"], 2, "did you mean 'signals'"),
        ([], 2, "give the NAME"),
        (["signals", "--scale", "smal"], 2, "did you mean 'small'"),
        (["signals", "--scale", "medium"], 2, "experiment 'signals' has no scale 'medium', only small and full"),
        (["signals", "--scale", "medium", "--report-only"], 2, "has no scale 'medium'"),
        (["signals", "--seeds", "0"], 2, "0 is not in the range"),
        (["signals", "--max-minutes", "nan"], 2, "--max-minutes must be a finite number (got nan)"),
        (["signals", "--precision", "float61"], 2, "unknown --precision 'float61'"),
        (["signals", "--report-only", "--output", str(tmp_path / "none")], 1, "holds no report"),
        (["signals", "--output", str(tmp_path / "thesis")], 1, "thesis' holds other files; give another --output"),
    ):
        result = run(main, ["reproduce", *arguments])
        assert result.exit_code == code, result.output
        assert text in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_the_precision_of_a_report_is_in_its_command(tmp_path, monkeypatch):
    """Planned in halves, a network takes less."""
    full = Scale("", find("memory").at("full").rows[:1], 1)
    monkeypatch.setitem(EXPERIMENTS, "memory", dataclasses.replace(find("memory"), scales={"full": full}))
    peaks = []
    for words in ([], ["--precision", "float16"]):
        out = tmp_path / f"report{len(words)}"
        command = ["reproduce", "memory", "--scale", "full", "--device", "cpu", "--output", str(out), *words]
        assert CliRunner().invoke(main, command).exit_code == 0
        assert f"`{' '.join(['cupyep reproduce memory --scale full', *words])}`" in (out / "REPORT.md").read_text()
        peaks.append(load_results(find("memory"), out)[0].cells["vgg5/0"]["planned"]["ep"][0])
    assert peaks[1] < 0.9 * peaks[0]


LABELS = [row.key for row in find("vgg12-kd-cifar100").at("small").rows]


def synthetic(experiment, values):
    """Return results in which a row's last training loss and test accuracy are those of `values`."""
    rows = experiment.at("small").rows
    layers = [[1e-3, 1e-2]]
    cells = {
        cell_name(row.key, 0): {
            "train_loss": [9.0, values.get(row.key, (2.3, 0.1))[0]],
            "test_accuracy": [0.0, values.get(row.key, (2.3, 0.1))[1]],
            "nudge_response": layers,
            "minutes": 1.0,
        }
        for row in rows
    }
    return Results(rows, cells, 1)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("signals", {"le": (1.9, 0.3), "kd": (1.8, 0.35)}, "stays at chance (training loss 2.30"),
        ("signals", {"none": (2.0, 0.3)}, "moves"),
        ("signals", {"none-tuned": (2.1, 0.2)}, "'no signals, tuned: gain 0.65', reaches 2.10 / 20 %"),
        ("baseline", {"ep": (1.0, 0.5)}, "Plain EP converges: 50.0 %"),
        ("baseline", {"ep": (1.0, 0.4)}, "Plain EP does not reach 45 %"),
        ("feedback", {"vgg11-0.1": (1.6, 0.40), "vgg11-bp": (1.6, 0.405)}, "reaches BP's accuracy: lambda 0.1 40.0 %"),
        ("feedback", {"vgg11-0.1": (1.6, 0.38), "vgg11-bp": (1.6, 0.405)}, "does not reach BP's accuracy"),
        ("nudge", {"classical-0.5": (1.7, 0.4), "deviation-0.5": (1.9, 0.3)}, "not always as good as"),
        ("nudge", {}, "at least as good as"),
        ("placement", {"middle": (1.5, 0.3), "late": (2.6, 0.1)}, "layers 4-6 (1.50), highest on layers 7-10 (2.60)"),
        ("kappa", {"cosine-1": (1.5, 0.3)}, "1.50 / 30 % with kappa 1, cosine"),
        ("vgg7-kd-cifar10", {"kd": (1.5, 0.3)}, "KD 30.0 %, LE 10.0 %"),
        ("vgg7-kd-cifar10", {"kd": (1.5, 0.19)}, "Nothing gets far from chance (10 %)"),
        ("vgg12-kd-cifar100", dict.fromkeys(LABELS, (4.6, 0.019)), "Nothing gets far from chance (1 %)"),
    ],
)  # fmt: skip
def test_verdicts_follow_the_figures(name, values, expected):
    experiment = find(name)
    assert expected in experiment.verdict(synthetic(experiment, values))


def test_a_row_that_failed_is_the_last_of_all():
    rows = [Row(key, f"{key}, here") for key in ("failed", "poor", "good")]
    courses = {"poor": ([3.0], [0.1]), "good": ([1.0], [0.5])}
    cells = {f"{key}/0": {"train_loss": loss, "test_accuracy": right} for key, (loss, right) in courses.items()}
    results = Results(rows, {"failed/0": {"failed": "x"}, **cells}, 1)
    template = (
        "{lowest[.*].head} {highest[.*].tail} {highest[.*].label}, {best[.*].head}, {worst[.*].head}, {rows[poor].loss}"
    )
    assert findings.verdict(template, results) == "good here failed, here, good, failed, 3.0"
    assert findings.verdict("{lowest[poo.].accuracy:.1f} {rows[failed].accuracy}", results) == "10.0 0.0"
    with pytest.raises(ep.ConfigurationError, match="unknown word 'coverges'; did you mean 'converges'"):
        findings.verdict("{coverges}", results)
    with pytest.raises(ep.ConfigurationError, match="unknown column 'los'; did you mean 'loss'"):
        findings.verdict("{rows[good].los}", results)


def test_workers_end_with_the_process_that_started_them():
    """Killed, it cannot stop them; they must not train on for hours."""
    worker = "import os, time; from cupyep.experiments.processes import end_with; end_with(os.getppid()); "
    worker += "print(os.getpid(), flush=True); time.sleep(300)"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
        ended, _, _ = select.select([parent.stdout], [], [], 100)  # a zombie holds it no more
        if not ended:
            os.kill(pid, signal.SIGKILL)
    assert ended, "the worker went on"


def test_a_worker_that_is_killed_is_one_line():
    """As by a machine that has no memory left."""
    with pytest.raises(ep.CupyepError, match="a process was killed, .* try fewer --jobs"):
        list(side_by_side(os._exit, [(9,), (9,)], 2))


def test_every_cell_is_in_results_json_as_soon_as_it_is_measured(tmp_path):
    seen = []

    def measure(cell):
        seen.append(sorted(load_results(study(None), tmp_path)[0].cells))
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # not to the end
        return {"loss": 1.0}

    with pytest.raises(Interrupted, match="2 of 4 cells are measured; the same command goes on") as error:
        reproduce(study(measure), tmp_path, report=silent)
    assert error.value.number == signal.SIGTERM
    assert seen == [[], ["one/0"], ["one/0", "two/0"]]
    assert reproduce(study(measure), tmp_path, report=silent).complete
    assert seen[3] == ["one/0", "two/0"], "what an earlier run measured is there from the start"


def test_minutes_end_a_training_after_a_batch(tmp_path, monkeypatch):
    """The minutes are over in the first batch; the wall clock, which may jump, says nothing."""
    batches, now = [], [0.0]
    step = Trainer._step

    def counted(self, epoch, batch):
        step(self, epoch, batch)
        batches.append(epoch)
        now[0] += 600

    def late(end):
        if now[0] > 540 and end < np.inf:
            raise OutOfTime

    straight = reproduce(study(train_cell, ROWS[1:], DIGITS), tmp_path / "a", seeds=1, report=silent)
    monkeypatch.setattr(time, "time", lambda: 1e12 * len(batches))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", counted)
        patch.setattr(runner, "_in_time", late)
        stopped = reproduce(study(train_cell, ROWS[1:], DIGITS), tmp_path / "b", seeds=1, max_minutes=9, report=silent)
    assert not stopped.complete
    assert batches == [1], "of two batches an epoch"
    resumed = reproduce(study(train_cell, ROWS[1:], DIGITS), tmp_path / "b", seeds=1, max_minutes=9, report=silent)
    one, two = (r.cells["two/0"] for r in (straight, resumed))
    assert one["train_loss"] == two["train_loss"]
    assert one["nudge_response"] == two["nudge_response"]


def test_a_report_folder_is_measured_in_once_at_a_time(tmp_path):
    def measure(cell):
        with pytest.raises(CheckpointError, match="is in use by process"):
            reproduce(study(measure), tmp_path, report=silent)
        return {"loss": 1.0}

    assert reproduce(study(measure), tmp_path, seeds=1, report=silent).complete


@pytest.mark.parametrize(
    ("device", "where"), [("cpu", "CPU"), ("cuda:0", "NVIDIA X, 80 GiB"), (None, "NVIDIA X, 80 GiB")]
)
def test_a_report_names_what_it_was_measured_on(tmp_path, device, where):
    """A GPU that is there, and was not used, is not named; a report of before says nothing of the device."""
    results = reproduce(study(Measure(1.0, 5.0, 2.0, 6.0)), tmp_path, report=silent)
    system = {"gpu": "NVIDIA X, 80 GiB"} | ({} if device is None else {"device": device})
    assert f"; {where}, " in report_text(study(None), results, {"scale": "small", "system": system})
    measured_on = json.loads((tmp_path / "results.json").read_text())["system"]["device"]
    assert measured_on == ep.get_device("auto").name
