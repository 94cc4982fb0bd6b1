"""The teacher that ``--aug kd`` trains is stopped, killed, waited for, and found again.

Oracle: the teacher that was trained undisturbed, bit for bit. 2 epochs of 3 batches, 40 + 20 images.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from data_files import assert_one_line, edited
from quadrants import SILENT, TIMES, TINY, Recorder, numbers, quadrant_data, run
from test_survival import Killed, kill

import cupyep as ep
from cupyep.data import cache_directory
from cupyep.errors import CheckpointError, ConfigurationError, Interrupted, TeacherError
from cupyep.files import FolderLock
from cupyep.learning import Backpropagation
from cupyep.training import build, runs, teacher
from cupyep.training.config import make_config
from cupyep.training.teacher import cached_teacher, teacher_path


def student(folder, **more):
    """Return the options of a student whose teacher is kept in `folder` from now on."""
    os.environ["CUPYEP_CACHE"] = str(folder)  # the fixture `cache` puts it back
    return make_config(TINY, {"aug": "kd", "teacher_epochs": 2, **more})


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
            patch.setattr(teacher, "feedforward", signalled(teacher.feedforward, number))
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

    monkeypatch.setattr(teacher.time, "sleep", sleep)
    monkeypatch.setattr(teacher, "train_teacher", lambda *_: pytest.fail("the teacher was trained again"))
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
    monkeypatch.setattr(teacher.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
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
    monkeypatch.setenv("CUPYEP_CACHE", str(tmp_path / "other"))
    assert invoke(*options, "--run-dir", tmp_path / "straight")[0] == 0
    assert "from an earlier run" in invoke(*options, "--run-dir", tmp_path / "again")[1]
    (found, *_), (wanted, *_) = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "straight")
    )
    assert {k: v for k, v in found.items() if k not in TIMES} == {k: v for k, v in wanted.items() if k not in TIMES}


# --- the teacher stays with its run ---------------------------------------------------------------------------------


@pytest.fixture
def begun(quadrants, tmp_path):
    """Options of a student that has done its first epoch of two in tmp_path/run; what an undisturbed one comes to."""
    values = {"aug": "kd", "teacher_epochs": 1, "epochs": 2, "kappa_annealing": "constant", "lr_schedule": "constant"}
    whole = run(values, tmp_path / "straight")
    whole.run()
    run({**values, "epochs": 1}, tmp_path / "run").run()
    return numbers(whole.directory)


def go_on(tmp_path, **given):
    trainer = runs.resume_run(tmp_path / "run", {"epochs": 2, **given}, SILENT)
    trainer.run()
    return numbers(trainer.directory)


def test_a_run_goes_on_with_its_own_teacher_though_cache_and_data_are_gone(begun, tmp_path, monkeypatch):
    """The kept file holds what the cached one does, by the checksum that sha256sum would find."""
    shutil.rmtree(tmp_path / "cache")
    kept = (tmp_path / "run" / "teacher.h5").read_bytes()
    text = (tmp_path / "run" / "teacher.sha256").read_text()
    assert text == f"{hashlib.sha256(kept).hexdigest()}  teacher.h5\n"
    (tmp_path / "nowhere").write_text("no folder")
    monkeypatch.setenv("CUPYEP_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.setattr(teacher, "train_teacher", lambda *_: pytest.fail("the teacher was trained again"))
    assert go_on(tmp_path, data_dir=str(tmp_path / "nowhere")) == begun


def test_a_lost_teacher_is_found_in_the_cache_and_another_one_refused(begun, tmp_path, quadrants):
    own = tmp_path / "run" / "teacher.h5"
    content = own.read_bytes()
    with ep.TeacherWriter(tmp_path / "other.h5", quadrants, "another one") as writer:
        for split, count in (("train", 40), ("test", 20)):
            for view in ("identity", "hflip"):
                writer.write(split, view, 0, np.eye(2)[quadrants.split(split).labels[:count]])
    with pytest.raises(ConfigurationError, match=r"--teacher .*other.h5 is not the one that the run started with"):
        go_on(tmp_path, teacher=str(tmp_path / "other.h5"))
    (cached,) = (tmp_path / "cache" / "teachers").glob("*.h5")
    assert cached.read_bytes() == content
    own.unlink()
    cached.rename(tmp_path / "cached.h5")
    for mine in (None, tmp_path / "other.h5"):
        if mine:
            shutil.copyfile(mine, own)
        with pytest.raises(TeacherError, match=r"the teacher that the run in '.*run' started with is none of .*, .*h5"):
            go_on(tmp_path)
    (tmp_path / "cached.h5").rename(cached)
    assert go_on(tmp_path) == begun
    assert own.read_bytes() == content


def test_a_link_given_as_teacher_is_kept_as_a_file(quadrants, tmp_path, straight):
    (tmp_path / "link.h5").symlink_to(straight)
    run({"aug": "kd", "teacher": str(tmp_path / "link.h5"), "epochs": 1}, tmp_path / "run")
    assert not (tmp_path / "run" / "teacher.h5").is_symlink()
    assert (tmp_path / "run" / "teacher.h5").read_bytes() == straight.read_bytes()


def test_a_given_teacher_is_kept_too_where_there_are_no_links(quadrants, tmp_path, monkeypatch, straight):
    values = {"aug": "kd", "teacher": str(straight), "epochs": 1}
    content = straight.read_bytes()

    def no_link(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_link)
    run(values, tmp_path / "run").run()
    straight.unlink()
    assert (tmp_path / "run" / "teacher.h5").read_bytes() == content
    runs.resume_run(tmp_path / "run", {"epochs": 2}, SILENT, stretch=True).run()
    runs.resume_run(tmp_path / "run", {"epochs": 3, "teacher": str(straight)}, SILENT, stretch=True).run()


def test_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("CUPYEP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for system, place in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr("sys.platform", system)
        assert str(cache_directory()) == f"/home/someone/{place}/cupyep"
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert str(cache_directory()) == "/local/cupyep"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_directory()) == "/xdg/cupyep"
    monkeypatch.setenv("CUPYEP_CACHE", "~/mine")
    assert str(cache_directory()) == "/home/someone/mine"


# --- is it a good one? ----------------------------------------------------------------------------------------------


def teacher_of(path, dataset, shuffled=(), views=("identity", "hflip")):
    """Write a teacher that is right on 90 % of the samples, but in the views `shuffled` in another order."""
    rng = np.random.default_rng(0)
    with ep.TeacherWriter(path, dataset, "nearly right", views=views) as writer:
        for split in ("train", "test"):
            labels = dataset.split(split).labels
            said = np.where(np.arange(len(labels)) % 10 == 3, 1 - labels, labels)
            for view in views:
                order = rng.permutation(len(labels)) if view in shuffled else np.arange(len(labels))
                writer.write(split, view, 0, 3 * np.eye(2)[said[order]])


@pytest.mark.parametrize("shuffled", [(), ("identity", "hflip"), ("hflip",)])
def test_the_accuracy_of_a_teacher_is_shown_and_one_at_chance_is_warned_of(shuffled, tmp_path, monkeypatch):
    """0.9 by construction; 400 logits in another order agree with a label of two by chance, 0.5 within 0.075."""
    dataset, recorder = quadrant_data(400, 20), Recorder()
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)
    teacher_of(tmp_path / "t.h5", dataset, shuffled)
    config = make_config(TINY, {"aug": "kd", "teacher": str(tmp_path / "t.h5")})
    trainer = runs.start_run(config, tmp_path / "run", recorder)
    (warned,) = recorder.texts("warning") or [""]
    assert ("knows no more of the labels than chance" in warned) == bool(shuffled)
    assert (f"view {shuffled[0]}" in warned) if shuffled else not warned
    (shown,) = (text for text in recorder.texts("note") if text.startswith("nearly right: train accuracy "))
    assert (shown == "nearly right: train accuracy 90.00%, test accuracy 90.00%") == ("identity" not in shuffled)
    (signal_,) = trainer.learner.signals
    for view, found in signal_.teacher.measured["train"].items():
        assert found == 0.9 if view not in shuffled else abs(found - 0.5) < 0.075


def test_a_stored_accuracy_that_its_logits_contradict_is_refused(tmp_path):
    dataset = quadrant_data(400, 20)
    teacher_of(tmp_path / "t.h5", dataset)
    with edited(tmp_path / "t.h5") as file:
        file["train/logits"][:] = file["train/logits"][...][:, ::-1]  # labels alternate: each gets its neighbour's
    with (
        ep.TeacherFile(tmp_path / "t.h5") as file,
        pytest.raises(TeacherError, match=r"train accuracy is 90.00%, but its logits have 1\d.00% on its labels") as e,
    ):
        file.check(dataset)
    assert_one_line(e, tmp_path / "t.h5", "another order", "cupyep teacher")
