"""Pictures of runs. Oracle: the numbers put in, read back from the figures; the formats' own signatures."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from quadrants import quadrant_data

import cupyep as ep
from cupyep.commands import confusion
from cupyep.errors import ConfigurationError
from cupyep.training import build, runs
from cupyep.training.config import make_config
from cupyep.training.display import Display
from cupyep.training.run_directory import RunDirectory
from cupyep.training.trained import load_trained

pytest.importorskip("matplotlib")

from cupyep.commands.plots import curves, draw_runs, maps, style
from cupyep.commands.plots.overview import overview

SMALL = {"arch": "vgg5", "width": 0.06, "batch_size": 16, "device": "cpu", "epochs": 1}
KINDS = ["learning", "overview", "response", "gradient", "distance", "units", "settling", "filters", "filters_by_epoch",
         "confusion"]  # fmt: skip


def records(epochs, offset=0.0):
    return [
        {"epoch": e, "test_loss": 2 / e + offset, "train_loss": 1 / e, "test_accuracy": 1 - 1 / (e + 1),
         "train_accuracy": 1 - 1 / (e + 2)} for e in range(1, epochs + 1)
    ]  # fmt: skip


# --- figures -------------------------------------------------------------------------------------------------------


def test_many_lines_are_told_apart():
    """By colour and dashes, with marks or without."""
    from cupyep.experiments import figures

    for style_of in (style.line_style, figures._style):
        assert len({tuple(sorted(style_of(n).items())) for n in range(24)}) == 24


@pytest.mark.parametrize("epochs", [0, 1, 5, 300])
def test_learning_shows_all_runs(epochs):
    runs_ = {"one": records(epochs), "two": records(max(epochs - 1, 0), 0.5)}
    figure = curves.learning(runs_, ["cross_entropy", "cross_entropy"])
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel(), loss.get_xlabel()) == ("loss, nats", "accuracy, %", "epoch")
    shown = [line.get_ydata() for line in loss.get_lines()]
    np.testing.assert_allclose(shown[0], [2 / e for e in range(1, epochs + 1)])
    np.testing.assert_allclose(shown[1], [1 / e for e in range(1, epochs + 1)])
    np.testing.assert_allclose(shown[2], [2 / e + 0.5 for e in range(1, max(epochs, 1))])
    np.testing.assert_allclose(accuracy.get_lines()[0].get_ydata(), [100 - 100 / (e + 1) for e in range(1, epochs + 1)])
    colours = [line.get_color() for line in loss.get_lines()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"one", "two"}
    figure.canvas.draw()


def test_a_squared_error_has_no_unit():
    assert curves.learning({"a": records(2)}, ["squared_error"]).axes[0].get_ylabel() == "loss"


@pytest.mark.parametrize("layers", [1, 5, 16])
def test_settling_shows_residuals_and_where_the_run_stops(layers):
    free = (0.5 ** np.arange(1, 12))[:, None] * np.arange(1, layers + 1)
    free[-1, 0] = 0.0
    trace = {"epoch": 2, "images": 8, "schedule": "sweeps", "tolerance": 1e-3,
             "free": {"steps": 4, "residual": free.tolist()}}  # fmt: skip
    figure = curves.settling(trace, "run: settling")
    assert figure.get_suptitle() == "run: settling"
    axis = figure.axes[0]
    lines = axis.get_lines()
    for n in range(layers):
        shown = np.where(free[:, n] > 0, free[:, n], np.nan)
        np.testing.assert_array_equal(lines[n].get_xdata(), np.arange(1, 12))
        np.testing.assert_array_equal(lines[n].get_ydata(), shown)
    assert [line.get_xdata()[0] for line in lines[layers:] if line.get_xdata()[0] == line.get_xdata()[-1]] == [4]
    assert [line.get_ydata()[0] for line in lines[layers:] if line.get_ydata()[0] == line.get_ydata()[-1]] == [1e-3]
    assert (axis.get_yscale(), axis.get_xlabel(), axis.get_ylabel()) == ("log", "sweep", "RMS change in a sweep")
    figure.canvas.draw()


@pytest.mark.parametrize("tolerance", [5e-324, 1e-8, 1e3, 1.7e308])
def test_settling_shows_a_tolerance_far_from_all_residuals(tolerance):
    trace = {"epoch": 1, "images": 8, "schedule": "sweeps", "tolerance": tolerance,
             "free": {"steps": 2, "residual": [[0.2], [0.1], [0.05]]}}  # fmt: skip
    figure = curves.settling(trace, "run: settling")
    figure.canvas.draw()  # a layout that collapses warns
    low, high = figure.axes[0].get_ylim()
    assert low <= max(min(tolerance, 0.05), 1e-29)
    assert high >= min(max(tolerance, 0.2), 1e29)


@pytest.mark.parametrize(("epochs", "layers"), [(1, 5), (3, 16), (300, 5)])
@pytest.mark.parametrize("log", [False, True])
def test_maps_show_every_value(epochs, layers, log):
    values = np.random.default_rng(0).uniform(1e-3, 1, (epochs, layers))
    figure = maps.over_epochs({"a": values, "b": values / 2}, range(1, epochs + 1), "what, unit", "title", log)
    left, right, bar = figure.axes
    for axis, expected in ((left, values), (right, values / 2)):
        image = axis.get_images()[0]
        np.testing.assert_array_equal(image.get_array(), expected.T)
        assert list(image.get_extent()) == [0.5, epochs + 0.5, 0.5, layers + 0.5]
        assert image.origin == "lower", "layer 1 is at the bottom"
        assert len(axis.texts) == (values.size if epochs <= maps.NUMBERED_EPOCHS else 0)
    assert bar.get_ylabel() == "what, unit"
    figure.canvas.draw()


def test_logarithmic_colours_span_whole_decades_but_no_more_than_six():
    """Where something lies below them, the key ends in an arrow."""
    for smallest, low, extend in ((2e-3, 1e-3, "neither"), (1e-30, 1e-6, "min"), (0.0, 0.1, "min")):
        values = np.array([[smallest, 0.5]])
        image = maps.over_epochs({"": values}, [1], "", "", log=True).axes[0].get_images()[0]
        np.testing.assert_allclose([image.norm.vmin, image.norm.vmax], [low, 1.0])
        assert image.colorbar.extend == extend


def test_the_readout_is_named():
    axis = maps.over_epochs({"": np.ones((2, 4))}, [1, 2], "", "", readout=True).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "3", "readout"]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_filters_are_grey_where_they_are_zero(channels):
    weight = np.zeros((3, 3, channels, 7))
    weight[0, 0, :, 2] = 2.0
    weight[1, 1, :, 2] = -2.0
    figure = maps.filters(weight, "title")
    tiles = [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]
    assert len(tiles) == 7
    expected = np.full((3, 3, 3) if channels == 3 else (3, 3), 0.5)
    np.testing.assert_array_equal(tiles[0], expected)
    expected[0, 0], expected[1, 1] = 1.0, 0.0
    np.testing.assert_array_equal(tiles[2], expected)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_filters_by_epoch_have_one_scale_and_say_how_far_they_moved(channels):
    start = np.zeros((2, 3, channels, 40))
    start[0, 1, :, [0, 39]] = 2.0
    later = start.copy()
    later[1, 2, :, 0] = -4.0
    axis = maps.filters_by_epoch({0: start, 12: later}, "title").axes[0]
    mosaic = np.asarray(axis.get_images()[0].get_array())
    assert mosaic.shape == (2 * 2 + 1, 16 * 3 + 15, 3), "16 filters of 40, a line between"
    grey = np.full((2, 3, 3), 0.5)
    first, last = grey.copy(), grey.copy()
    first[0, 1] = 0.75  # 2 of the 4 that are the largest in all epochs
    last[0, 1] = 1.0
    np.testing.assert_allclose(mosaic[:2, :3], first)
    np.testing.assert_allclose(mosaic[:2, 4:7], grey)
    np.testing.assert_allclose(mosaic[:2, -3:], last)
    first[1, 2] = 0.0
    np.testing.assert_allclose(mosaic[3:, :3], first)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "12"]
    labels = [int(label.get_text()) for label in axis.get_xticklabels()]
    assert (labels[0], labels[-1], len(labels)) == (1, 40, 16)
    moved = np.sqrt(channels * 16 / (2 * channels * 4))
    assert [text.get_text() for text in axis.texts] == [f"moved {moved:.1%}"]


def test_confusion_is_in_percent_of_the_true_class():
    axis = maps.confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"], "title").axes[0]
    np.testing.assert_array_equal(axis.get_images()[0].get_array(), [[75, 25], [0, 0]])
    assert {text.get_text() for text in axis.texts} == {"75", "25"}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    rare = maps.confusion(np.array([[199, 1], [3, 197]]), ["cat", "dog"], "title").axes[0]
    assert {text.get_text() for text in rare.texts} == {"100", "2", "98"}, "half a percent is no number"
    many = maps.confusion(np.eye(100, dtype=int), [str(n) for n in range(100)], "title")
    assert not many.axes[0].texts


def test_files_are_what_their_names_say_and_repeat(tmp_path):
    def draw(folder):
        folder.mkdir()
        figure = curves.learning({"a": records(3)}, ["cross_entropy"])
        return style.save(figure, folder / "vgg7-lambda0.3", style.FORMATS["both"])

    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert [file.name for file in first] == ["vgg7-lambda0.3.png", "vgg7-lambda0.3.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.fromstring(first[1].read_text()).tag.endswith("svg")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("count", "mode"), [(16, "P"), (128, "RGB")])
def test_few_colours_make_a_small_file_and_many_stay_true(count, mode, tmp_path):
    from PIL import Image

    weight = np.random.default_rng(0).standard_normal((3, 3, 3, count))
    (file,) = style.save(maps.filters(weight, ""), tmp_path / "filters", ("png",))
    with Image.open(file) as image:
        assert image.mode == mode
        shown = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    first = 0.5 + 0.5 * weight[..., 0] / np.abs(weight[..., 0]).max()
    for pixel in first.reshape(-1, 3):
        assert min(np.abs(np.array(colour) - 255 * pixel).max() for colour in shown) <= 2


UNSETTLED = [{"signature": "convergence", "layers": [1], "message": ""}]


def settled_records(*findings):
    """Records of a run with two layers, one for each of some findings."""
    return [
        {**record, "free_residual": 0.5**k, "nudged_residual": 0.0, "nudge_response": [0.25**k, 0.5], "findings": found,
         "free_distance": [0.25, 0.5], "nudged_distance": [0.5, 1.0], "saturated": [0.125, 0.5], "dead": [0.0, 1.0]}
        for k, (record, found) in enumerate(zip(records(len(findings)), findings, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("findings", "title", "crosses"),
    [(([], []), "a, epoch 2: settled", []), (([], UNSETTLED), "a, epoch 2: not settled", [2]),
     ((UNSETTLED, []), "a, epoch 2: settled", [1])],
)  # fmt: skip
def test_the_overview_has_it_all_and_says_what_settled(findings, title, crosses):
    figure = overview("a", settled_records(*findings), 0.5)
    loss, accuracy, residual, responses, _ = figure.axes
    assert figure.get_suptitle() == title
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [2, 1])
    np.testing.assert_allclose(accuracy.get_lines()[0].get_ydata(), [50, 200 / 3])
    assert accuracy.get_ylabel() == "accuracy, %"
    lines = {line.get_label(): line for line in residual.get_lines()}
    np.testing.assert_allclose(lines["free phase"].get_ydata(), [1, 0.5])
    assert "nudged phase" not in lines, "what never moves is not on a logarithmic scale"
    assert list(lines["not settled"].get_xdata() if crosses else []) == crosses
    np.testing.assert_allclose(responses.get_images()[0].get_array(), [[2, 0.5], [0.5, 0.5]])
    figure.canvas.draw()


def test_the_overview_of_a_run_without_phases():
    figure = overview("a", records(1), 0.1)
    assert figure.get_suptitle() == "a, epoch 1"
    assert [axis.texts[0].get_text() for axis in figure.axes[2:]] == ["nothing settles", "no responses are recorded"]


def test_what_is_a_share_is_drawn_in_percent():
    result = SimpleNamespace(
        history=settled_records([]),
        network=SimpleNamespace(feedback=0.5, readout=SimpleNamespace(criterion=SimpleNamespace(name="x"))),
    )
    for figure, label, values in (
        (ep.plots.units(result), "% of the units", [[12.5, 50], [0, 100]]),
        (ep.plots.distance(result), "left to go, % of the layer's size", [[25, 50], [50, 100]]),
    ):
        assert figure.axes[-1].get_ylabel() == label
        shown = [axis.get_images()[0] for axis in figure.axes[:2]]
        np.testing.assert_allclose([np.ravel(image.get_array()) for image in shown], values)
        assert shown[0].get_clim() == (0, 100)
    assert ep.plots.overview(result).get_suptitle() == "run, epoch 1: settled"
    with pytest.raises(ConfigurationError, match="no picture of settling: it needs a run directory"):
        ep.plots.settling(result)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Train a small network on the quadrants; return its folder."""
    dataset = quadrant_data(train=48)
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)

    def train(name="run", **options):
        trainer = runs.start_run(make_config(SMALL, options), tmp_path / name, Display(quiet=True, write=str))
        trainer.run()
        capsys.readouterr()  # its warnings
        return tmp_path / name

    return train


