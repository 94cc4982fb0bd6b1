"""Event files. Oracle: the framing of TFRecord files taken apart by hand, and the run's own metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import struct
import sys

import pytest
from quadrants import run
from test_cli import TINY

pytest.importorskip("tensorboardX")

from tensorboardX.proto.event_pb2 import Event

from cupyep.training.tensorboard import EventLog, scalars


def events(folder):
    """Return the events of every file of a folder, in the order of the files."""
    found = []
    for file in sorted(folder.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            found.append(Event.FromString(content[place + 12 : place + 12 + length]))
            place += 12 + length + 4
    return found


def shown(found):
    """Return (tag, step) -> value as a reader does that drops what a later session declares void."""
    values = {}
    for event in found:
        if event.HasField("session_log"):
            values = {key: value for key, value in values.items() if key[1] < event.step}
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
    return values


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_scalars_of_a_record():
    record = {
        "epoch": 2, "train_loss": 0.5, "test_accuracy": 0.25, "validation_loss": None,
        "learning_rate": [0.1, 0.2, 0.3],
        "kappa": None, "halvings": 1, "activity": [0.3, 0.4], "gradient_norm": [1.0, 2.0, 3.0], "nudge_response": None,
        "findings": [{"signature": "collapse"}], "images_per_s": 7,
    }  # fmt: skip
    assert scalars(record) == {
        "loss/train": 0.5, "accuracy/test": 0.25, "learning_rate/1": 0.1, "learning_rate/2": 0.2,
        "learning_rate/3": 0.3, "halvings": 1.0, "activity/1": 0.3, "activity/2": 0.4, "gradient_norm/1": 1.0,
        "gradient_norm/2": 2.0, "gradient_norm/readout": 3.0, "images_per_s": 7.0,
    }  # fmt: skip


def test_a_run_and_its_resumption_are_one_course(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    options = ["--run-dir", path, "--quiet", "--tensorboard"]
    assert invoke("train", *TINY, *options, "--epochs", 1, "--aug", "le")[0] == 0
    assert invoke("train", "--run-dir", path, "--resume", "--epochs", 3, "--stretch-schedule", "--quiet",
                  "--tensorboard")[0] == 0  # fmt: skip
    values = shown(events(path / "tensorboard"))
    assert {step for _, step in values} == {1, 2, 3}
    for record in records(path):
        for name, value in scalars(record).items():
            assert values[name, record["epoch"]] == pytest.approx(value, rel=1e-6), name
    assert ("free_distance/1", 3) in values


def test_what_an_older_file_says_is_void(tmp_path):
    log = EventLog(tmp_path)
    log.write({"epoch": 1, "train_loss": 5.0, "activity": [1.0]})
    log.write({"epoch": 2, "train_loss": 4.0, "activity": [1.0]})
    log.close()
    first = [(file, file.rename(tmp_path / f"0-{file.name}")) for file in list(tmp_path.iterdir())]
    EventLog(tmp_path, [{"epoch": 1, "train_loss": 3.0, "activity": [1.0]}]).close()
    assert len(first) == 1
    assert shown(events(tmp_path)) == {("loss/train", 1): 3.0, ("activity/1", 1): 1.0}


def test_a_run_closes_its_file_however_it_ends(quadrants, tmp_path):
    def fails(result):
        raise ArithmeticError

    for name, on_batch in (("ends", None), ("fails", fails)):
        trainer, closed = run({"epochs": 1}, tmp_path / name), []
        trainer.on_batch, trainer.events = on_batch, EventLog(tmp_path / name / "events")
        close = trainer.events.close
        trainer.events.close = lambda close=close, closed=closed: closed.append(True) or close()
        with contextlib.suppress(ArithmeticError):
            trainer.run()
        assert closed == [True]


def test_without_the_library_one_line_and_no_run(cifar, invoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, out, err = invoke("train", *TINY, "--run-dir", tmp_path / "run", "--tensorboard")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert 'pip install "cupyep[tensorboard]"' in err
    assert not (tmp_path / "run").exists()
