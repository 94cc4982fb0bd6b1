"""`fit`: a training in one call. Oracle: the same run by the command line's functions, bit for bit; a straight run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from quadrants import TIMES, TINY, assert_same_state, numbers, quadrant_data, run
from small import Halved, Sparsity

import cupyep as ep
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.training.build import build_network
from cupyep.training.config import make_config
from cupyep.training.results import evaluate
from cupyep.training.run_directory import RunDirectory
from cupyep.training.runs import evaluate_run

OPTIONS = {"free_steps": 6, "nudged_steps": 4, "batch_size": 16, "quiet": True}


def built(data, **more):
    return build_network(make_config(TINY, more), data, ep.get_device("cpu"))


def own_network(feedback=0.1):
    layers = [ep.Conv2d((16, 16, 3), 4, pooling="max"), Halved((8, 8, 4), 6)]
    activation = ep.Clip("two_sided", slope=1.0, low=-1.0, high=1.0)
    return ep.Network(layers, 2, activation=activation, gain=1.0, feedback=feedback, device="cpu")


def without_times(history):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


@pytest.mark.parametrize("more", [{}, {"aug": "le", "optimizer": "adamw", "cutout": 3}, {"ema": 0.5, "crop": False}])
def test_it_is_the_run_of_the_command_line(more, quadrants, tmp_path):
    straight = run({**more, "epochs": 2}, tmp_path / "straight")
    straight.run()
    data = quadrant_data()
    net = built(data)
    result = ep.fit(net, data, run_dir=tmp_path / "fit", epochs=2, **more, **OPTIONS)
    directory = RunDirectory(tmp_path / "fit", None)
    assert_same_state(directory.load(), straight.directory.load())
    assert_same_state(directory.load("best"), straight.directory.load("best"))
    assert numbers(directory) == numbers(straight.directory) == without_times(result.history)
    loss, accuracy = evaluate(straight.learner, straight.test) if "ema" not in more else (None, None)
    if loss is not None:
        assert (result.history[-1]["test_loss"], result.summary.test_accuracy) == (loss, accuracy)
    for path, p in directory.load("last").weights().items():
        np.testing.assert_array_equal(result.network.parameters()[path], p)
        np.testing.assert_array_equal(result.best.parameters()[path], directory.load("best").weights()[path])
    assert result.network is net
    assert result.curves["epoch"] == [1, 2]
    assert result.curves["test_loss"] == [record["test_loss"] for record in result.history]
    assert repr(result).startswith("FitResult(test accuracy ")
    assert len(repr(result)) < 400


def test_options_may_be_numbers_of_numpy(tmp_path):
    data, files = quadrant_data(), []
    for kinds in ((int, float), (np.int64, np.float32)):
        path = tmp_path / kinds[1].__name__
        ep.fit(own_network(), data, run_dir=path, epochs=kinds[0](1), learning_rate=kinds[1](0.125), **OPTIONS)
        files.append((path / "config.toml").read_text())
    assert files[0] == files[1]


def test_a_run_of_a_named_data_set_is_one_for_all_commands(quadrants, tmp_path):
    data = dataclasses.replace(quadrant_data(), name="cifar10")
    result = ep.fit(built(data), data, run_dir=tmp_path / "run", epochs=1, **OPTIONS)
    lines = evaluate_run(tmp_path / "run", "last", {})
    assert f"test accuracy {result.summary.test_accuracy:.2%}" in lines[1]


@pytest.mark.parametrize("stop", [True, np.True_, "stop"])
@pytest.mark.parametrize("where", ["epoch", "batch"])
def test_a_callback_ends_a_run_of_ones_own_parts_and_it_goes_on(stop, where, tmp_path):
    """A layer, an activation and a signal of one's own; stopped in the second of three epochs."""
    data, seen = quadrant_data(), []

    def signals():
        return [Sparsity(layers=[1], kappa=1e-3)]

    def after(value):
        seen.append(value)
        return len(seen) == {"epoch": 1, "batch": 4}[where] and stop

    options = {**OPTIONS, "epochs": 3, "scheme": "random"}
    straight = ep.fit(own_network(), data, run_dir=tmp_path / "straight", signals=signals(), **options)
    path = tmp_path / "broken"
    result = ep.fit(own_network(), data, run_dir=path, signals=signals(), **options, **{f"on_{where}": after})
    assert len(seen) == {"epoch": 1, "batch": 4}[where]
    assert result.summary.rest is None, "whoever ends a run is not kept waiting"
    assert straight.summary.rest["images"] == len(data.test)
    assert [record["epoch"] for record in result.history] == [1]
    saved = RunDirectory(path, None).load()
    assert (saved.epoch, saved.batch) == (1, {"epoch": 0, "batch": 1}[where])
    longer = ep.fit(own_network(), data, run_dir=path, resume=True, signals=signals(), **options)
    assert without_times(longer.history) == without_times(straight.history)
    for which in ("last", "best"):
        one, other = (RunDirectory(tmp_path / name, None).load(which) for name in ("broken", "straight"))
        assert_same_state(one, other)
    for name in ("network", "best"):
        one, other = (getattr(r, name).parameters() for r in (longer, straight))
        for path, p in one.items():
            np.testing.assert_array_equal(p, other[path])


