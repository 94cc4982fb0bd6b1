"""What a run shows: on a terminal, in a log, to a program.

Oracles: the documented events; a terminal and a clock of our own; json.loads.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import warnings

import numpy as np
import pytest
import small
import strict
from quadrants import SILENT, Recorder, fake_trainer, run

from cupyep.errors import DivergenceError, Interrupted
from cupyep.learning.learner import StepResult
from cupyep.training import display, trainer
from cupyep.training.display import DISPLAYS, Display, JsonDisplay, clock
from cupyep.training.divergence import LossWatch
from cupyep.training.statistics import EpochStatistics

TINY = ["--width", "0.06", "--free-steps", "4", "--nudged-steps", "3", "--batch-size", "25", "--device", "cpu"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Make stderr a terminal; in the test itself, because capsys comes in between."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def has_control_characters(text):
    return any(not c.isprintable() and c != "\n" for c in text)


def test_a_bar_on_a_terminal_and_lines_on_stdout(capsys, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(display, "BAR_S", 0.0)
    trainer = fake_trainer()
    trainer.display = Display()
    trainer.run()
    bars = terminal.getvalue()
    assert "epoch 1/3: " in bars
    assert "loss 1.000, acc 0.0%" in bars
    assert "8/8" in bars, "images of the epoch"
    assert "images/s" in bars
    assert bars.endswith("\r"), "a bar leaves an empty line"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert lines[0].startswith("epoch 1/3  train loss 1.0000  acc  0.00%  test loss 2.0000  acc 50.00%  ")
    assert lines[0].endswith(" left")
    assert not lines[2].endswith(" left")
    assert not has_control_characters("".join(lines))


def test_plain_lines_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(display, "LINE_S", 0.0)
    trainer = fake_trainer((0.5,))
    trainer.display = Display()
    trainer.run()
    out, err = capsys.readouterr()
    assert err == ""
    assert not has_control_characters(out)
    lines = out.splitlines()
    assert lines[0].startswith("epoch 1/1   50%  loss 1.000, acc 0.0%  ")
    assert lines[0].endswith(" left")
    assert "images/s" in lines[0]
    assert [line[:15] for line in lines[1:]] == ["epoch 1/1  100%", "epoch 1/1  trai"]


def test_lines_and_bars_name_their_subject_once(capsys, monkeypatch):
    for terminal in (False, True):
        stream = open_terminal(monkeypatch) if terminal else None
        with Display().about("teacher").progress("epoch 1/2", 4) as progress:
            progress.advance(2)
            progress.show("loss 1.000")
        shown = stream.getvalue() if terminal else capsys.readouterr().out
        assert ("teacher, epoch 1/2: " if terminal else "teacher: epoch 1/2   50%  loss 1.000") in shown
        assert shown.count("teacher") == shown.count("epoch 1/2")


def test_short_epochs_need_no_lines_in_between(capsys):
    trainer = fake_trainer()
    trainer.display = Display()
    trainer.run()
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("name", DISPLAYS)
def test_quiet(name, capsys, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(display, "LINE_S", 0.0)
    trainer = fake_trainer()
    trainer.display = DISPLAYS[name](quiet=True)
    trainer.run()
    assert (capsys.readouterr().out, terminal.getvalue()) == ("", "")


def test_the_pace_of_progress(monkeypatch):
    """100 of 400 images were done before; 60 in 30 s leave 240 for 120 s."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    recorder = Recorder()
    with recorder.progress("epoch 2/9", 400, 100, epoch=2) as progress:
        progress.advance(60)
        now[0] += 29.0
        assert not progress.is_due()
        now[0] += 1.0
        assert progress.is_due()
        progress.show("loss 1", loss=1.0)
        assert not progress.is_due()
    ((event, text, values),) = recorder.events
    assert event == "progress"
    assert text == "epoch 2/9   40%  loss 1  2 images/s  02:00 left"
    assert values == {"epoch": 2, "images": 160, "of": 400, "images_per_s": 2.0, "left_s": 120.0, "loss": 1.0}


