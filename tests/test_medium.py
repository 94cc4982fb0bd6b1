"""Experiments at medium scale: settings as predicted, runs of the command line as cells, progress, longer reports."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import cupyep as ep
from cupyep.cli import main
from cupyep.errors import CheckpointError
from cupyep.experiments import EXPERIMENTS, cells, find, loading, progress, reproduce
from cupyep.experiments.cells import cosines, train_cell
from cupyep.experiments.design import Results
from cupyep.experiments.details import details
from cupyep.experiments.report import report_text
from cupyep.experiments.runner import cells_of
from cupyep.models import build
from cupyep.recipes import read_recipe
from cupyep.training import runs
from cupyep.training.config import differing, make_config, tomllib
from cupyep.training.run_directory import RunDirectory
from cupyep.training.trainer import Trainer

pytest.importorskip("matplotlib")

NET = "--arch hopfield-resnet13 --activation relu --weights standardized --readout-pool global --batch-size 100"
BEST = f"{NET} --epochs 30 --optimizer adam --lr 0.004 --cutout 8 --ema 0.999 --seed 0"
EP = "--feedback 0.03 --scheme tangent --free-steps 1 --nudged-steps 1 --schedule sweeps"
RESNET9 = f"{BEST} --arch resnet9 --width 0.5"
BEST10 = f"{RESNET9} --dataset cifar10 --epochs 20"
BEST100 = f"{RESNET9} --dataset cifar100 --epochs 16 --label-smoothing 0.1"
VGG = "--width 0.25 --batch-size 64"
CONTRACTING = (
    "--feedback 1 --gain 0.5 --weights standardized --lr 2e-3 --scheme tangent --schedule evenodd --free-steps 8 "
    "--nudged-steps 4"
)
#: docs/results/predictions.md as command lines: experiment, row -> options.
PREDICTED = {
    ("best-cifar10", "ep"): f"{BEST} --width 0.5 --dataset cifar10 {EP}",
    ("best-cifar10", "bp"): f"{BEST} --width 0.5 --dataset cifar10 --feedback 0.03 --algorithm bp",
    ("resnet9-cifar10", "ep"): f"{BEST10} {EP} --feedback 0.003",
    ("resnet9-cifar10", "bp"): f"{BEST10} --feedback 0.03 --algorithm bp",
    ("best-cifar100", "ep"): f"{BEST100} {EP} --feedback 0.01",
    ("best-cifar100", "bp"): f"{BEST100} --feedback 0.03 --algorithm bp",
    ("best-fashion-mnist", "ep"): f"{BEST} --width 0.25 --epochs 10 --dataset fashion-mnist {EP} --feedback 0.01",
    ("best-svhn", "bp"): f"{BEST} --width 0.25 --epochs 10 --dataset svhn --feedback 0.03 --algorithm bp",
    (
        "vgg7-kd-cifar10",
        "feedback0.1",
    ): f"{VGG} --arch vgg7 --epochs 5 --feedback 0.1 --beta 0.5 --free-steps 2 --nudged-steps 1",
    ("vgg7-kd-cifar10", "bp"): f"{VGG} --arch vgg7 --epochs 5 --feedback 0.1 --algorithm bp",
    (
        "vgg7-kd-cifar10",
        "kd",
    ): f"{VGG} --arch vgg7 --epochs 5 {CONTRACTING} --aug kd --kappa 0.3 --temperature 2 --teacher-epochs 15",
    ("vgg11-kd-cifar100", "bp"): f"{VGG} --arch vgg11 --dataset cifar100 --epochs 5 --feedback 0.03 --algorithm bp",
    ("hopfield-resnet13", "bp"): f"{NET} --lr 0.004 --width 0.25 --epochs 5 --feedback 0.1 --algorithm bp",
}


@pytest.fixture
def parsed(monkeypatch):
    """Return a function from a command line of `cupyep train` to the configuration that it would run."""

    def parse(line):
        found = []

        def start_run(config, *_):
            found.append(config)
            raise CheckpointError("enough")

        monkeypatch.setattr(runs, "start_run", start_run)
        result = CliRunner().invoke(main, ["train", *line.split()])
        assert found, result.output
        return found[0]

    return parse


@pytest.mark.parametrize(("name", "key"), PREDICTED, ids=str)
def test_rows_are_what_was_predicted(name, key, parsed):
    (row,) = (row for row in find(name).at("medium").rows if row.key == key)
    assert differing(make_config({**row.options, "seed": 0}), parsed(PREDICTED[name, key])) == []


@pytest.mark.parametrize("name", ["best-cifar10", "resnet9-cifar10", "best-cifar100"])
def test_the_recipe_of_the_best_network_is_its_row(name):
    (row,) = (row for row in find(name).at("medium").rows if row.key == "ep")
    config = make_config(row.options)
    recipe = make_config(read_recipe(f"{config.arch}-feedback{config.feedback}-{config.dataset}"))
    assert differing(recipe, make_config({**row.options, "seed": 0})) == []


def test_rows_of_weak_feedback_begin_as_bp():
    best = ("best-cifar10", "resnet9-cifar10", "best-cifar100")
    for name in (*best, "hopfield-resnet13", "vgg7-kd-cifar10", "vgg11-kd-cifar100"):
        rows = {row.key: make_config(row.options) for row in find(name).at("medium").rows}
        for key, config in rows.items():
            if config.feedback < 0.3 and config.algorithm == "ep":
                ours, bp = (_weights_of(config), _weights_of(rows["bp"]))
                assert all((ours[path] == bp[path]).all() for path in bp), (name, key)


def _weights_of(config):
    how = config.take("activation", "feedback", "gain", "weights", "seed")
    return build(config.arch, width=0.03, input_shape=(16, 16, 3), device="cpu", **how).parameters()


@pytest.fixture
def mini(cifar, monkeypatch):
    """The experiment best-cifar10 at medium scale, of a narrow network and as many images as there are."""
    content = tomllib.loads((loading.FOLDER / "best-cifar10.toml").read_text(encoding="utf-8"))
    content["medium"] |= {"width": 0.03, "image_size": 16, "epochs": 2}
    monkeypatch.setattr(cells, "SETTLE", 10)
    monkeypatch.setitem(EXPERIMENTS, "best-cifar10", loading.load_experiment("best-cifar10", content))
    return EXPERIMENTS["best-cifar10"]


SMALL = f"{BEST} --width 0.03 --image-size 16 --epochs 2 --dataset cifar10 --device cpu --quiet"


def train(line, folder):
    result = CliRunner().invoke(main, ["train", *line.split(), "--run-dir", str(folder)])
    assert result.exit_code == 0, result.output


def run(experiment, out, **how):
    return reproduce(experiment, out, "medium", report=lambda text: None, quiet=True, **how)


@pytest.fixture
def untrained(monkeypatch):
    """Call it: from then on nothing may be trained."""

    def forbid():
        monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("a finished run was trained"))

    return forbid


def test_runs_of_the_command_line_are_cells(mini, tmp_path, untrained):
    straight = run(mini, tmp_path / "straight")
    for key, more in (("ep", EP), ("bp", "--feedback 0.03 --algorithm bp")):
        train(f"{SMALL} {more}", tmp_path / "report" / "work" / f"{key}-seed0")
    untrained()
    taken = run(mini, tmp_path / "report")
    for name, cell in straight.cells.items():
        for course in ("train_loss", "test_accuracy", "nudge_response", "probes"):
            assert taken.cells[name][course] == cell[course], course
    assert len(taken.cells["ep/0"]["probes"]) == 1


def test_an_unfinished_run_goes_on(mini, tmp_path):
    straight = run(mini, tmp_path / "straight")
    place = tmp_path / "report" / "work" / "ep-seed0"
    shutil.copytree(tmp_path / "straight" / "work" / "ep-seed0", place)
    (place / "probes.json").unlink()
    (place / "checkpoint.previous.h5").replace(place / "checkpoint.h5")  # after the first epoch
    taken = run(mini, tmp_path / "report")
    assert taken.cells["ep/0"]["train_loss"] == straight.cells["ep/0"]["train_loss"]
    assert taken.cells["ep/0"]["probes"] == straight.cells["ep/0"]["probes"]


def test_a_run_with_other_options_is_refused(mini, tmp_path, untrained):
    place = tmp_path / "report" / "work" / "ep-seed0"
    train(f"{SMALL} {EP} --lr 0.002", place)
    before = (place / "metrics.jsonl").read_bytes()
    untrained()
    told = f"'{place}' holds a run with --learning-rate 0.002, not 0.004; remove it or give another --output"
    with pytest.raises(CheckpointError) as error:
        run(mini, tmp_path / "report")
    assert str(error.value) == told
    assert (place / "metrics.jsonl").read_bytes() == before
    lines = list(progress.status(cells_of(mini, tmp_path / "report", "medium")))
    assert lines[0] == f"ep/0  refused: {told}"


def test_options_without_effect_do_not_matter():
    bp = make_config({"algorithm": "bp", "scheme": "tangent", "free_steps": 1})
    assert differing(bp, make_config({"algorithm": "bp"})) == []
    assert differing(bp, make_config({"scheme": "tangent", "free_steps": 1})) == ["algorithm"]
    assert differing(make_config({"scheme": "tangent"}), make_config({"beta": 0.1})) == ["beta", "scheme"]
    assert differing(bp, make_config({"free_steps": 1})) == ["algorithm", "scheme"]


def test_a_probe_that_was_cut_off_is_made_up_for(mini, tmp_path, untrained):
    """Killed behind the last checkpoint: the network is there, what it was to be asked is not."""
    whole = run(mini, tmp_path / "report")
    (tmp_path / "report" / "work" / "ep-seed0" / "probes.json").unlink()
    (tmp_path / "report" / "results.json").unlink()
    untrained()
    assert run(mini, tmp_path / "report").cells["ep/0"]["probes"] == whole.cells["ep/0"]["probes"]


def test_a_run_without_what_is_measured_every_epoch(mini, tmp_path):
    place = tmp_path / "report" / "work" / "ep-seed0"
    train(f"{SMALL} {EP}", place)
    cell = cells_of(mini, tmp_path / "report", "medium", report=lambda text: None, quiet=True)[0]
    with pytest.raises(CheckpointError, match="ep-seed0' holds a run without what is measured after every epoch"):
        train_cell(cell, lambda *_: {}, every_epoch=True)


def test_status_reads_how_far_cells_are(mini, tmp_path, monkeypatch, invoke):
    out = tmp_path / "report"
    command = ("reproduce", "best-cifar10", "--scale", "medium", "--output", out)
    code, text, _ = invoke(*command, "--status")
    assert (code, text.splitlines()) == (0, [
        "ep/0  not started", "bp/0  not started", f"run directories: {out}/work/ROW-seedK"])  # fmt: skip
    assert not out.exists()
    run(mini, out)
    directory = RunDirectory.open(out / "work" / "bp-seed0")
    first = {**directory.metrics()[0], "elapsed_s": 5400.0, "test_accuracy": 0.4567}
    (directory.path / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    path = out / "results.json"
    results = json.loads(path.read_text())
    del results["cells"]["bp/0"]
    results["cells"]["ep/0"]["minutes"] = 90
    path.write_text(json.dumps(results))
    code, text, _ = invoke(*command, "--status")
    assert code == 0
    accuracy = results["cells"]["ep/0"]["test_accuracy"][-1]
    assert text.splitlines()[:2] == [
        f"ep/0  done, accuracy {accuracy:.2%}, 1.5 hours",
        "bp/0  epoch 1 of 2, accuracy 45.67%, 1.5 hours so far, 1.5 hours left",
    ]
    assert text.splitlines()[-1] == "left: 1.5 hours, one after the other"
    for wrong in (("--status", "--max-minutes", "3"), ("--estimate", "--report-only")):
        code, _, error = invoke(*command, *wrong)
        assert (code, len(error.strip().splitlines())) == (2, 1)
    assert invoke("reproduce", "memory", "--estimate")[0] == 2


@pytest.mark.parametrize("teacher", [False, True])
def test_hours_by_hand(teacher, cifar, monkeypatch):
    """50 training images in batches of 20, 10 test images in one of 10: a step takes 2 s, a batch of a test 0.5 s."""
    calls = []

    def timed(work, wait):
        work()
        calls.append(work)
        return 2.0 if len(calls) % 2 else 0.5

    monkeypatch.setattr(progress, "_timed", timed)
    options = {"arch": "vgg5", "width": 0.02, "batch_size": 20, "epochs": 7, "device": "cpu"}
    options |= {"aug": "kd", "teacher_epochs": 3} if teacher else {}
    hours, rate = progress.hours_of(make_config(options))
    assert rate == 10
    assert hours == pytest.approx((7 + 3 * teacher) * (50 / 10 + 0.5) / 3600)


def test_steps_are_timed_after_one_that_is_not(monkeypatch):
    now, done = [0.0], []

    def work():
        done.append(None)
        now[0] += 10.0 if len(done) == 1 else 0.25

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    assert progress._timed(work, lambda: None) == pytest.approx(0.25)


def test_when_the_last_of_several_jobs_ends():
    assert progress.longest([3.0, 1.0, 1.5, 2.0], 1) == 7.5
    assert progress.longest([3.0, 1.0, 1.5, 2.0], 2) == 4.5  # 3 | 1 + 1.5 + 2


def test_an_estimate_is_for_what_has_no_epoch(mini, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(progress, "hours_of", lambda config: asked.append(config.algorithm) or (6.25, 120.0))
    lines = list(progress.status(cells_of(mini, tmp_path, "medium"), estimate=True))
    assert asked == ["ep", "bp"]
    assert lines[0] == "ep/0  not started, about 6.2 hours by steps timed now (120 images/s)"
    assert lines[-1] == "left: 12.5 hours, one after the other"


def small_network(quadrants, feedback, steps):
    """Return a network with smooth units, and the configuration of a training of it with so many sweeps a phase."""
    shared = {"activation": "tanh", "gain": 1.0, "feedback": feedback, "device": "cpu"}
    how = {"scheme": "tangent", "free_steps": steps, "nudged_steps": steps}
    shape, classes = quadrants.image_shape, len(quadrants.classes)
    network = ep.build("8 8s 8", input_shape=shape, classes=classes, **shared)
    return network, make_config({"arch": "8 8s 8", **shared, **how})


@pytest.mark.parametrize("feedback", [1e-3, 0.3])
def test_as_lambda_vanishes_what_training_follows_is_backpropagation(feedback, quadrants):
    found = cosines(*small_network(quadrants, feedback, 1))
    assert found["weights"] == ["1", "2", "3", "readout"]
    lowest = min(found["bp_trained"])
    assert lowest > 0.9999 if feedback < 0.01 else lowest < 0.9999
    assert found["response"][3] is None
    first, second, third = found["response"][:3]
    ratios = np.array([first / second, second / third]) / feedback  # a layer down a response shrinks by about lambda
    assert (ratios > 0.1).all()
    assert (ratios < 10).all()


def test_what_training_follows_is_taken_after_its_own_steps(quadrants):
    """One free and one nudged sweep from zeros, at a feedback where that is not yet a rest point."""
    network, config = small_network(quadrants, 0.3, 1)
    found = cosines(network, config)
    images = (quadrants.train.images[:32] / 255 - quadrants.mean) / quadrants.std
    batch = network.batch(images.astype(np.float32), quadrants.train.labels[:32])
    how = {"free_steps": 1, "nudged_steps": 1, "scheme": "tangent", "schedule": "sweeps"}
    followed, truth = (
        {path: np.array(g, np.float64).ravel() for path, g in learner.step(batch).gradients.items()}
        for learner in (ep.EquilibriumPropagation(network, **how), ep.Backpropagation(network))
    )
    for name, cosine, settled in zip(found["weights"], found["bp_trained"], found["bp"], strict=True):
        path = f"layers.{name}.weight" if name != "readout" else "readout.weight"
        a, b = followed[path], truth[path]
        assert cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-4)
        assert abs(cosine - settled) > 1e-3 or name == "readout"


@pytest.mark.parametrize("algorithm", ["ep", "bptt", "bp"])
def test_accuracies_as_trained_and_at_rest(algorithm, quadrants, monkeypatch):
    """Against the whole command's: what a network of some steps, and of ten times as many, gets right."""
    network = small_network(quadrants, 0.9, 1)[0]
    for array in network.parameters().values():
        array *= 3
    steps = {"free_steps": 1, "nudged_steps": 1, "schedule": "synchronous"}  # too few for the image to arrive
    config = make_config({"algorithm": algorithm, "activation": "tanh", "feedback": 0.9, "device": "cpu"} | steps)
    noise = np.random.default_rng(0).integers(0, 256, quadrants.test.images.shape).astype(np.uint8)
    data = replace(quadrants, test=replace(quadrants.test, images=noise))
    images = ((noise / 255 - data.mean) / data.std).astype(np.float32)
    monkeypatch.setattr(cells, "build_dataset", lambda _: data)
    found = cells.rest(network, config)
    if algorithm == "bp":
        assert found == {}
        return
    expected = {"images": len(images)}
    for name, steps in (("as_trained", 1), ("longer", 10)):
        free = network.settle(images, steps=steps, schedule=config.schedule, relaxation=config.relaxation)
        if algorithm == "bptt":
            free = network.settle(images, free, steps=1, schedule="synchronous")
        scores = network.outputs(free.layers[-1])
        expected[name] = (scores.argmax(axis=1) == quadrants.test.labels).mean()
    assert found["rest"] == pytest.approx(expected)
    assert expected["as_trained"] != expected["longer"]