def test_a_run_is_drawn_and_classified_once(run, tmp_path, monkeypatch):
    path = run()
    lines = list(draw_runs([path]))
    assert lines == [str(path / "plots" / f"{kind}.png") for kind in KINDS]
    kept = json.loads((path / "confusion.json").read_text())
    record = RunDirectory.open(path).metrics()[-1]
    assert np.trace(kept["matrix"]) / np.sum(kept["matrix"]) == pytest.approx(record["test_accuracy"])
    assert np.sum(kept["matrix"], axis=1).tolist() == [10, 10]

    monkeypatch.setattr(confusion, "load_trained", None)
    matrix, classes = confusion.confusion_of(RunDirectory.open(path))
    assert (matrix.tolist(), classes) == (kept["matrix"], ["up", "down"])


def test_figures_of_a_run_from_its_folder(run, tmp_path):
    path = run()
    for kind in KINDS:
        assert getattr(ep.plots, kind)(str(path)).axes, kind
    assert set(ep.plots.__all__) == set(KINDS)
    assert len(ep.plots.learning(path, path).legends) == 1
    with pytest.raises(ep.CheckpointError, match="is not a run directory"):
        ep.plots.overview(tmp_path)
    with pytest.raises(ConfigurationError, match="run must be a run directory, or a result with records, not 3"):
        ep.plots.overview(3)
    with pytest.raises(ConfigurationError, match="learning needs a run"):
        ep.plots.learning()


