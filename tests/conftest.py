"""Shared fixtures: one device a backend, every random draw seeded."""

import os
import signal
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each; before NumPy reads it
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np
import pytest
from data_files import cifar_binary_files, random_arrays, shrink_source, write_files
from fake_gpu import fake_gpu  # noqa: F401
from quadrants import quadrant_data

from cupyep import activations, get_device, gpu_status, models, plugins
from cupyep.cli import main
from cupyep.learning import equilibrium
from cupyep.ops import winograd
from cupyep.training import build

# A shell lets its background jobs ignore Ctrl-C, and they hand that on; the tests of interruption need it taken up.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Teachers are kept in a folder of the test's own."""
    monkeypatch.setenv("CUPYEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def forget():
    """Call it to make the process one that has imported no plugin; it is called behind every test."""

    def run():
        built_in = ((models.TABLE, models.ARCHITECTURES), (activations.ACTIVATIONS, activations.BUILT_IN))
        for table, names in (*built_in, (plugins.SIGNALS, plugins.BUILT_IN)):
            for name in [name for name in table if name not in names]:
                del table[name]
        for name in [name for name in sys.modules if name == "mine" or name.startswith("cupyep_plugin_")]:
            del sys.modules[name]

    yield run
    run()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every test that takes this runs with the same body on NumPy and on CuPy."""
    if request.param == "cuda":
        usable, reason = gpu_status()
        if not usable:
            if os.environ.get("CUPYEP_REQUIRE_GPU") == "1":
                pytest.fail(f"CUPYEP_REQUIRE_GPU=1, but {reason}")
            pytest.skip(reason)
    return get_device(request.param)


@pytest.fixture
def rng():
    """A generator that starts the same in every test."""
    return np.random.default_rng(20250820)


@pytest.fixture
def winograd_everywhere(monkeypatch):
    """Winograd's algorithm for every edge that allows it, however small, in float64 as well."""
    monkeypatch.setattr(winograd, "PRECISIONS", ("float32", "float64"))
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", {2: 0, 4: 0})
    for name in ("LEAST_ROWS", "LEAST_WORK"):
        monkeypatch.setattr(winograd, name, 0)
    monkeypatch.setattr(equilibrium, "_takes_large_tiles", lambda network: False)  # of which the classical form warns


@pytest.fixture(params=["columns", "winograd"])
def algorithm(request):
    """Both ways to compute a convolution on the CPU, where an edge allows both."""
    if request.param == "winograd":
        request.getfixturevalue("winograd_everywhere")
    return request.param


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A data folder with CIFAR-10 of 50 training and 10 test images; the working folder is empty."""
    shrink_source(monkeypatch, "cifar10")
    folder = tmp_path / "data"
    write_files(folder / "cifar-10-batches-bin", cifar_binary_files("cifar10", random_arrays((32, 32, 3), 10)))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("CUPYEP_DATA", str(folder))
    return folder


@pytest.fixture
def quadrants(monkeypatch):
    """Whatever data set a configuration names, the quadrants are loaded."""
    dataset = quadrant_data()
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)
    return dataset


@pytest.fixture
def invoke(capsys):
    """Run the command line in this process; return (exit code, stdout, stderr)."""

    def run(*args):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args], prog_name="cupyep")
        streams = capsys.readouterr()
        return end.value.code, streams.out, streams.err

    return run
