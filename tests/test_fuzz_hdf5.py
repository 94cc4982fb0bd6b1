"""Damaged and hostile HDF5 files, teachers and checkpoints: see `fuzzing` for the contract of reading them."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial

import h5py
import numpy as np
import pytest
from data_files import edited
from fuzzing import amounts, damaged, explore, in_child, refused
from hdf5_edits import apply_edits, hdf5_edits
from quadrants import SILENT, run
from test_teacher import INDEX, VIEW, make_dataset, write_file

from cupyep.data import TeacherFile
from cupyep.errors import CheckpointError, CupyepError, TeacherError
from cupyep.training import runs


@pytest.fixture
def elsewhere(tmp_path):
    """A folder that no link may lead into: with another file, and a pipe that would be waited for."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def teacher(tmp_path, elsewhere):
    write_file(tmp_path / "teacher.h5", make_dataset())
    shutil.copy(tmp_path / "teacher.h5", elsewhere / "other.h5")
    return tmp_path / "teacher.h5"


def use_teacher(path):
    with TeacherFile(path) as file:
        file.check(make_dataset())
        file.accuracy("test")
        file.logits("train", INDEX, VIEW)
        file.logits("test", INDEX % 7, 0)
        for layer in file.feature_layers:
            file.feature(layer, "train", INDEX, VIEW)


@amounts(40, 3000)
def test_damaged_teachers_never_reach_the_hdf5_library(amount, teacher, monkeypatch):
    content = teacher.read_bytes()
    opened = []
    monkeypatch.setattr("cupyep.persistence.hdf5._probe", lambda path: opened.append(path))
    monkeypatch.setattr(h5py, "File", lambda *_: pytest.fail("damage reached HDF5"))

    def prepare(example):
        same = example[512:] == content[512:] or not example.startswith(content[:60])
        teacher.write_bytes(content[:512] + b"damaged" if same else example)

    found = explore(
        damaged(content[:1] + content[1:]), amount, prepare, lambda: TeacherFile(teacher), kind=TeacherError
    )
    assert found == (0, sum(found))


@amounts(30, 3000)
def test_hostile_teachers(amount, teacher, elsewhere, tmp_path):
    content = teacher.read_bytes()

    def prepare(edits):
        teacher.write_bytes(content)
        apply_edits(teacher, edits)

    edits = hdf5_edits(teacher, elsewhere)
    found = explore(edits, amount, prepare, lambda: use_teacher(teacher), folder=tmp_path, kind=TeacherError)
    assert found[1] > amount // 3


@amounts(2, 200)
def test_hostile_teachers_of_other_programs(amount, teacher, elsewhere, tmp_path):
    content = teacher.read_bytes()

    def prepare(edits):
        teacher.write_bytes(content)
        apply_edits(teacher, edits, sealed=False)

    explore(hdf5_edits(teacher, elsewhere), amount, prepare, lambda: use_teacher(teacher), folder=tmp_path)


@amounts(2, 1000)
@pytest.mark.parametrize("libver", ["earliest", "v110"])
def test_damaged_teachers_of_other_programs(amount, teacher, tmp_path, libver, monkeypatch):
    """What survives the other process does so here; the child process is for the case that it does not."""
    monkeypatch.setattr("cupyep.persistence.hdf5.PROBE_SECONDS", 3)
    plain = tmp_path / "plain.h5"
    with h5py.File(teacher) as ours, h5py.File(plain, "w", libver=libver) as theirs:
        for name in ours:
            ours.copy(name, theirs)
        theirs.attrs.update(ours.attrs)

    def read():
        outcome = in_child(lambda: refused(lambda: use_teacher(plain), kind=TeacherError))
        assert outcome == "ok"

    explore(damaged(plain.read_bytes(), head=8000), amount, plain.write_bytes, read)


class Stop(BaseException):
    """Nothing in the package may expect this one."""


@pytest.fixture
def half(quadrants, tmp_path, elsewhere):
    """The folder of a run that was killed in its second epoch, with a checkpoint of that."""
    trainer = run({"aug": "le", "epochs": 2, "checkpoint_minutes": 0, "optimizer": "sgd"}, tmp_path / "half")
    step, calls = trainer.learner.step, []

    def stop(batch):
        calls.append(1)
        if len(calls) == 6:
            raise Stop
        return step(batch)

    trainer.learner.step = stop
    with pytest.raises(Stop):
        trainer.run()
    shutil.copy(tmp_path / "half" / "checkpoint.h5", elsewhere / "other.h5")
    (tmp_path / "half" / "checkpoint.previous.h5").unlink()
    return tmp_path / "half"


@amounts(8, 2000)
def test_hostile_checkpoints(amount, half, elsewhere, tmp_path):
    path = tmp_path / "run"

    def prepare(edits):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(half, path)
        apply_edits(path / "checkpoint.h5", edits)

    def read():
        runs.resume_run(path, {}, display=SILENT).run()

    edits = hdf5_edits(half / "checkpoint.h5", elsewhere)
    found = explore(edits, amount, prepare, read, kind=CupyepError)
    assert found[1] > amount // 3


@amounts(5, 1500)
def test_hostile_checkpoints_evaluated(amount, half, elsewhere):
    path = half / "checkpoint.h5"
    content = path.read_bytes()

    def prepare(edits):
        path.write_bytes(content)
        apply_edits(path, edits)

    edits = hdf5_edits(path, elsewhere)
    explore(
        edits,
        amount,
        prepare,
        lambda: runs.evaluate_run(half, "last", {}, display=SILENT),
        folder=half,
        kind=CheckpointError,
    )


def number(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def replaced(place, value):
    return lambda file: (file.__delitem__(place), file.__setitem__(place, value))


def generators(file, **more):
    states = json.loads(file.attrs["generators"])
    file.attrs["generators"] = json.dumps(states | {"data": states["data"] | more})


HARM = {
    "an infinite epoch": number("epoch", np.inf),
    "an epoch of 2^62": number("epoch", 1 << 62),
    "a list of epochs": number("epoch", np.array([1])),
    "no best accuracy": number("best_accuracy", np.nan),
    "a generator without state": partial(generators, state={}),
    "a generator of another kind": partial(generators, bit_generator="MT19937"),
    "a generator of huge numbers": partial(generators, uinteger=1 << 200),
    "JSON without end": number("network", "[" * 100000),
    "statistics of no image": replaced("statistics/epoch.count", 0),
    "statistics of half a batch": replaced("statistics/epoch.batches", 1.5),
    "statistics of another network": replaced("statistics/epoch.activity", np.ones(7)),
    "statistics that are not finite": replaced("statistics/epoch.free_residual", np.full(4, np.nan)),
    "half a statistic": replaced("statistics/epoch.finite_loss", 0.5),
    "no statistics": lambda file: file.__delitem__("statistics/epoch.gradient_norm"),
    "no losses": lambda file: file.__delitem__("statistics/loss.mean"),
    "a negative number of steps": replaced("optimizer/steps", -1),
    "infinite steps": replaced("optimizer/steps", np.inf),
    "a velocity that is none": replaced("optimizer/velocity.layers.1.bias", np.full(3, np.nan)),
    "parameters too large": replaced("parameters/layers.1.bias", np.full(3, 1e300)),
}


@pytest.mark.parametrize("case", HARM)
def test_checkpoints_that_once_did_harm(case, half):
    """KeyError, OverflowError, StopIteration, a list of 2^62 epochs: one line each."""
    with edited(half / "checkpoint.h5") as file:
        HARM[case](file)
    assert refused(lambda: runs.resume_run(half, {}, display=SILENT).run())
