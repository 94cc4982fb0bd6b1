"""What must hold before `benchmark.py` times anything: EP's gradient is right, and the reference computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np

import cupyep as ep
from cupyep.commands.memory import noise
from cupyep.learning.check import compare

BETA = 0.5


class WrongResult(ep.CupyepError):
    """The results to be timed are not right."""


def torch_reference() -> Any:
    """Return the module of the reference.

    Raises
    ------
    ConfigurationError
        If PyTorch is not installed.
    """
    try:
        import torch_reference
    except ImportError as error:
        if error.name != "torch":
            raise
        raise ep.ConfigurationError("--against torch needs PyTorch (https://pytorch.org)") from None
    return torch_reference


def check_results(device: ep.Device, reference: Any = None) -> None:
    """Show on a small network that the gradient is right and, given its module, that the reference agrees.

    Raises
    ------
    WrongResult
        If not; then there is nothing worth timing.
    """
    for precision, state_limit, gradient_limit in (("float32", 1e-5, 1e-2), ("float64", 1e-13, 1e-9)):
        network = ep.vgg(
            5, input_shape=(16, 16, 3), width=1 / 16, feedback=1.0, gain=0.9, device=device, precision=precision
        )
        batch = noise(network, 4)
        rows = ep.check_gradients(network, batch, free_steps=60, nudged_steps=20)
        worst = min(rows, key=lambda row: row["cosine"])
        if not worst["cosine"] > 0.98:
            told = f"EP's gradient of {worst['name']} has cosine {worst['cosine']:.3f} to BPTT's"
            raise WrongResult(f"{told} in {precision}; nothing was timed")
        if reference is not None:
            theirs = reference.TorchReference(network, "cuda" if device.is_gpu else "cpu", precision)
            _check_states(network, batch, theirs, state_limit)
            _check_gradient(network, batch, theirs, gradient_limit)


def _check_states(network: ep.Network, batch: ep.Batch, reference: Any, limit: float) -> None:
    theirs = reference.settle(reference.images(batch.images), reference.zeros(len(batch)), 5)
    ours = network.settle(batch.images, steps=5, schedule="synchronous").layers
    for n, (own, their) in enumerate(zip(ours, theirs, strict=True), 1):
        difference = np.abs(network.device.to_numpy(own) - reference.state_channels_last(their)).max()
        if not difference < limit:
            told = f"state {n} of the reference differs by {difference:.1e} after 5 steps in {network.dtype}"
            raise WrongResult(f"{told}; nothing was timed")


def _check_gradient(network: ep.Network, batch: ep.Batch, reference: Any, limit: float) -> None:
    # Settled well: the last update may exchange pooling winners, and then the two take different ones for the gradient.
    steps = (60, 40)
    theirs = reference.ep_step(reference.images(batch.images), reference.labels(batch.labels), BETA, *steps)
    for path, own in learner(network, *steps, "classical").step(batch).gradients.items():
        there, here = reference.channels_last(path, theirs[path]), network.device.to_numpy(own)
        error = compare(there, here)["relative_error"]
        if not error < limit:
            told = f"the reference's gradient of {path} differs by {error:.1e} of its norm in {network.dtype}"
            raise WrongResult(f"{told}; nothing was timed")


def learner(
    network: ep.Network, free_steps: int, nudged_steps: int, form: str, schedule: str = "synchronous"
) -> ep.EquilibriumPropagation:
    """Return the EP learner of a form: classical or deviation, both centered, or tangent."""
    how: dict[str, Any] = {"scheme": "tangent"} if form == "tangent" else {"scheme": "centered", "nudge": form}
    return ep.EquilibriumPropagation(network, BETA, free_steps, nudged_steps, schedule=schedule, relaxation=1.0, **how)