def test_a_damaged_checkpoint_is_said(tmp_path, capsys):
    data, path = quadrant_data(), tmp_path / "run"
    ep.fit(own_network(), data, run_dir=path, epochs=2, **OPTIONS)
    (path / "checkpoint.h5").write_bytes(b"")
    capsys.readouterr()
    result = ep.fit(own_network(), data, run_dir=path, resume=True, epochs=2, **OPTIONS | {"quiet": False})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("(truncated or damaged): no HDF5 signature; going on from checkpoint.previous.h5")
    assert [record["epoch"] for record in result.history] == [1, 2]


@pytest.mark.parametrize("answer", [1, 1.0, 0, "stopped", "", np.ones(2), np.ones(()), [True], None, np.False_])
def test_only_true_and_stop_end_a_run(answer):
    """`write(".")` returns 1; whatever a loss was computed with may return an array."""
    calls = {f"on_{where}": lambda _: answer for where in ("batch", "epoch")}
    result = ep.fit(own_network(), quadrant_data(), epochs=2, **{**OPTIONS, "batch_size": 64}, **calls)
    assert [record["epoch"] for record in result.history] == [1, 2]


def test_it_settles_as_the_network_does_and_leaves_it_so(tmp_path):
    """What options say goes first; the network then judges without options as the training did."""
    data, net = quadrant_data(), own_network()
    net.settling = {"steps": 5, "schedule": "evenodd", "relaxation": 0.9}
    for n, (options, free_steps, schedule, relaxation) in enumerate(
        [
            ({}, 5, "evenodd", 0.9),
            ({"free_steps": 3}, 3, "evenodd", 0.9),
            ({"schedule": "sweeps"}, 2, "sweeps", 1.0),
            ({"algorithm": "bp"}, 2, "sweeps", 1.0),
            ({"schedule": "synchronous", "free_steps": 4, "algorithm": "bptt"}, 4, "synchronous", 1.0),
            ({"free_steps": 50, "tolerance": 0.01}, 50, "synchronous", 1.0),
        ]
    ):
        result = ep.fit(net, data, run_dir=tmp_path / f"{n}", epochs=1, batch_size=16, quiet=True, **options)
        more = {"bp": {"feedforward": True}, "bptt": {"unrolled_steps": 20}}.get(options.get("algorithm"), {})
        more |= {"tolerance": options["tolerance"]} if "tolerance" in options else {}
        assert net.settling == {"steps": free_steps, "schedule": schedule, "relaxation": relaxation, **more}
        batch = next(iter(ep.Loader(data, "test", 20, net.device, net.dtype)))
        assert (net.predict(batch) == data.test.labels).mean() == result.summary.test_accuracy
        if "algorithm" not in options:
            lines = (tmp_path / f"{n}" / "config.toml").read_text().splitlines()
            said = f"free_steps = {free_steps}", f'schedule = "{schedule}"', f"relaxation = {relaxation}"
            assert set(said) <= set(lines)
            assert result.best.settling == net.settling