def test_durations():
    assert [clock(s) for s in (None, 5, 725, 11525)] == ["?", "00:05", "12:05", "3:12:05"]


def test_warnings_go_to_stderr_past_the_bar(capsys, monkeypatch):
    terminal = open_terminal(monkeypatch)
    shown = Display()
    with shown.progress("epoch 1/1", 10) as progress:
        progress.advance(5)
        shown.about("teacher").show("warning", "something is wrong")
        shown.show("note", "a line")
    assert capsys.readouterr().out == "a line\n"
    assert "\rWarning: teacher: something is wrong\n" in terminal.getvalue()


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_output_that_nobody_reads_stops_and_saves_the_run(quadrants, tmp_path, monkeypatch):
    started = run({"epochs": 2, "algorithm": "bp"}, tmp_path / "run")
    started.display = Display()
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    with pytest.raises(Interrupted, match="cannot write the output: Broken pipe") as stop:
        started.run()
    assert stop.value.number == 13
    assert started.directory.load().epoch == 1


def objects(out):
    return [json.loads(line) for line in out.splitlines()]


def test_json_events(capsys):
    shown = JsonDisplay()
    shown.show("note", "text only")
    shown.about("teacher").show("epoch", "for people", epoch=3)
    shown.show("checkpoint", epoch=1)
    first, second, third = objects(capsys.readouterr().out)
    assert first.pop("time").endswith("+00:00")
    assert first == {"event": "note", "text": "text only"}
    assert {k: v for k, v in second.items() if k != "time"} == {"event": "epoch", "subject": "teacher", "epoch": 3}
    assert third["event"] == "checkpoint"


def test_a_run_in_json(cifar, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(display, "LINE_S", 0.0)
    path = tmp_path / "run"
    options = ["--epochs", 2, "--run-dir", path, "--log-format", "json", "--aug", "kd", "--teacher-epochs", 1]
    code, out, err = invoke("train", *TINY, *options)
    assert (code, err) == (0, "")
    found = objects(out)
    own = [o for o in found if "subject" not in o]
    names = [o["event"] for o in own]
    epoch = ["progress", "progress", "epoch"]
    wanted = [*["note"] * 3, "start", "checkpoint", *epoch[:2], "checkpoint", "epoch", *epoch[:2], "checkpoint"]
    assert names == [*wanted, "epoch", "end"]
    assert [o["event"] for o in found if "subject" in o] == [
        *("note", "checkpoint", *epoch[:2], "checkpoint", "epoch", "note", "note")
    ]
    start, end = own[names.index("start")], own[-1]
    assert (start["run_dir"], start["epochs"], start["batches"], start["epoch"]) == (str(path), 2, 2, 0)
    assert start["config"]["width"] == 0.06
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for shown, record in zip((o for o in own if o["event"] == "epoch"), records, strict=True):
        assert {key: shown[key] for key in record} == record
        assert shown["left_s"] >= 0
    assert (end["status"], end["test_accuracy"], end["path"]) == ("done", records[-1]["test_accuracy"], str(path))
    progress = own[names.index("progress")]
    assert {"epoch", "images", "of", "images_per_s", "left_s", "loss", "accuracy", "free_residual"} < set(progress)


def test_what_is_found_before_training_in_json(cifar, invoke, tmp_path):
    """As findings of an epoch, of which it is number 0."""
    wild = ["--feedback", 1, "--free-steps", 1, "--nudged-steps", 1]
    options = ["--epochs", 1, "--run-dir", tmp_path / "run", "--log-format", "json"]
    code, out, _ = invoke("train", *TINY, *wild, *options)
    first = next(o for o in objects(out) if o["event"] == "warning")
    assert (code, first["epoch"], first["signature"]) == (0, 0, "convergence")
    assert first["message"].startswith("the free phase does not settle: after 1 sweep layer")
    assert first["layers"]


@pytest.mark.parametrize(
    ("happens", "status", "code", "message"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), "interrupted", 143, "go on with: cupyep train --run-dir"),
        (lambda: (_ for _ in ()).throw(DivergenceError("the loss is not finite")), "failed", 1, "is not finite"),
    ],
)
def test_the_end_of_a_run_that_fails_in_json(happens, status, code, message, cifar, invoke, tmp_path, monkeypatch):
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: happens() or evaluate(*args))
    options = ["--epochs", 1, "--run-dir", tmp_path / "run", "--log-format", "json"]
    found, out, err = invoke("train", *TINY, *options)
    assert found == code
    end = objects(out)[-1]
    assert (end["event"], end["status"]) == ("end", status)
    assert message in end["message"]
    assert err.count("\n") == 1
    assert err.startswith("Error: ")


