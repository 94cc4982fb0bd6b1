"""Runs that are stopped, killed or out of disk space go on as if nothing had happened.

Oracle: the straight run, bit for bit.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from quadrants import SILENT, Recorder, assert_same_state, numbers, run
from strict import StrictDevice

from cupyep import files
from cupyep.errors import CheckpointError, Interrupted
from cupyep.persistence.checkpoint import Checkpoint
from cupyep.training import runs, trainer
from cupyep.training.config import TrainConfig
from cupyep.training.interruption import Interruptions
from cupyep.training.run_directory import CHECKPOINT_FILES, RunDirectory
from cupyep.training.snapshot import check_same_run, kept_filters, saved_filters

RESUMED = {
    "ep with local error": {"aug": "le", "scheme": "random", "lr_schedule": "cosine", "nesterov": True},
    "ep with learned distillation": {"aug": "kd", "learned_maps": True, "teacher_epochs": 1, "nudge": "classical"},
    "adam, bptt": {"algorithm": "bptt", "optimizer": "adam", "learning_rate": 1e-3, "lr_schedule": "step"},
    "layer-wise rates, bp": {"algorithm": "bp", "learning_rate": [0.1, 0.05, 0.04, 0.03, 0.02], "weight_decay": 1e-3},
    "adamw": {"optimizer": "adamw", "warmup": 1.5, "label_smoothing": 0.1, "clip_unit_norm": 0.02, "aug": "le"},
    "average, cutout": {"ema": 0.9, "cutout": 5, "optimizer": "sgd", "learning_rate": 0.05},
}
QUICK = {"algorithm": "bp", "epochs": 2}


def resume(path):
    return runs.resume_run(path, {}, display=SILENT)


def assert_same_run(one, two):
    assert numbers(one) == numbers(two)
    for which in ("last", "previous", "best"):
        assert_same_state(one.load(which), two.load(which))


def before_call(trainer, number, act, of="step"):
    """Do `act` before call `number` (from 1) of a method of the trainer's learner."""
    method, calls = getattr(trainer.learner, of), []

    def call(batch):
        calls.append(1)
        if len(calls) == number:
            act()
        return method(batch)

    setattr(trainer.learner, of, call)


class Killed(BaseException):
    """Nothing in the package may expect this one."""


def kill():
    raise Killed


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_ends_like_a_straight_one_bit_for_bit(case, quadrants, tmp_path):
    """Killed in the second epoch of three, with a checkpoint after every batch and only after epochs."""
    values = {**RESUMED[case], "epochs": 3, "data_dir": str(tmp_path / "data")}
    straight = run(values, tmp_path / "straight")
    straight.run()
    for minutes, batches in ((0, 1), (10, 0)):
        broken = run({**values, "checkpoint_minutes": minutes}, tmp_path / f"broken{minutes}")
        before_call(broken, 5, kill)
        with pytest.raises(Killed):
            broken.run()
        resumed = resume(broken.directory.path)
        assert (resumed.epochs_done, resumed.batches_done) == (1, batches)
        resumed.run()
        assert_same_run(resumed.directory, straight.directory)


def test_kept_filters_are_evenly_spaced_and_few():
    """Epoch by epoch, each by its number alone: 8 at most, 5 at least from the fourth epoch on, from 0 on, evenly."""
    filters = {}
    for epoch in range(200):
        filters = kept_filters(filters, epoch, np.full((1, 1, 1, 1), epoch))
        assert {at: int(weight.item()) for at, weight in filters.items()} == {at: at for at in filters}
        assert min(epoch + 1, 5 if epoch < 8 else 4) <= len(filters) <= 8
        assert len({b - a for a, b in itertools.pairwise(filters)}) <= 1
        assert min(filters) == 0
    assert list(kept_filters(filters, 100, filters[0])) == [0, 32, 64, 96], "what a run that went back does again goes"
    assert kept_filters(filters, 5, None) == {}


def test_a_run_keeps_its_filters(quadrants, tmp_path):
    """The weights that multiply after each epoch, of the running average where there is one."""
    for name, options in (("plain", {}), ("average", {"ema": 0.9})):
        trainer, seen = run({**QUICK, "epochs": 3, **options}, tmp_path / name), []
        before = trainer.learner.parameters()["layers.1.weight"].copy()

        def keep(record, trainer=trainer, seen=seen):
            with trainer.optimizer.averaged():
                seen.append(trainer.learner.parameters()["layers.1.weight"].copy())

        trainer.on_epoch = keep
        trainer.run()
        kept = saved_filters(trainer.directory.load())
        assert list(kept) == [0, 1, 2, 3]
        for weight, expected in zip(kept.values(), [before, *seen], strict=True):
            np.testing.assert_array_equal(weight, expected)
        assert list(saved_filters(trainer.directory.load("previous"))) == [0, 1, 2]