def test_steps_that_have_been_found_are_those_of_the_network():
    """As recorded: of the last epoch, and of the best one; they take the place of a tolerance."""
    data, net = quadrant_data(), own_network(feedback=1.0)
    net.settling = {"steps": 50, "tolerance": 0.01}
    found = ep.fit(net, data, epochs=3, batch_size=16, quiet=True, free_steps="auto", learning_rate=0.02)
    steps = [record["free_steps"] for record in found.history]
    assert len(set(steps)) > 1, "else this says nothing"
    assert net.settling == {"steps": steps[-1], "schedule": "sweeps", "relaxation": 1.0}
    assert found.best.settling == net.settling | {"steps": steps[found.summary.best_epoch - 1]}


def test_without_a_folder_nothing_is_written_and_the_best_epoch_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, weights = quadrant_data(), {}
    net = own_network()

    def after(record):
        weights[record["epoch"]] = net.parameters()["layers.2.weight"].copy()

    result = ep.fit(net, data, on_epoch=after, epochs=3, learning_rate=0.02, **OPTIONS)
    np.testing.assert_array_equal(result.network.parameters()["layers.2.weight"], weights[3])
    best = weights[result.summary.best_epoch]
    np.testing.assert_array_equal(result.best.parameters()["layers.2.weight"], best)
    assert list(tmp_path.iterdir()) == []
    nothing = ep.fit(own_network(), data, on_batch=lambda _: True, epochs=1, **OPTIONS)
    assert (nothing.best, nothing.summary, nothing.history) == (None, None, [])
    assert repr(nothing) == "FitResult(no epoch finished)"


def test_what_is_refused(tmp_path):
    data, net = quadrant_data(flip=False), own_network()
    cases = {
        "unknown option 'epoch'; did you mean 'epochs'": {"epoch": 1},
        "--epochs must be at least 1": {"epochs": 0},
        "the option width belongs to the network": {"width": 2.0},
        "the option limit_train belongs to the data set": {"limit_train": 2},
        "--momentum needs --optimizer sgd": {"momentum": 0.5},
        "this data set forbids flip": {"flip": True},
        "either signals or the option aug": {"aug": "le", "signals": [Sparsity(layers=[1])]},
        "resume needs run_dir": {"resume": True},
        "on_divergence='halve-lr' needs run_dir": {"on_divergence": "halve-lr"},
        "checkpoint_minutes needs run_dir": {"checkpoint_minutes": 10},
    }
    for message, options in cases.items():
        with pytest.raises(ConfigurationError, match=message):
            ep.fit(net, data, quiet=True, **options)
    with pytest.raises(ConfigurationError, match="data must be"):
        ep.fit(net, (data.train.images, data.train.labels, data.test.images))
    (tmp_path / "other").write_text("")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        ep.fit(net, data, run_dir=tmp_path, **OPTIONS)


def test_a_folder_without_a_run_is_no_run_to_go_on_with(tmp_path):
    data = quadrant_data()
    ep.fit(own_network(), data, run_dir=tmp_path, resume=True, epochs=1, **OPTIONS)
    assert "epochs = 1" in (tmp_path / "config.toml").read_text().splitlines()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        ep.fit(own_network(), data, run_dir=tmp_path / "other", resume=True, **OPTIONS)


def test_options_of_a_run_that_goes_on_are_written(quadrants, tmp_path):
    """Those that only the command line has stay: where it finds the images."""
    run({"epochs": 1, "data_dir": str(tmp_path)}, tmp_path / "run").run()
    data = dataclasses.replace(quadrant_data(), name="cifar10")
    ep.fit(built(data), data, run_dir=tmp_path / "run", resume=True, epochs=2, **OPTIONS)
    config = RunDirectory.open(tmp_path / "run").config
    assert (config.epochs, config.data_dir) == (2, str(tmp_path))


def test_other_signals_than_it_began_with_are_refused(tmp_path):
    """Fixed maps are no parameters, and the options of a run say nothing of signals that `fit` is given."""

    def fit(*signals, **more):
        how = {"run_dir": tmp_path, "resume": True, "epochs": 2, "signals": signals}
        return ep.fit(own_network(), data, **how, **OPTIONS, **more)

    data = quadrant_data()
    fit(ep.LocalError([1], kappa=0.2), Sparsity([2], kappa=1e-4), on_epoch=lambda _: True)
    cases = {
        "number of signals: saved 2, this network 0": (),
        "signals 1 kappa: saved 0.2, this network 0.1": (ep.LocalError([1], kappa=0.1), Sparsity([2], kappa=1e-4)),
        "signals 1 seed: saved 0, this network 1": (ep.LocalError([1], kappa=0.2, seed=1), Sparsity([2], kappa=1e-4)),
        "signals 2 layers: saved .2., this network .1.": (ep.LocalError([1], kappa=0.2), Sparsity([1], kappa=1e-4)),
        "signals 1 type: saved LocalError": (Sparsity([1], kappa=0.2), Sparsity([2], kappa=1e-4)),
    }
    for message, signals in cases.items():
        with pytest.raises(CheckpointError, match=f"belongs to a run with other signals: {message}"):
            fit(*signals)
    assert len(fit(ep.LocalError([1], kappa=0.2), Sparsity([2], kappa=1e-4)).history) == 2