def test_warnings_of_python_are_events_once_a_kind(cifar, invoke, monkeypatch):
    judge = trainer.evaluate

    def noisy(*args):
        for number in (1, 2):
            warnings.warn(f"number {number}", UserWarning, stacklevel=2)
        return judge(*args)

    monkeypatch.setattr(trainer, "evaluate", noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        code, out, err = invoke("train", *TINY, "--limit-train", 40, "--epochs", 1, "--log-format", "json")
    assert (code, err) == (0, "")
    (warning,) = [o for o in objects(out) if o["event"] == "warning"]
    assert warning["text"].startswith("number 1")


def test_what_a_checkup_finds_is_an_event(cifar, invoke):
    options = ["--tolerance", "1e-12", "--schedule", "evenodd", "--limit-train", 40, "--epochs", 1]
    code, out, err = invoke("train", *TINY, *options, "--log-format", "json")
    assert (code, err) == (0, "")
    epoch = next(o for o in objects(out) if o["event"] == "epoch")
    shown = [o for o in objects(out) if o["event"] == "warning"]
    assert [{key: o[key] for key in ("signature", "layers", "message")} for o in shown] == epoch["findings"]
    assert shown[0]["signature"] == "convergence"
    assert (shown[0]["epoch"], shown[0]["layers"]) == (1, [1, 2, 3, 4])


def test_an_epoch_without_a_look_reads_the_device_once(quadrants, tmp_path, monkeypatch):
    reads, read = [], EpochStatistics.read
    monkeypatch.setattr(EpochStatistics, "read", lambda self: reads.append(1) or read(self))
    started = run({"epochs": 2, "algorithm": "bp"}, tmp_path / "run")
    assert started.display is SILENT
    started.run()
    assert len(reads) == 2


def test_statistics_do_not_wait_for_the_device():
    device = strict.StrictDevice()
    array = device.asarray
    statistics, watch = EpochStatistics(device, 1, ["layers.1"]), LossWatch(device)

    def result():
        gradients = small.gradients_of({"layers.1.weight": array(np.ones((2, 3)))}, device.xp)
        state = array(np.ones(1, np.float32))
        return StepResult(
            gradients, array(np.float32(2)), array(np.int64(1)), 4, state, state, state, nudge_response=state
        )

    with strict.no_host_reads():
        for _ in range(3):
            one = result()
            statistics.add(one)
            watch.add(one.loss)
    saved, watched = statistics.state_dict(), watch.state_dict()
    again, watch = EpochStatistics(device, 1, ["layers.1"]), LossWatch(device)
    again.load_state_dict(saved)
    watch.load_state_dict(watched)
    with strict.no_host_reads():
        again.add(result())
        watch.add(result().loss)
    watch.check(1)
    assert again.read()["loss"] == statistics.read()["loss"] == 2.0
    assert again.count == 16


def test_quiet_says_the_result_and_nothing_else(invoke, tmp_path):
    options = ("--dataset", "digits", "--image-size", 16, "--limit-train", 40, "--limit-test", 20, "--arch", "vgg5")
    code, out, err = invoke("train", *options, "--width", 0.02, "--aug", "none", "--epochs", 1, "--quiet",
                            "--run-dir", tmp_path / "run")  # fmt: skip
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith("test accuracy ")
