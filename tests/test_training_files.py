"""Checkpoint and run directory: what a run writes, what it refuses to read.

Oracles: HDF5 as h5py reads it, damage done by hand.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from data_files import edited

import cupyep as ep
from cupyep.errors import CheckpointError
from cupyep.persistence.checkpoint import Checkpoint, load_checkpoint, restore_parameters, save_checkpoint
from cupyep.training.config import TrainConfig
from cupyep.training.run_directory import RunDirectory, check_free, claim_path, default_path

# --- checkpoint ----------------------------------------------------------------------------------------------------


def make_checkpoint(epoch=3):
    rng = np.random.default_rng(epoch)
    return Checkpoint(
        parameters={"layers.1.weight": rng.standard_normal((2, 3)).astype(np.float32), "layers.1.bias": np.zeros(3)},
        optimizer={"steps": np.asarray(7), "velocity.layers.1.weight": rng.standard_normal((2, 3))},
        network={"arch": "vgg5", "input_shape": [16, 16, 3], "gain": None},
        epoch=epoch,
        batch=0,
        best_accuracy=0.1 + 0.2,
        best_epoch=2,
        elapsed_s=17.25,
        epoch_s=0.5,
        halvings=1,
        statistics={"epoch.loss": np.float32(0.7), "epoch.correct": np.asarray(12), "epoch.activity": np.ones(4)},
        config={"arch": "vgg5", "learning_rate": [0.1, 1e-5], "teacher": None},
        generators={"data": rng.bit_generator.state},
    )


def test_checkpoint_round_trip_is_exact(tmp_path):
    path, saved = tmp_path / "c.h5", make_checkpoint()
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    for group in ("parameters", "optimizer", "statistics"):
        old, new = getattr(saved, group), getattr(loaded, group)
        assert set(old) == set(new)
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
            assert old[name].dtype == new[name].dtype
    for spec in dataclasses.fields(saved):
        if spec.name not in ("parameters", "optimizer", "statistics"):
            assert getattr(loaded, spec.name) == getattr(saved, spec.name)
    assert set(loaded.versions) == {"cupyep", "python", "numpy", "h5py"}
    again = np.random.default_rng(0)
    again.bit_generator.state = loaded.generators["data"]
    reference = np.random.default_rng(3)
    reference.standard_normal((2, 3))
    reference.standard_normal((2, 3))
    np.testing.assert_array_equal(again.random(5), reference.random(5))
    with h5py.File(path) as file:
        assert (file.attrs["format"], file.attrs["version"]) == ("cupyep-checkpoint", 2)


def damage_version(file):
    file.attrs["version"] = 99


def damage_format(file):
    file.attrs["format"] = "cupyep-teacher"


def damage_attribute(file):
    del file.attrs["epoch"]


def damage_json(file):
    file.attrs["generators"] = "{"


def damage_group(file):
    del file["optimizer"]


def damage_link(file):
    file["parameters/layers.2.weight"] = h5py.ExternalLink("other.h5", "/x")


def damage_text(file):
    file.attrs["config"] = "[1]"


def damage_position(file):
    file.attrs["batch"] = -1


def damage_kind(file):
    file["parameters/layers.2.weight"] = "text"


def damage_nan(file):
    file["parameters/layers.1.bias"][1] = math.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_version, "version 99; this cupyep reads version 2"),
        (damage_format, "not a cupyep checkpoint"),
        (damage_attribute, "truncated or damaged"),
        (damage_json, "truncated or damaged"),
        (damage_group, "truncated or damaged"),
        (damage_link, "truncated or damaged"),
        (damage_text, "'config' is not an object"),
        (damage_position, "truncated or damaged.: batch is -1"),
        (damage_kind, "is not an array of numbers"),
        (damage_nan, "'layers.1.bias' holds numbers that are not finite"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, message):
    path = tmp_path / "c.h5"
    save_checkpoint(path, make_checkpoint())
    with edited(path) as file:
        damage(file)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.h5"
    save_checkpoint(path, make_checkpoint())
    content = path.read_bytes()
    for size in (0, 10, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "gone.h5")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.h5"
    save_checkpoint(path, make_checkpoint(1))
    broken = make_checkpoint(2)
    broken.optimizer["velocity.layers.1.weight"] = np.array([object()])
    with pytest.raises(TypeError):
        save_checkpoint(path, broken)
    assert load_checkpoint(path).epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]
    with pytest.raises(CheckpointError, match="cannot write checkpoint '.*folder.h5': No such file or directory"):
        save_checkpoint(tmp_path / "no" / "folder.h5", make_checkpoint(2))


def test_parameters_are_restored_in_place_or_not_at_all():
    device = ep.get_device("cpu")
    own = {"a": np.zeros(2, np.float32), "b": np.zeros((1, 2), np.float32)}
    arrays = dict(own)
    restore_parameters("c.h5", {"a": np.array([1.0, 2.0]), "b": np.array([[3.0, 4.0]])}, own, device)
    assert own["a"] is arrays["a"]
    np.testing.assert_array_equal(arrays["b"], [[3.0, 4.0]])
    wrong = [
        ({"a": np.ones(2)}, "lacks the parameter 'b'"),
        ({"a": np.ones(2), "b": np.ones(2)}, r"'b' has shape \(2,\), the network needs \(1, 2\)"),
        ({"a": np.ones(2), "b": np.ones((1, 2)), "aa": np.ones(1)}, "'aa' is no parameter here"),
    ]
    for saved, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            restore_parameters("c.h5", saved, own, device)
    np.testing.assert_array_equal(own["a"], [1.0, 2.0])


# --- run directory -------------------------------------------------------------------------------------------------


def record(epoch, **more):
    return {"epoch": epoch, "elapsed_s": 10.0 * epoch, **more}


def accept(path, checkpoint):
    """Every checkpoint belongs to the run."""


def test_run_directory_round_trip(tmp_path):
    created = RunDirectory.create(tmp_path / "a" / "run", TrainConfig(beta=0.3, limit_train=5))
    assert RunDirectory.open(created.path).config == created.config
    created.commit(record(1), make_checkpoint(1), True)
    created.commit(record(2), make_checkpoint(2), False)
    assert [r["epoch"] for r in created.metrics()] == [1, 2]
    assert (created.load("last").epoch, created.load("best").epoch) == (2, 1)
    assert created.load("previous").epoch == 1
    assert sorted(p.name for p in created.path.iterdir()) == [
        ".lock",
        "best.h5",
        "checkpoint.h5",
        "checkpoint.previous.h5",
        "config.toml",
        "metrics.jsonl",
    ]


def test_a_taken_folder_is_refused(tmp_path):
    RunDirectory.create(tmp_path / "run", TrainConfig())
    with pytest.raises(CheckpointError, match="holds another run; resume that or choose another"):
        RunDirectory.create(tmp_path / "run", TrainConfig())
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoint.h5").touch()
    with pytest.raises(CheckpointError, match="holds a checkpoint.h5 without its config.toml; bring that back"):
        check_free(tmp_path / "half")
    (tmp_path / "other").mkdir()
    assert check_free(tmp_path / "other") == tmp_path / "other"
    (tmp_path / "other" / "thesis.txt").touch()
    for path in (tmp_path / "other", tmp_path / "other" / "thesis.txt"):
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            check_free(path)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        RunDirectory.open(tmp_path / "other")


def test_default_folders_are_numbered(tmp_path):
    settings = TrainConfig(arch="vgg7", aug="le", dataset="mnist", seed=4)
    names = []
    for _ in range(3):
        path = default_path(settings, tmp_path)
        path.mkdir()
        names.append(path.name)
    assert names == ["vgg7-le-mnist-seed4", "vgg7-le-mnist-seed4-2", "vgg7-le-mnist-seed4-3"]


def test_rewinding_drops_what_the_checkpoint_has_not_done(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    path = directory.path / "checkpoint.h5"
    assert directory.rewind(accept) == (path, None, "")
    for epoch in (1, 2):
        directory.commit(record(epoch), make_checkpoint(epoch), False)
    metrics = directory.path / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write(json.dumps(record(3)) + "\n" + '{"epoch": 4, "elap')
    found, saved, problem = directory.rewind(accept)
    assert (found, saved.epoch, problem) == (path, 2, "")
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_damaged_metrics_are_refused(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    directory.commit(record(1), make_checkpoint(1), False)
    metrics = directory.path / "metrics.jsonl"
    metrics.write_text("nonsense\n" + json.dumps(record(1)) + "\n")
    with pytest.raises(CheckpointError, match="metrics.jsonl' line 1 is not a record"):
        directory.rewind(accept)
    metrics.write_text("")
    with pytest.raises(CheckpointError, match="does not hold the epochs 1 to 1"):
        directory.rewind(accept)
    metrics.write_text(json.dumps(record(1)) + "\n")
    (directory.path / "checkpoint.h5").unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint.h5 to go on from, though epochs have been done"):
        directory.rewind(accept)
    assert metrics.read_text() == json.dumps(record(1)) + "\n"


def test_the_previous_checkpoint_is_the_last_one_between_epochs(tmp_path):
    """Saves in the middle of an epoch replace each other, and what stood at the beginning of the epoch stays."""
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    path = directory.path
    saves = [(0, 0), (0, 3), (0, 5), (1, 0), (1, 2), (1, 4), (2, 0), (3, 0)]
    kept = [None, (0, 0), (0, 0), (0, 0), (1, 0), (1, 0), (1, 0), (2, 0)]
    for (epoch, batch), previous in zip(saves, kept, strict=True):
        directory.save(dataclasses.replace(make_checkpoint(epoch), batch=batch))
        last = directory.load("last")
        assert (last.epoch, last.batch) == (epoch, batch)
        if previous is None:
            assert not (path / "checkpoint.previous.h5").exists()
        else:
            there = directory.load("previous")
            assert (there.epoch, there.batch) == previous
        start = directory.epoch_start()[1]
        assert (start.epoch, start.batch) == (epoch, 0)


def two_epochs(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    for epoch in (1, 2):
        directory.commit(record(epoch), make_checkpoint(epoch), False)
    return directory


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "missing"])
def test_the_previous_checkpoint_takes_over(damage, tmp_path):
    directory = two_epochs(tmp_path)
    path = directory.path / "checkpoint.h5"
    content = {"cut": path.read_bytes()[:1000], "empty": b"", "foreign": path.read_bytes(), "missing": b""}[damage]
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()

    def check(path, checkpoint):
        if checkpoint.epoch == 2:
            raise CheckpointError(f"checkpoint '{path}' belongs to another run")

    found, saved, problem = directory.rewind(check)
    assert (found.name, saved.epoch) == ("checkpoint.previous.h5", 1)
    words = {"foreign": "another run", "missing": "no checkpoint at"}.get(damage, "truncated or damaged")
    assert words in problem
    assert "checkpoint.h5" in problem
    assert [r["epoch"] for r in directory.metrics()] == [1]
    directory.save(make_checkpoint(2))
    assert directory.load("previous").epoch == 1, "what is damaged does not replace what is whole"


def test_if_no_checkpoint_is_whole_the_last_one_is_reported_and_nothing_changed(tmp_path):
    directory = two_epochs(tmp_path)
    for name in ("checkpoint.h5", "checkpoint.previous.h5"):
        (directory.path / name).write_bytes(b"")
    (directory.path / ".best.h5.17.tmp").touch()
    before = {p.name: p.read_bytes() for p in directory.path.iterdir()}
    with pytest.raises(CheckpointError, match="run/checkpoint.h5' is not a readable checkpoint"):
        directory.rewind(accept)
    assert {p.name: p.read_bytes() for p in directory.path.iterdir()} == before


def test_rewinding_removes_what_killed_saves_left(tmp_path):
    directory = two_epochs(tmp_path)
    before = {p.name for p in directory.path.iterdir()}
    for name in ("checkpoint.h5", "checkpoint.previous.h5", "metrics.jsonl"):
        (directory.path / f".{name}.123.tmp").touch()
    directory.rewind(accept)
    assert {p.name for p in directory.path.iterdir()} == before


def test_a_folder_that_was_left_by_a_killed_start_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.toml.7.tmp"):
        (tmp_path / "run" / name).touch()
    assert RunDirectory.create(tmp_path / "run", TrainConfig()).metrics() == []


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    other = RunDirectory.open(directory.path)
    with (
        directory.locked(),
        pytest.raises(CheckpointError, match=rf"run' is in use by process {os.getpid()}; wait for it or choose"),
    ):
        other.lock()
    with other.locked():
        pass


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    """Looking first and making then, several find the same number free."""
    settings, count = TrainConfig(arch="vgg5", aug="none"), 16
    barrier = threading.Barrier(count)

    def start(_):
        barrier.wait()
        return claim_path(settings, tmp_path)

    with ThreadPoolExecutor(count) as pool:
        paths = list(pool.map(start, range(count)))
    base = default_path(settings, tmp_path / "other").name
    assert sorted(path.name for path in paths) == sorted([base, *(f"{base}-{n}" for n in range(2, count + 1))])


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_named_twice_at_once_goes_to_one(tmp_path, monkeypatch, locks):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    barrier = threading.Barrier(8)

    def start(_):
        barrier.wait()
        try:
            return RunDirectory.create(tmp_path / "run", TrainConfig())
        except CheckpointError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(start, range(8)))
    assert sum(isinstance(made, RunDirectory) for made in found) == 1
    # Whoever asks before the holder has written its name reads of "another process".
    for text in (made for made in found if isinstance(made, str)):
        assert any(words in text for words in ("is in use by", "holds another run", "is not an empty folder"))


def test_hdf5_itself_locks_nothing(tmp_path, monkeypatch):
    """Where there are no locks, or others hold one, it would not open what was saved."""
    asked = []
    opened = h5py.File

    def file(*args, **how):
        asked.append(how.get("locking"))
        return opened(*args, **how)

    monkeypatch.setattr(h5py, "File", file)
    save_checkpoint(tmp_path / "x.h5", make_checkpoint(1))
    load_checkpoint(tmp_path / "x.h5")
    assert asked == [False, False]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EAGAIN, "another program has locked it"), (errno.ENOLCK, "HDF5_USE_FILE_LOCKING=FALSE"),
     (errno.EACCES, "no permission"), (None, "truncated or damaged")],
)  # fmt: skip
def test_a_file_that_is_locked_is_not_called_damaged(tmp_path, monkeypatch, number, words):
    save_checkpoint(tmp_path / "x.h5", make_checkpoint(1))

    def refuse(*_, **__):
        raise OSError(number, "unable to lock file") if number else OSError("bad signature")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(CheckpointError, match=words) as error:
        load_checkpoint(tmp_path / "x.h5")
    assert ("damaged" in str(error.value)) is (number is None)
