"""Does a run survive ``kill -9``? Kill it again and again, resume it each time, compare its end with a straight run.

Run it from anywhere, with the environment that runs the tests (it needs scikit-learn's digits)::

    python tests/kill_resume.py                # 50 kills at random moments, then 50 inside of saves
    python tests/kill_resume.py --kills 5 --seed 3

Two ways to kill. *At random moments*: from outside, at a random time after the process starts or after it begins to
train. *Inside of saves*: the process kills itself before or after a random one of the calls by which files are opened,
flushed, linked and renamed. The runs save after every batch or only after epochs, by turns. One that comes to its end
is compared with the straight one, and another is begun, until all kills are dealt. Equal means: parameters, optimizer,
running sums and generators in checkpoint.h5, checkpoint.previous.h5 and best.h5 bit for bit; config.toml; every number
in metrics.jsonl that does not depend on the clock.

Exit status 1 if a run ends otherwise, or a resumed one fails. pytest does not collect this file; it runs a few kills
from test_kill_resume.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quadrants import assert_same_state, numbers

from cupyep.training.run_directory import CHECKPOINT_FILES, CONFIG, RunDirectory

# Much that has a state: Adam, crops, a random scheme, kappa and learning rate annealed.
OPTIONS = [
    *("--dataset", "digits", "--image-size", "16", "--limit-train", "120", "--limit-test", "40", "--batch-size", "20"),
    *("--arch", "vgg5", "--width", "0.02", "--epochs", "4", "--aug", "le", "--scheme", "random", "--seed", "5"),
    *("--device", "cpu", "--quiet", "--log-format", "json"),
]
MINUTES = ("0", "10")  # a checkpoint after every batch; only after epochs


class Killed(Exception):
    """The process was killed before its end."""


def start(path: Path, minutes: str, *, call: int = 0) -> subprocess.Popen:
    """Start or resume the run in `path`; with `call` it kills itself at that call."""
    how = ["--resume"] if (path / CONFIG).exists() else OPTIONS
    arguments = ["train", "--run-dir", str(path), "--checkpoint-minutes", minutes, *how]
    arguments += [] if "--log-format" in arguments else ["--quiet", "--log-format", "json"]
    command = [sys.executable, __file__, "--child", str(call), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for `process`; raise `Killed` if it was, RuntimeError if it failed otherwise."""
    _, err = process.communicate()
    if process.returncode == -signal.SIGKILL:
        raise Killed
    if process.returncode != 0 and "epochs are done" not in err:  # killed after its last save
        raise RuntimeError(f"exit status {process.returncode}: {err.strip()[-2000:]}")


def kill_at_random(path: Path, minutes: str, rng: random.Random, seconds: tuple[float, float]) -> None:
    """Resume, and kill after a random time; `seconds` are those to the beginning of the training, and of it."""
    process, (before, training) = start(path, minutes), seconds
    try:
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, before))
        else:
            for line in process.stdout:
                if json.loads(line)["event"] == "start":
                    break
            time.sleep(rng.uniform(0, training / 4))
    finally:
        process.kill()
    finish(process)


def kill_in_save(path: Path, minutes: str, rng: random.Random, seconds: tuple[float, float]) -> None:
    """Resume, and let the process kill itself at a random call that touches a file."""
    finish(start(path, minutes, call=rng.randint(1, 80)))


WAYS = {"at random moments": kill_at_random, "inside of saves": kill_in_save}


def straight_run(path: Path) -> tuple[float, float]:
    """Train without a kill; return the seconds that it took to begin, and to train."""
    begin = time.monotonic()
    process = start(path, "10")
    while json.loads(process.stdout.readline())["event"] != "start":
        pass
    between = time.monotonic()
    finish(process)
    return between - begin, time.monotonic() - between


def compare(path: Path, straight: Path) -> None:
    """Raise AssertionError unless the two runs ended the same."""
    one, two = RunDirectory.open(path), RunDirectory.open(straight)
    one.config.checkpoint_minutes = two.config.checkpoint_minutes
    assert one.config == two.config
    assert numbers(one) == numbers(two)
    for which in CHECKPOINT_FILES:
        assert_same_state(one.load(which), two.load(which))
    left = {p.name for p in path.iterdir()} ^ {p.name for p in straight.iterdir()}
    assert not left, f"left behind: {left}"


def deal_kills(folder: Path, way: str, kills: int, rng: random.Random, seconds: tuple[float, float]) -> int:
    """Kill `kills` times; return how many runs came to their end, all of them like the one in ``folder/straight``."""
    dealt, runs = 0, 0
    while True:
        path = folder / f"{way.replace(' ', '-')}-{runs}"
        while True:
            last = dealt == kills
            try:
                if last:
                    finish(start(path, MINUTES[runs % 2]))
                else:
                    WAYS[way](path, MINUTES[runs % 2], rng, seconds)
                break
            except Killed:
                dealt += 1
        compare(path, folder / "straight")
        runs += 1
        if last:
            return runs


def die_at(call: int) -> None:
    """Make the `call`-th call that touches a file the last one of this process: before it or just after it."""
    made = 0

    def counted(function):
        def wrapped(*args, **kwargs):
            nonlocal made
            made += 1
            if made == call and call % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    from cupyep import files

    for name in ("fsync", "replace", "link"):
        setattr(os, name, counted(getattr(os, name)))
    files.open = counted(open)


def child(arguments: list[str]) -> None:
    """Run the command line in this process, killed at call ``arguments[0]`` if that is not 0."""
    from cupyep.cli import main

    if int(arguments[0]):
        die_at(int(arguments[0]))
    main(arguments[1:], prog_name="cupyep")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = straight_run(folder / "straight")
        print(f"straight run: {seconds[0]:.1f} s to begin, {seconds[1]:.1f} s of training", flush=True)
        for way in WAYS:
            begin = time.monotonic()
            try:
                runs = deal_kills(folder, way, options.kills, random.Random(options.seed), seconds)
            except (AssertionError, RuntimeError) as error:
                print(f"killed {way}: NOT THE SAME\n{error}")
                return 1
            took = time.monotonic() - begin
            print(f"{options.kills} kills {way}: {runs} runs ended like the straight one, {took:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    sys.exit(main())
