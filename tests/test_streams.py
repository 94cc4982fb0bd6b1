"""The command line where streams, terminal, home or display are not as usual; each in a process of its own.

Oracles: exit codes by convention (128 + signal), what lies in the folder afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cupyep.persistence.checkpoint import load_checkpoint

RUN = ["train", "--arch", "vgg5", "--width", "0.02", "--dataset", "digits", "--image-size", "16", "--limit-train", "64",
       "--limit-test", "20", "--batch-size", "16", "--aug", "none", "--run-dir", "run"]  # fmt: skip


def start(arguments, folder, environment=None, **how):
    """Start the command line in `folder`; the variables of `environment` that are None are left out."""
    names = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})}
    names = {name: value for name, value in names.items() if value is not None}
    return subprocess.Popen([sys.executable, "-m", "cupyep.cli", *arguments], cwd=folder, env=names, **how)


def test_a_run_without_any_stream_is_whole(tmp_path):
    def close():
        for number in (0, 1, 2):
            os.close(number)

    assert start([*RUN, "--epochs", "1"], tmp_path, preexec_fn=close).wait() == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["epoch"] == 1


def test_output_that_nobody_reads_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with start(["data", "list"], tmp_path, stdout=write, stderr=subprocess.PIPE) as process:
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
    with start(["evaluate", "none"], tmp_path, stdout=write, stderr=write) as process:
        pass
    assert process.returncode == 1
    os.close(write)


def test_a_terminal_that_goes_away_saves_the_run(tmp_path):
    """Closing it sends SIGHUP, and whatever is written to it afterwards fails."""
    master, slave = pytest.importorskip("pty").openpty()
    with start([*RUN, "--epochs", "5000"], tmp_path, stdin=slave, stdout=slave, stderr=slave,
               start_new_session=True) as process:  # fmt: skip
        os.close(slave)
        shown = b""
        while b"epoch    1/5000  train" not in shown:
            shown += os.read(master, 1000)
        os.close(master)
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    assert process.returncode in (128 + signal.SIGHUP, 128 + signal.SIGPIPE)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.h5").epoch >= 1


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://none", "svg"])
def test_a_backend_of_the_shell_is_not_taken_nor_changed(backend):
    pytest.importorskip("matplotlib")
    code = (
        "import os; from cupyep.commands.plots.style import plain_axes; plain_axes(1); import sys, matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "print(os.environ['MPLBACKEND'], dict.__getitem__(matplotlib.rcParams, 'backend'))"
    )
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    kept, used = done.stdout.split(maxsplit=1)
    assert kept == backend
    if backend == "svg":
        assert used.strip() == "svg", "who draws in this process later gets it"


def test_without_a_home_the_machine_is_shown(invoke, monkeypatch):
    def unknown(_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("CUPYEP_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    code, out, _ = invoke("info")
    assert code == 0
    assert "set HOME" in out
    assert "CUPYEP_DATA" in out
    code, _, err = invoke("data", "list", "mnist")
    assert code == 2
    assert "set HOME" in err


def test_a_tilde_no_shell_has_seen(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"'{tmp_path / 'none'}'" in invoke("evaluate", "~/none")[2]
    (tmp_path / "mine.toml").write_text("# Of my own.\n", encoding="utf-16")
    assert invoke("recipes", "~/mine.toml")[1].strip() == "# Of my own."