def cell(accuracy, loss, minutes, rates, seed=0, **more):
    courses = {"train_loss": [9.0, loss], "test_accuracy": [0.0, accuracy]}
    options = {"dataset": "cifar10", "seed": seed}
    return {**courses, "minutes": minutes, "rates": rates, "threads": 2, "findings": [], "options": options, **more}


def test_sections_of_a_report_by_hand():
    rows = find("hopfield-resnet13").at("medium").rows
    found = [{"signature": "convergence", "epochs": 1, "last": 2, "message": "it swings"}]
    probe = {"weights": ["1", "readout"], "response": [1e-9, None], "bp_trained": [0.5, 1.0], "bp": [0.25, 0.75]}
    probe["rest"] = {"images": 1000, "as_trained": 0.81, "longer": 0.7}
    measured = {
        "ep-0.1/0": cell(0.80, 1.0, 90, [100, 300], probes=[probe]),
        "bp/0": cell(0.81, 1.1, 30, [600, 500]),
        "ep-1/0": cell(0.149, 2.3, 300, [10, 20], threads=None, findings=found),
        "ep-0.1/1": cell(0.83, 1.4, 60, [200, 200], 1, probes=[{**probe, "bp": [0.75, None]}]),
        "bp/1": cell(0.81, 1.1, 30, [400, 400], 1),
    }
    results = Results(rows, measured, 2)
    text = "\n".join(details(results))
    # -1 and +2 points; -0.1 and +0.3; 3 and 2 times; 600 / 300 and 400 / 200
    assert "| EP, lambda = 0.1 | yes | +0.50 ± 2.12 | +0.100 ± 0.283 | 2.50 ± 0.71 | 2.00 ± 0.00 |" in text
    assert "over-relaxed | no: other gain | -66.10 | +1.200 | 10.00 | 30.00 |" in text
    assert "| BP, same network | " not in text.partition("**Layer")[0]
    assert "| EP, lambda = 0.1, cosine with BP, settled | 0.500 | 0.750 |" in text
    assert "| EP, lambda = 0.1, response | 1.0e-09 | - |" in text
    assert "| EP, lambda = 0.1 | 1000 | 81.0 ± 0.0 | 70.0 ± 0.0 |" in text
    assert "seed 0: ends near chance (14.9% of 10 classes)" in text
    assert "seed 0: convergence in 1 of 2 epochs, at last in epoch 2: it swings" in text
    assert "| EP, lambda = 0.1, seed 0 | 1.50 | 200 | 300 | 2 |" in text
    assert "| EP, lambda = 1, even/odd, over-relaxed, seed 0 | 5.00 | 15 | 20 | not recorded |" in text
    assert rows[0].tuning in text
    quiet = Results(rows, {name: measured[name] for name in ("ep-0.1/0", "bp/0")}, 1)
    assert "Nothing: all are above chance, and no checkup found anything." in "\n".join(details(quiet))
    lossless = Results(rows, {"ep-0.1/0": cell(0.80, None, 90, [100, 300]), "bp/0": measured["bp/0"]}, 1)
    assert "| EP, lambda = 0.1 | yes | -1.00 | - | 3.00 | 2.00 |" in "\n".join(details(lossless))
    experiment = find("hopfield-resnet13")
    assert experiment.verdict(Results(rows[:2], measured, 1)).startswith(
        "EP, lambda = 0.1: 80.00 % (-1.00 points from BP, in 3.0 times its time); BP, same network: 81.00 %"
    )
    assert "**Time.**" in report_text(experiment, results, {"scale": "medium"})