@pytest.mark.parametrize("broken", [{"x": (1, 1, 1, 2)}, {"0": (3, 4)}, {"0": (1, 1, 1, 2), "1": (1, 1, 1, 3)}])
def test_damaged_filters_are_a_damaged_checkpoint(broken, quadrants, tmp_path):
    trainer = run(QUICK, tmp_path / "run")
    trainer.run()
    path = trainer.directory.path / "checkpoint.h5"
    saved = trainer.directory.load()
    saved.statistics |= {f"filters.{epoch}": np.zeros(shape) for epoch, shape in broken.items()}
    with pytest.raises(CheckpointError, match="is damaged: "):
        check_same_run(trainer, path, saved)


def test_a_signal_ends_the_batch_and_saves(quadrants, tmp_path):
    """In training and in testing: 2 epochs of 3 + 2 batches."""
    straight = run(QUICK, tmp_path / "straight")
    straight.run()
    places = [("step", 1), ("step", 3), ("step", 5), ("evaluate", 2), ("evaluate", 3)]
    for of, call in places:
        number = signal.SIGTERM if call % 2 else signal.SIGINT
        broken = run(QUICK, tmp_path / f"{of}{call}")
        before_call(broken, call, partial(signal.raise_signal, number), of)
        with pytest.raises(Interrupted, match="^interrupted$") as stop:
            broken.run()
        assert stop.value.number == number
        saved = broken.directory.load()
        epoch, batch = divmod(call, 3) if of == "step" else ((call - 1) // 2, 3)
        wanted = (epoch - 1, 3) if of == "step" and batch == 0 else (epoch, batch)
        assert (saved.epoch, saved.batch) == wanted, "the batch is finished, and no other is begun"
        resumed = resume(broken.directory.path)
        resumed.run()
        assert_same_run(resumed.directory, straight.directory)


def test_a_run_that_is_stopped_after_every_batch(quadrants, tmp_path):
    values = {"aug": "le", "epochs": 2, "scheme": "random"}
    straight = run(values, tmp_path / "straight")
    straight.run()
    trainer, stops = run(values, tmp_path / "stopped"), 0
    while True:
        before_call(trainer, 1, lambda: signal.raise_signal(signal.SIGTERM))
        try:
            trainer.run()
            break
        except Interrupted:
            stops += 1
            trainer = resume(trainer.directory.path)
    assert stops == 6
    assert_same_run(trainer.directory, straight.directory)


def test_handlers_come_back_and_what_is_ignored_stays_ignored():
    before = signal.getsignal(signal.SIGINT)
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interruptions() as interruptions:
            signal.raise_signal(signal.SIGTERM)
            interruptions.check()
            signal.raise_signal(signal.SIGINT)
            assert interruptions.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)


def test_another_thread_handles_no_signals():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body():
        with Interruptions():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(number):
    code = (
        "import signal; from cupyep.training.interruption import Interruptions\n"
        f"with Interruptions():\n signal.raise_signal({number})\n print('once', flush=True)\n"
        f" signal.raise_signal({number})\nprint('twice')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "once\n", "")


def test_a_run_without_any_checkpoint_resumes_from_the_start(quadrants, tmp_path):
    straight = run(QUICK, tmp_path / "straight")
    straight.run()
    run(QUICK, tmp_path / "killed")  # prepared, and never begun
    resumed = resume(tmp_path / "killed")
    resumed.run()
    assert_same_run(resumed.directory, straight.directory)


def test_a_run_on_another_device_goes_on_like_one_on_the_cpu(quadrants, tmp_path, monkeypatch):
    """Nothing that is saved or restored mixes host and device arrays."""
    values = {"aug": "le", "epochs": 2, "checkpoint_minutes": 0}
    straight = run(values, tmp_path / "straight")
    straight.run()
    monkeypatch.setattr(runs, "get_device", lambda *_: StrictDevice())
    broken = run(values, tmp_path / "broken")
    before_call(broken, 5, kill)
    with pytest.raises(Killed):
        broken.run()
    resumed = resume(broken.directory.path)
    resumed.run()
    assert_same_run(resumed.directory, straight.directory)


@pytest.mark.parametrize("size", [0, 2000])
def test_a_damaged_checkpoint_costs_one_epoch_at_most(size, quadrants, tmp_path):
    straight = run({**QUICK, "epochs": 3}, tmp_path / "straight")
    straight.run()
    broken = run({**QUICK, "epochs": 3, "checkpoint_minutes": 0}, tmp_path / "broken")
    before_call(broken, 6, kill)
    with pytest.raises(Killed):
        broken.run()
    path = broken.directory.path
    os.truncate(path / "checkpoint.h5", size)
    recorder = Recorder()
    resumed = runs.resume_run(path, {}, display=recorder)
    assert (resumed.epochs_done, resumed.batches_done) == (1, 0)
    (warning,) = recorder.texts("warning")
    assert warning.startswith(f"'{path / 'checkpoint.h5'}' is not a readable checkpoint (truncated or damaged)")
    assert warning.endswith("; going on from checkpoint.previous.h5")
    assert recorder.texts("start") == [f"resuming {path} after epoch 1 of 3"]
    resumed.run()
    assert_same_run(resumed.directory, straight.directory)


def test_other_versions_are_named(quadrants, tmp_path, monkeypatch):
    started = run(QUICK, tmp_path / "run")
    before_call(started, 5, kill)
    with pytest.raises(Killed):
        started.run()
    saved = started.directory.load()
    monkeypatch.setattr(trainer, "versions", lambda: {**saved.versions, "numpy": "9.9"})
    recorder = Recorder()
    runs.resume_run(tmp_path / "run", {}, display=recorder).directory.unlock()
    assert recorder.texts("warning") == [
        f"the run began with other versions (numpy {np.__version__} -> 9.9); numbers may differ in their last digits"
    ]


def test_a_run_that_goes_on_is_locked(quadrants, tmp_path):
    pytest.importorskip("fcntl")
    trainer, refusals = run(QUICK, tmp_path / "run"), []

    def intrude():
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}") as refusal:
            resume(tmp_path / "run")
        refusals.append(str(refusal.value))

    before_call(trainer, 2, intrude)
    trainer.run()
    assert len(refusals) == 1
    assert "\n" not in refusals[0]
    with pytest.raises(CheckpointError, match="holds another run"):
        RunDirectory.create(tmp_path / "run", trainer.directory.config)