def test_filters_of_the_epochs_a_run_keeps(run):
    """Its own weights where each epoch ended, the last epoch among them though it is not one of those."""
    path = run(epochs=9, algorithm="bp", learning_rate=0.01)
    axis = ep.plots.filters_by_epoch(path).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "2", "4", "6", "8", "9"]
    assert all(float(text.get_text().strip("moved %")) > 0 for text in axis.texts)


def test_a_dense_first_layer_has_no_filters(run):
    path = run(arch="mlp:8")
    lines = list(draw_runs([path]))
    for kind in ("filters", "filters_by_epoch"):
        assert f"run: no picture of {kind}: the first layer is not a convolution" in lines


def test_rows_are_the_true_classes(run, monkeypatch):
    """A learner that takes everything for the second class."""
    path = run()
    trained = load_trained(path)
    trained.learner.scores = lambda batch: np.tile([0.0, 1.0], (len(batch), 1))
    monkeypatch.setattr(confusion, "load_trained", lambda *_: trained)
    matrix, _ = confusion.confusion_of(RunDirectory.open(path), display=Display(quiet=True))
    assert matrix.tolist() == [[0, 10], [0, 10]]


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"epoch": 0, "classes": ["a"], "matrix": [[1]]}',
                                     '{"epoch": 1, "classes": ["a"], "matrix": [[-1]]}'])  # fmt: skip
