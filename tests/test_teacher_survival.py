"""The teacher that ``--aug kd`` trains is stopped, killed, waited for, and found again.

Oracle: the teacher that was trained undisturbed, bit for bit. 2 epochs of 3 batches, 40 + 20 images.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from quadrants import TIMES, TINY, Recorder
from test_survival import Killed, kill

import cupyep as ep
from cupyep.errors import CheckpointError, Interrupted, TeacherError
from cupyep.files import FolderLock
from cupyep.learning import Backpropagation
from cupyep.training import teacher_cache
from cupyep.training.config import make_config
from cupyep.training.teacher_cache import cached_teacher, teacher_path


def student(folder, **more):
    return make_config(TINY, {"aug": "kd", "teacher_epochs": 2, "data_dir": str(folder), **more})


def train(config, dataset):
    """Return path of the teacher, and what was shown."""
    recorder = Recorder()
    return cached_teacher(config, dataset, "cpu", recorder), recorder


def before_call(patch, number, act, of="step"):
    """Do `act` before call `number` (from 1) of a method of the learner."""
    method, calls = getattr(Backpropagation, of), []

    def call(self, batch):
        calls.append(1)
        if len(calls) == number:
            act()
        return method(self, batch)

    patch.setattr(Backpropagation, of, call)


def logits(path):
    with ep.TeacherFile(path) as file:
        return {
            name: file.logits(name, np.arange(file.count(name)), view) for name in ("train", "test") for view in (0,)
        }


def assert_same_teacher(one, two):
    for name, values in logits(one).items():
        np.testing.assert_array_equal(values, logits(two)[name])


@pytest.fixture
def straight(quadrants, tmp_path):
    return train(student(tmp_path / "straight"), quadrants)[0]


STOPS = [("step", 1), ("step", 3), ("step", 5), ("evaluate", 2), ("evaluate", 3), ("forward", 1)]


@pytest.mark.parametrize(("of", "call"), STOPS)
def test_a_signal_saves_the_teacher_and_it_goes_on(of, call, straight, quadrants, tmp_path, monkeypatch):
    """In training, in testing, and when the logits are written (which alone is done by `forward`)."""
    config, number = student(tmp_path / "stopped"), signal.SIGTERM if call % 2 else signal.SIGINT
    path = teacher_path(config, quadrants)
    with monkeypatch.context() as patch:
        if of == "forward":
            patch.setattr(teacher_cache, "feedforward", signalled(teacher_cache.feedforward, number))
        else:
            before_call(patch, call, partial(signal.raise_signal, number), of)
        with pytest.raises(
            Interrupted, match="^interrupted while the teacher is trained; the same command goes on$"
        ) as e:
            train(config, quadrants)
    assert e.value.number == number
    assert not path.exists()
    assert {p.name for p in path.with_suffix("").iterdir()} <= {"run", ".lock"}
    found, recorder = train(config, quadrants)
    assert found == path
    done = {"step": (call - 1) // 3, "evaluate": (call - 1) // 2, "forward": 2}[of]
    assert any(text.endswith(f"after epoch {done} of 2") for text in recorder.texts("note"))
    assert len(recorder.texts("epoch")) == 2 - done
    assert_same_teacher(path, straight)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def signalled(feedforward, number):
    def make(*args):
        predict = feedforward(*args)

        def call(images):
            signal.raise_signal(number)
            return predict(images)

        return call

    return make


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_killed_teacher_goes_on(minutes, straight, quadrants, tmp_path, monkeypatch):
    config = student(tmp_path / "killed", checkpoint_minutes=minutes)
    with monkeypatch.context() as patch:
        before_call(patch, 5, kill)
        with pytest.raises(Killed):
            train(config, quadrants)
    path, recorder = train(config, quadrants)
    assert path.name == straight.name, "how often it is saved changes nothing in a teacher"
    assert len(recorder.texts("epoch")) == 1
    assert_same_teacher(path, straight)


def test_what_is_killed_at_either_end_goes_on(straight, quadrants, tmp_path, monkeypatch):
    """Before there is a configuration; when the file is written but not in its place."""
    config = student(tmp_path / "killed")
    path = teacher_path(config, quadrants)
    run = path.with_suffix("") / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_bytes(b"")
    (run.parent / f".{path.name}.123.tmp").write_bytes(b"half a file")
    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda old, new: kill() if new == path else replace(old, new))
        with pytest.raises(Killed):
            train(config, quadrants)
    assert not path.exists()
    _, recorder = train(config, quadrants)
    assert recorder.texts("epoch") == []
    assert_same_teacher(path, straight)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_teacher_that_another_process_trains_is_waited_for(straight, quadrants, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    config, pauses = student(tmp_path / "waiting"), []
    path = teacher_path(config, quadrants)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    other = FolderLock(folder)
    assert other.acquire() == ""

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            path.write_bytes(straight.read_bytes())
            other.release()

    monkeypatch.setattr(teacher_cache.time, "sleep", sleep)
    monkeypatch.setattr(teacher_cache, "train_teacher", lambda *_: pytest.fail("the teacher was trained again"))
    found, recorder = train(config, quadrants)
    assert found == path
    assert len(pauses) == 3
    first, second = recorder.texts("note")
    assert first.startswith("waiting for process ")
    assert first.endswith(", which trains the same one")
    assert "from an earlier run" in second


def test_waiting_can_be_interrupted(quadrants, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    config = student(tmp_path / "waiting")
    folder = teacher_path(config, quadrants).with_suffix("")
    folder.mkdir(parents=True)
    other = FolderLock(folder)
    assert other.acquire() == ""
    monkeypatch.setattr(teacher_cache.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="^interrupted$") as stop:
        train(config, quadrants)
    assert stop.value.number == signal.SIGTERM
    other.release()


def test_what_lies_in_the_way_is_said_with_the_remedy(quadrants, tmp_path, monkeypatch):
    config = student(tmp_path / "damaged")
    folder = teacher_path(config, quadrants).with_suffix("")
    with monkeypatch.context() as patch:
        before_call(patch, 2, partial(signal.raise_signal, signal.SIGINT))
        with pytest.raises(Interrupted):
            train(config, quadrants)
    for checkpoint in (folder / "run").glob("checkpoint*.h5"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:700])
    with pytest.raises(
        CheckpointError, match="is not a readable checkpoint .*; remove '.*/run' to train the teacher anew"
    ):
        train(config, quadrants)
    other = student(tmp_path / "file")
    place = teacher_path(other, quadrants).with_suffix("")
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    with pytest.raises(TeacherError, match="cannot keep a teacher in .*: File exists"):
        train(other, quadrants)


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on(number, wanted, cifar, invoke, tmp_path, monkeypatch):
    options = ["--width", 0.02, "--free-steps", 4, "--nudged-steps", 3, "--batch-size", 25, "--device", "cpu"]
    options = ["train", *options, "--aug", "kd", "--teacher-epochs", 2, "--epochs", 1]
    with monkeypatch.context() as patch:
        before_call(patch, 3, partial(signal.raise_signal, number))
        code, _, err = invoke(*options, "--run-dir", tmp_path / "run")
    assert (code, err) == (wanted, "Error: interrupted while the teacher is trained; the same command goes on\n")
    assert not (tmp_path / "run").exists()
    code, out, err = invoke(*options, "--run-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "after epoch 1 of 2" in out
    shutil.copytree(cifar, tmp_path / "other", ignore=shutil.ignore_patterns("teachers"))
    assert invoke(*options, "--run-dir", tmp_path / "straight", "--data-dir", tmp_path / "other")[0] == 0
    assert "from an earlier run" in invoke(*options, "--run-dir", tmp_path / "again")[1]
    (found, *_), (wanted, *_) = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "straight")
    )
    assert {k: v for k, v in found.items() if k not in TIMES} == {k: v for k, v in wanted.items() if k not in TIMES}