# --- full disks ----------------------------------------------------------------------------------------------------


def load_all(directory):
    """Return last checkpoint and records of a run directory, or raise if anything in it is not whole."""
    present = [which for which, name in CHECKPOINT_FILES.items() if (directory.path / name).exists()]
    found = {which: directory.load(which) for which in present}
    return found.get("last"), directory.metrics()


class FullDisk:
    """From flush number `first` (of 1, 2, ...) on there is no space left."""

    def __init__(self, monkeypatch, first):
        self.first, self.flushes, self.fsync = first, 0, os.fsync
        monkeypatch.setattr(files.os, "fsync", self)

    def __call__(self, handle):
        self.flushes += 1
        if self.flushes >= self.first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.fsync(handle)


def until_the_disk_is_full(monkeypatch, first, work):
    """Return what `work` raises when the disk is full from flush `first` on; None if it needs fewer flushes."""
    with monkeypatch.context() as patch:
        FullDisk(patch, first)
        try:
            work()
        except CheckpointError as error:
            return str(error)
    return None


def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch):
    """Everything that is there is whole, and the last checkpoint is followed by its epoch's record."""
    first = 0
    while True:
        first += 1
        path = tmp_path / f"full{first}"

        def work(path=path):
            directory = RunDirectory.create(path, TrainConfig())
            for epoch in range(3):
                directory.save(Checkpoint({}, {}, {}, epoch=epoch, batch=2))
                directory.commit({"epoch": epoch + 1}, Checkpoint({}, {}, {}, epoch=epoch + 1), is_best=epoch != 1)

        message = until_the_disk_is_full(monkeypatch, first, work)
        if message is None:
            break
        assert message.endswith("No space left on device")
        assert "\n" not in message
        assert not [p for p in path.iterdir() if p.name.endswith(".tmp")]
        if (path / "config.toml").exists():
            last, records = load_all(RunDirectory.open(path))
            done = last.epoch if last else 0
            assert [record["epoch"] for record in records][:done] == list(range(1, done + 1))
            assert len(records) <= done + 1
    assert first > 30


@pytest.mark.slow
def test_a_run_that_meets_a_full_disk_at_any_write_goes_on(quadrants, tmp_path, monkeypatch):
    values = {**QUICK, "checkpoint_minutes": 0}
    straight = run(values, tmp_path / "straight")
    straight.run()
    first = 0
    while True:
        first += 1
        path = tmp_path / f"full{first}"
        if until_the_disk_is_full(monkeypatch, first, lambda path=path: run(values, path).run()) is None:
            break
        if (path / "config.toml").exists():
            resumed = resume(path)
            resumed.run()
            assert_same_run(resumed.directory, straight.directory)
    assert first > 30


def test_files_that_may_not_grow(quadrants, tmp_path):
    """RLIMIT_FSIZE as a disk that takes only so many bytes of a file: whatever is cut, nothing torn is left."""
    resource = pytest.importorskip("resource")
    trainer = run({**QUICK, "checkpoint_minutes": 0}, tmp_path / "run")
    before_call(trainer, 5, kill)
    with pytest.raises(Killed):
        trainer.run()
    path = tmp_path / "run"
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = len(before["checkpoint.h5"])
    for limit in (0, 1, 300, 2000, 4096, size // 2, size - 64):  # the next one may have some digits less
        resumed = resume(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match="cannot write .*File too large") as error:
                resumed.run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
        assert {p.name for p in path.iterdir()} == set(before)
        load_all(resumed.directory)
    straight = run(QUICK, tmp_path / "straight")
    straight.run()
    resumed = resume(path)
    resumed.run()
    assert_same_run(resumed.directory, straight.directory)
    assert np.isfinite(resumed.best_accuracy)