def test_a_stale_or_damaged_confusion_is_made_anew(content, run):
    path = run()
    (path / "confusion.json").write_text(content)
    directory = RunDirectory.open(path)
    matrix, _ = confusion.confusion_of(directory, display=Display(quiet=True))
    trained, data = load_trained(path), quadrant_data(train=48)
    batch = next(iter(build.evaluation_batches(directory.config, data, trained.network)))
    for row, column in zip(batch.labels, trained.network.device.to_numpy(trained.learner.scores(batch)).argmax(axis=1),
                           strict=True):  # fmt: skip
        matrix[row, column] -= 1
    assert matrix.sum() == 20 - len(batch)
    assert (matrix >= 0).all()


@pytest.mark.slow
def test_several_runs_of_different_depth_and_kind(run, tmp_path, monkeypatch):
    deep, plain = run("deep", arch="vgg7", epochs=2), run("plain", algorithm="bp")
    monkeypatch.chdir(tmp_path)
    lines = list(draw_runs([deep, plain], formats=("svg",)))
    written = {p.name for p in (tmp_path / "plots").iterdir()}
    plain_kinds = ("overview", "gradient", "units", "filters", "filters_by_epoch", "confusion")
    assert written == {"learning.svg", *(f"deep-{kind}.svg" for kind in KINDS[1:]),
                       *(f"plain-{kind}.svg" for kind in plain_kinds)}  # fmt: skip
    assert "plain: no picture of settling: no phases are recorded" in lines
    assert "plain: no picture of response: nothing is recorded" in lines


