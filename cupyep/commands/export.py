"""A trained run as a file for other programs: npz, ONNX, safetensors or a PyTorch state dict."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.errors import CheckpointError, choose, needing, reporting, require
from cupyep.export import onnx_model, torch_layout
from cupyep.files import replacing, write_file
from cupyep.layers import Conv2d
from cupyep.training.trained import TrainedRun, load_trained


def export_run(path: str | Path, form: str, output: Path, which: str = "best", steps: int | None = None) -> list[str]:
    """Write the network of the run in `path` to the file `output`, which is replaced when the new one is complete.

    The data set of the run is not needed; `which` checkpoint is "best", "last" or "previous". The `form` is ``npz``:
    arrays by name (`torch_layout`), with ``mean``, ``std``, ``classes`` and ``settings`` (JSON); ``torch`` or
    ``safetensors``: the same names as a state dict and nothing else; ``onnx``: `onnx_model`, pixels in, scores out, of
    so many settling `steps`, by default the run's.

    Returns lines that say what was written and what to feed it. `ConfigurationError` if a package is not installed, or
    an argument has no meaning for this form; `CheckpointError` if the run cannot be loaded, or the file not be written.
    """
    write = FORMS[choose("format", form, FORMS)]
    run = load_trained(path, which, {"device": "cpu"})
    settles = run.config.algorithm != "bp"
    require(steps is None or (form == "onnx" and settles), "--steps is for --format onnx of a network that settles")
    require(steps is None or steps >= 1, f"--steps must be at least 1 (got {steps})")
    with reporting(CheckpointError, f"cannot write '{output}'"):
        lines = write(run, output, steps or run.config.settling["steps"])
    count = sum(array.size for array in run.network.parameters().values())
    epoch = f"epoch {run.epoch} ({which})"
    return [f"{output}: {run.config.arch} on {run.config.dataset}, {epoch}, {count:,} parameters", *lines]


def _normalisation(run: TrainedRun) -> str:
    mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (run.images.mean, run.images.std))
    pixel = "pixel / 255" if run.images.unit == 255 else "pixel"
    return f"images: N x C x H x W, ({pixel} - mean) / std with mean {mean} and std {std}"


def _write_npz(run: TrainedRun, output: Path, steps: int) -> list[str]:
    arrays: dict[str, Any] = torch_layout(run.network)
    names = ("arch", "width", "activation", "pooling", "loss", "feedback", "schedule", "relaxation", "algorithm")
    settings = {
        **run.config.take(*names),
        "steps": steps,
        "unrolled_steps": run.config.settling.get("unrolled_steps", 0),
        "layers": [_geometry(edge) for edge in run.network.layers],
        "network": run.network.describe(),
        "cupyep": __version__,
    }
    texts: dict[str, Any] = {"classes": np.array(run.images.classes), "settings": np.array(json.dumps(settings))}
    with replacing(output) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, mean=run.images.mean, std=run.images.std, **texts)
    return [f"arrays {', '.join(arrays)}; mean, std, classes, settings", _normalisation(run)]


def _geometry(edge: Any) -> dict[str, Any]:
    """Return what weights do not tell of an edge."""
    if type(edge) is Conv2d:
        return {"kind": "conv", "stride": edge.stride, "padding": edge.padding, "pool": edge.pool}
    return {"kind": "linear" if edge.parameters() else "identity"}


def _write_torch(run: TrainedRun, output: Path, steps: int) -> list[str]:
    remedy = "install it (https://pytorch.org), or use --format npz: the same arrays without it"
    with needing(f"--format torch needs PyTorch; {remedy}"):
        import torch
    state = {name: torch.from_numpy(array) for name, array in torch_layout(run.network).items()}
    content = io.BytesIO()  # into a file torch.save raises no OSError
    torch.save(state, content)
    write_file(output, content.getvalue())
    return [f"state dict: {', '.join(state)}", _normalisation(run)]


def _write_safetensors(run: TrainedRun, output: Path, steps: int) -> list[str]:
    with needing("--format safetensors needs safetensors; pip install safetensors, or use --format npz"):
        from safetensors.numpy import save
    arrays = torch_layout(run.network)
    write_file(output, save(arrays))  # save_file raises no OSError
    return [f"tensors {', '.join(arrays)}", _normalisation(run)]


def _write_onnx(run: TrainedRun, output: Path, steps: int) -> list[str]:
    config, images = run.config, run.images
    feedforward = config.algorithm == "bp"
    unrolled = config.settling.get("unrolled_steps", 0)
    model = onnx_model(
        run.network,
        steps,
        config.schedule,
        relaxation=config.relaxation,
        unrolled_steps=unrolled,
        mean=images.mean,
        std=images.std,
        classes=images.classes,
        feedforward=feedforward,
    )
    write_file(output, model.SerializeToString())
    many = f"{steps} step{'s' if steps > 1 else ''}"
    phase = "feed-forward pass" if feedforward else f"free phase of {many}, schedule {config.schedule}"
    phase += f", and {unrolled} synchronous steps" if unrolled else ""
    height, width, channels = images.image_shape
    pixels = "pixels in [0, 1]" if images.unit == 255 else "in the units of the data set"
    lines = [
        f"{phase}, {len(model.graph.node)} nodes",
        f"images: N x {channels} x {height} x {width} float32, {pixels}; they are normalised in the graph",
        f"scores: N x {len(images.classes)}" + (", logits" if config.loss == "cross_entropy" else ", output units"),
    ]
    if config.tolerance is not None and not feedforward:
        lines.append(
            f"note: the run ends its phases at the tolerance {config.tolerance:g}; the graph does all its steps"
        )
    return lines


FORMS: dict[str, Callable[[TrainedRun, Path, int], list[str]]] = {
    "npz": _write_npz,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
    "torch": _write_torch,
}
