"""What ``cupyep info`` prints: the machine, the libraries, where the data lie."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.backend import get_device, gpu_status
from cupyep.backend.libraries import cuda_libraries
from cupyep.backend.threads import OMP_VARIABLE, VARIABLE, available_cpus, get_threads
from cupyep.data import data_directory
from cupyep.errors import ConfigurationError
from cupyep.parallel import Communicator

LIBRARIES = (
    "numpy",
    "scipy",
    "h5py",
    "tqdm",
    "click",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "ml_dtypes",
    "pooch",
    "scikit-learn",
    "onnxruntime",
    "onnx",
    "mpi4py",
    "pillow",
    "matplotlib",
    "tensorboardX",
)
THREAD_VARIABLES = (VARIABLE, OMP_VARIABLE, "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def system_report(data_dir: str | Path | None = None, name: str = "auto") -> list[tuple[str, str]]:
    """Return (name, value) lines: cupyep, Python, device, GPU or why not, libraries, BLAS, threads, data folder.

    `name` is that of the device; `DeviceError` if it cannot be used.
    """
    device = get_device(name)
    gpu = device if device.is_gpu else get_device("auto")
    usable, reason = gpu_status()
    try:
        folder = data_directory(data_dir)
        place = f"{folder}{'' if folder.is_dir() else ' (does not exist yet)'}"
    except ConfigurationError as error:  # all else is known
        place = f"none: {error}"
    return [
        ("cupyep", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        (f"device {name}", device.name),
        ("gpu", _gpu_name(gpu) if usable else f"none: {reason}"),
        *(cuda_libraries(gpu) if usable else []),
        *((name, _version(name)) for name in LIBRARIES),
        ("blas", _blas()),
        ("threads", _threads()),
        ("data folder", place),
    ]


def rank_report(ranks: Communicator, name: str = "auto") -> str:
    """Return one line: which process this is, where, and what it computes with if it is asked for a device by name."""
    device = get_device(ranks.own_device(name))
    computes = f"{device.name}, {_gpu_name(device)}" if device.is_gpu else f"{device.name}, {_threads()}"
    versions = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "mpi4py"))
    return f"rank {ranks.rank} of {ranks.size} on {platform.node()}: {computes}; cupyep {__version__}, {versions}"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu_name(device: Any) -> str:
    properties = device.xp.cuda.runtime.getDeviceProperties(device.index)
    return f"{properties['name'].decode()}, {properties['totalGlobalMem'] / 2**30:.0f} GiB"


def _blas() -> str:
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _threads() -> str:
    limits = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    return f"{get_threads()} of {available_cpus()} usable CPUs" + (f" ({', '.join(limits)})" if limits else "")