def test_findings_are_counted_by_epoch():
    records = [
        {"epoch": 1, "findings": [{"signature": "a", "message": "x"}, {"signature": "a", "message": "y"}]},
        {"epoch": 2, "findings": None},
        {"epoch": 3, "findings": [{"signature": "b", "message": "z"}, {"signature": "a", "message": "w"}]},
        {"epoch": 4, "findings": [{"signature": "a", "message": "u"}, {"signature": "a", "message": "v"}]},
    ]
    assert cells._found(records) == [
        {"signature": "a", "epochs": 3, "last": 4, "message": "u; v"},
        {"signature": "b", "epochs": 1, "last": 3, "message": "z"},
    ]


def test_a_row_beside_that_there_is_not():
    content = tomllib.loads((loading.FOLDER / "best-cifar10.toml").read_text(encoding="utf-8"))
    content["medium"]["beside"] = "bq"
    with pytest.raises(ep.ConfigurationError, match="unknown row .bq. .choose from ep, bp"):
        loading.load_experiment("best-cifar10", content)


def test_rows_take_what_their_scale_says_besides():
    content = tomllib.loads((loading.FOLDER / "best-cifar10.toml").read_text(encoding="utf-8"))
    content["medium"]["tuning"], content["rows"]["bp"]["tuning"] = "of all", "its own"
    rows = {row.key: row for row in loading.load_experiment("best-cifar10", content).at("medium").rows}
    assert (rows["ep"].tuning, rows["bp"].tuning, rows["ep"].beside) == ("of all", "its own", "bp")


def test_every_row_of_hours_says_how_its_rate_was_found():
    for experiment in EXPERIMENTS.values():
        if "medium" in experiment.scales:
            assert all(row.tuning for row in experiment.at("medium").rows), experiment.name
