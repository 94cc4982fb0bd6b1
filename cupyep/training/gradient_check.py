"""What ``cupyep check`` prints: the gradient of EP against that of BPTT, as a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyep.backend import get_device
from cupyep.data import Loader
from cupyep.errors import require
from cupyep.files import replacing
from cupyep.learning.check import compare_forms
from cupyep.learning.equilibrium import FORMS
from cupyep.training.build import build_dataset, build_network, build_signals
from cupyep.training.config import TrainConfig

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