@pytest.mark.slow
def test_an_unfinished_run_shows_what_there_is(run, tmp_path):
    path = run()
    for name in ("best.h5", "settling.json"):
        (path / name).unlink()
    (path / "metrics.jsonl").write_text("")
    lines = list(draw_runs([path], tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"learning.png", "filters.png", "filters_by_epoch.png"}
    assert "run: no picture of confusion: no epoch is done yet" in lines
    assert "run: no picture of units: no epoch is done yet" in lines


def test_without_matplotlib_one_line_names_the_command(invoke, run, tmp_path, monkeypatch):
    path = run()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = invoke("plot", path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert 'pip install "cupyep[plot]"' in err
    with pytest.raises(ConfigurationError):
        style.matplotlib_figure()


def test_wrong_runs_are_one_line(invoke, tmp_path):
    code, _, err = invoke("plot", tmp_path)
    assert (code, err) == (1, f"Error: '{tmp_path}' is not a run directory: it has no config.toml\n")
    assert invoke("plot")[0] == 2
    assert "did you mean 'png'?" in invoke("plot", tmp_path, "--format", "pgn")[2]


def test_names_are_shown_as_they_are(tmp_path):
    """No mathematics, a name that begins with _, one that is no text."""
    names = ["_old", "a$b^$c", "r\udcff"]
    figure = curves.learning({name: records(2) for name in names}, ["cross_entropy"] * 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_old", r"a\$b^\$c", r"r\udcff"]
    style.save(figure, tmp_path / "several")
    for name in names:
        style.save(curves.learning({name: records(2)}, ["cross_entropy"]), tmp_path / "one")
