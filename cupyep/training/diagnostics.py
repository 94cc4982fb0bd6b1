"""What ``cupyep check`` and ``cupyep info`` print: the gradient check as a table, the machine and its libraries."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.backend import get_device, gpu_status
from cupyep.data import Loader, data_directory
from cupyep.errors import require
from cupyep.learning.check import compare_forms
from cupyep.learning.equilibrium import FORMS
from cupyep.training.build import build_dataset, build_network, build_signals
from cupyep.training.checkpoint import replacing
from cupyep.training.config import TrainConfig

LIBRARIES = (
    "numpy",
    "scipy",
    "h5py",
    "tqdm",
    "click",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "pooch",
    "scikit-learn",
    "onnxruntime",
)
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

# Options of ``cupyep check``, and where its defaults differ from those of ``cupyep train``.
CHECK_OPTIONS = (
    "arch", "width", "activation", "pooling", "loss", "gain", "feedback", "dataset", "data_dir", "image_size", "beta",
    "free_steps", "nudged_steps", "schedule", "tolerance", "scheme", "nudge", "aug", "signal_layers", "kappa",
    "signal_loss", "batch_size", "seed", "device", "precision",
)  # fmt: skip
# The network of the papers, well settled: EP's theorem is about equilibria.
CHECK_DEFAULTS = {
    "feedback": 1.0,
    "schedule": "evenodd",
    "free_steps": 500,
    "nudged_steps": 40,
    "tolerance": 1e-6,
    "beta": 0.05,
    "batch_size": 4,
}
COLUMNS = {
    "cosine": "cosine",
    "relative_error": "rel. error",
    "sign_agreement": "same sign",
    "nudge_response": "response",
}


@dataclass
class GradientReport:
    """The gradient of EP against that of BPTT, for the nudge form asked for and for the other one.

    Attributes
    ----------
    config : TrainConfig
    forms : dict
        Nudge form -> rows of `check_gradients`; the form asked for comes first.
    """

    config: TrainConfig
    forms: dict[str, list[dict[str, Any]]]

    def table(self) -> str:
        """Return the rows of all forms side by side, a line a layer."""
        heads = [f"{title:>11}" for _ in self.forms for title in COLUMNS.values()]
        width = 12 * len(COLUMNS)
        lines = [
            f"{'':<12}" + "".join(f"{form + ' form':^{width}}" for form in self.forms),
            f"{'layer':<12}" + " ".join(heads),
        ]
        for rows in zip(*self.forms.values(), strict=True):
            cells = [_cell(row[column]) for row in rows for column in COLUMNS]
            lines.append(f"{rows[0]['name']:<12}" + " ".join(cells))
        return "\n".join(lines)

    def write_json(self, path: str | Path) -> None:
        """Write ``{"nudge", "layers": rows, "other": {"nudge", "layers"}, "options"}``; NaN becomes null."""
        parts = [{"nudge": form, "layers": [_finite(row) for row in rows]} for form, rows in self.forms.items()]
        options = {name: getattr(self.config, name) for name in CHECK_OPTIONS}
        content = {**parts[0], "other": parts[1] if len(parts) > 1 else None, "options": options}
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def check_gradient(config: TrainConfig, report: Callable[[str], None] = print) -> GradientReport:
    """Compare EP with BPTT unrolled from the same free state, on the first ``batch_size`` training images.

    Parameters
    ----------
    config : TrainConfig
        `CHECK_OPTIONS` are used; ``aug`` is "none" or "le".
    report : callable
        Takes the lines that say what is going on.
    """
    require(config.aug != "kd", "cupyep check knows --aug none and le; kd needs a teacher")
    dataset = build_dataset(dataclasses.replace(config, limit_test=1))
    dataset = dataclasses.replace(dataset, train=dataset.train.take(min(config.batch_size, len(dataset.train))))
    network = build_network(config, dataset, get_device(config.device))
    batch = next(iter(Loader(dataset, "train", config.batch_size, network.device, network.dtype)))
    signals = build_signals(config, network, dataset, None)
    report(
        f"{config.arch} on {len(batch)} images of {config.dataset}, device {network.device.name}, {config.precision}"
    )
    names = ("beta", "free_steps", "nudged_steps", "scheme", "schedule", "tolerance")
    settings = {name: getattr(config, name) for name in names}
    others = [form for form in FORMS if form != config.nudge and config.scheme != "tangent"]
    forms = compare_forms(network, batch, forms=(config.nudge, *others), signals=signals, **settings)
    return GradientReport(config, forms)


def _cell(value: float | None) -> str:
    return f"{'-':>11}" if value is None or math.isnan(value) else f"{value:>11.4g}"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def system_report(data_dir: str | Path | None = None) -> list[tuple[str, str]]:
    """Return (name, value) lines: cupyep, Python, device, why not a GPU, libraries, BLAS, threads, data folder."""
    device = get_device("auto")
    usable, reason = gpu_status()
    folder = data_directory(data_dir)
    return [
        ("cupyep", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("device auto", device.name),
        ("gpu", _gpu_name(device) if usable else f"none: {reason}"),
        *((name, _version(name)) for name in LIBRARIES),
        ("blas", _blas()),
        ("threads", _threads()),
        ("data folder", f"{folder}{'' if folder.is_dir() else ' (does not exist yet)'}"),
    ]


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
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    return f"{usable} usable cores" + (f", limited by {', '.join(limits)}" if limits else "")
