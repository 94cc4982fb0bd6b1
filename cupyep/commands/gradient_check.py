"""What ``cupyep check`` prints: the gradient of EP against that of BPTT, as a table for each beta."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import get_device
from cupyep.data import Loader
from cupyep.errors import require
from cupyep.files import write_json
from cupyep.learning.check import compare_forms, compare_precisions
from cupyep.learning.equilibrium import FORMS
from cupyep.network import Network
from cupyep.signals import Augmenter
from cupyep.training.build import build_dataset, build_network, build_signals
from cupyep.training.config import TrainConfig

# Options of ``cupyep check``, and where its defaults differ from those of ``cupyep train``.
CHECK_OPTIONS = (
    "arch", "width", "activation", "weights", "readout_pool", "pooling", "loss", "gain", "feedback", "dataset",
    "data_dir", "image_size", "beta", "free_steps", "nudged_steps", "schedule", "relaxation", "tolerance", "scheme",
    "nudge", "aug", "signal_layers", "kappa", "signal_loss", "signal_pool", "learned_maps", "batch_size", "seed",
    "device", "scratch_mb", "precision", "exact", "plugin",
)  # fmt: skip
# How well the phases settle is the check's own business, whatever a recipe trains with.
SETTLING = ("free_steps", "nudged_steps", "schedule", "relaxation", "tolerance", "batch_size")
# The network that `cupyep train` trains, well settled: EP's theorem is about equilibria.
CHECK_DEFAULTS = {
    "schedule": "evenodd",
    "free_steps": 500,
    "nudged_steps": 40,
    "tolerance": 1e-6,
    "beta": 0.05,
    "batch_size": 4,
    "exact": True,
}
COLUMNS = {
    "cosine": "cosine",
    "cosine_float32": "to float32",
    "cosine_from_zeros": "from zeros",
    "relative_error": "rel. error",
    "sign_agreement": "same sign",
    "nudge_response": "response",
}


@dataclass
class GradientReport:
    """The gradient of EP against that of BPTT, for the nudge form asked for and for the other one."""

    config: TrainConfig
    # beta -> nudge form -> rows of `check_gradients`; what was asked for comes first
    betas: dict[float, dict[str, list[dict[str, Any]]]]

    def table(self) -> str:
        """Return the rows of all forms side by side, a line a layer, one block a beta."""
        return "\n\n".join(_block(beta, forms) for beta, forms in self.betas.items())

    def write_json(self, path: str | Path) -> None:
        """Write ``{"nudge", "layers": rows, "other": {"nudge", "layers"}, "options"}``; NaN becomes null.

        These are of the first beta; ``"betas"``, a list of ``{"beta", "forms": {form: rows}}``, has all of them.
        """
        betas = [{"beta": beta, "forms": forms} for beta, forms in self.betas.items()]
        parts = [{"nudge": form, "layers": rows} for form, rows in next(iter(self.betas.values())).items()]
        content = {**parts[0], "other": parts[1] if len(parts) > 1 else None, "betas": betas}
        content["options"] = self.config.take(*CHECK_OPTIONS)
        write_json(Path(path), content, indent=1)


def recipe_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a check takes from the options of a recipe: network, data, nudge, signals, but not how it settles.

    `ConfigurationError` if the recipe does not train by EP.
    """
    algorithm = recipe.get("algorithm", "ep")
    require(algorithm == "ep", f"the recipe trains by {algorithm} and not by EP: there is no gradient to check")
    return {name: value for name, value in recipe.items() if name in CHECK_OPTIONS and name not in SETTLING}


def check_gradient(
    config: TrainConfig, betas: Sequence[float] = (), report: Callable[[str], None] = print
) -> GradientReport:
    """Compare EP with BPTT unrolled from the same free state, on the first ``batch_size`` training images.

    In float32 and float64 with BPTT in the same precision, in the others with BPTT in float64 and EP in float32, see
    `cupyep.learning.check.compare_precisions`. Of `config` the `CHECK_OPTIONS` are used, ``aug`` "none" or "le", and
    its beta unless `betas` are given. Lines that say what is going on go to `report`.
    """
    require(config.aug != "kd", "cupyep check knows --aug none and le; kd needs a teacher")
    dataset = build_dataset(dataclasses.replace(config, limit_test=1))
    dataset = dataclasses.replace(dataset, train=dataset.train.take(min(config.batch_size, len(dataset.train))))
    device = get_device(config.device, config.scratch_mb)

    def build(precision: str) -> tuple[Network, list[Augmenter]]:
        network = build_network(dataclasses.replace(config, precision=precision), dataset, device)
        return network, build_signals(config, network, dataset, None)

    batch = next(iter(Loader(dataset, "train", config.batch_size, device, np.float64)))
    report(f"{config.arch} on {len(batch)} images of {config.dataset}, device {device.name}, {config.precision}")
    betas = list(betas) or [config.beta]
    others = [form for form in FORMS if form != config.nudge and config.scheme != "tangent"]
    settings = config.take("free_steps", "nudged_steps", "scheme", "schedule", "relaxation", "tolerance")
    settings["forms"] = (config.nudge, *others)
    if config.precision in ("float32", "float64"):
        network, signals = build(config.precision)
        settings["signals"] = signals
        compared = {beta: compare_forms(network, batch, beta=beta, **settings) for beta in dict.fromkeys(betas)}
    else:
        images = device.to_numpy(batch.images)
        compared = compare_precisions(build, config.precision, images, batch.labels, betas=betas, **settings)
    return GradientReport(config, compared)


def _block(beta: float, forms: dict[str, list[dict[str, Any]]]) -> str:
    columns = [name for name in COLUMNS if all(name in row for rows in forms.values() for row in rows)]
    heads = [f"{COLUMNS[name]:>11}" for _ in forms for name in columns]
    names = [row["name"] for row in next(iter(forms.values()))]
    width = max(12, *(len(name) + 1 for name in names))
    lines = [
        f"{f'beta {beta:g}':<{width}}" + "".join(f"{form + ' form':^{12 * len(columns)}}" for form in forms).rstrip(),
        f"{'layer':<{width}}" + " ".join(heads),
    ]
    for rows in zip(*forms.values(), strict=True):
        cells = [_cell(row[name]) for row in rows for name in columns]
        lines.append(f"{rows[0]['name']:<{width}}" + " ".join(cells))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-':>11}" if value is None or math.isnan(value) else f"{value:>11.4g}"