def test_the_history_is_that_of_the_file_whatever_a_callback_does_to_its_record(tmp_path):
    """With a tolerance out of reach every epoch has findings, which name layers."""

    def strip(record):
        record["findings"].clear()
        del record["test_accuracy"], record["train_accuracy"]

    result = ep.fit(
        own_network(), quadrant_data(), run_dir=tmp_path, epochs=2, tolerance=1e-9, on_epoch=strip, **OPTIONS
    )
    assert [[finding["signature"] for finding in record["findings"]][:1] for record in result.history] == [
        ["convergence"]
    ] * 2
    assert result.history == RunDirectory(tmp_path, None).metrics()
    assert result.summary.test_accuracy == result.history[-1]["test_accuracy"]


@pytest.mark.parametrize("done", [1, 2], ids=["unfinished", "finished"])
def test_other_epochs_than_before_say_what_they_do_to_the_schedules(done, tmp_path, capsys):
    """From a half cosine over 2 epochs to one over 4, at the beginning of the next epoch."""
    data, how = quadrant_data(), {"run_dir": tmp_path, "resume": True, "learning_rate": 0.01, **OPTIONS}
    ep.fit(own_network(), data, epochs=2, on_epoch=lambda record: record["epoch"] == done, **how)
    assert "stretch" not in capsys.readouterr().err
    ep.fit(own_network(), data, epochs=4, **how)
    before, now = (f"{0.005 * (1 + np.cos(np.pi * done / total)):.3g}" for total in (2, 4))
    text = f"4 epochs in place of 2 stretch the schedules: learning rate {before} -> {now}"
    assert f"Warning: {text}\n" in capsys.readouterr().err


def teacher_of(data, path):
    """Write a teacher that is certain of the labels, and return where it is."""
    with ep.TeacherWriter(path, dataset=data, teacher="labels", views=("identity",)) as writer:
        for name in ("train", "test"):
            writer.write(name, "identity", 0, 9 * np.eye(2, dtype=np.float32)[data.split(name).labels])
    return path


def test_a_network_and_images_of_ones_own_may_have_a_teacher(tmp_path):
    """As the same signal made by hand; none can be trained where nobody could make the network again."""
    data = dataclasses.replace(quadrant_data(flip=False), name="mine")
    path = teacher_of(data, tmp_path / "t.h5")
    how = {"epochs": 2, **OPTIONS}
    made = {"temperature": 2.0}  # else the command line and the class have the same defaults
    one, two = own_network(), own_network()
    ep.fit(one, data, aug="kd", teacher=str(path), signal_layers="1", **made, **how)
    ep.fit(two, data, signals=[ep.Distillation.from_file(path, [1], **made)], **how)
    for name, p in one.parameters().items():
        np.testing.assert_array_equal(p, two.parameters()[name])
    with pytest.raises(ConfigurationError, match="give one for others: teacher="):
        ep.fit(own_network(), data, aug="kd", **how)


def test_a_teacher_of_other_images_is_refused(tmp_path):
    """Its logits are looked up by number: of another data set they would be those of other images."""
    data = quadrant_data(flip=False)
    path = teacher_of(data, tmp_path / "t.h5")
    labels = data.train.labels.copy()
    labels[:2] = 1 - labels[:2]
    other = dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))
    for images, message in {
        dataclasses.replace(data, name="x"): "data set quadrants, not x",
        other: "disagree",
    }.items():
        with pytest.raises(ep.TeacherError, match=message):
            ep.fit(own_network(), images, signals=[ep.Distillation.from_file(path, [1])], epochs=1, **OPTIONS)
