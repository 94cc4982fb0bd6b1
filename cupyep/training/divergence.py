"""When a run has gone wrong: numbers that are not finite, or a loss that stays far above its start.

Whatever is watched is counted on the device and looked at when the host waits for the device anyway: when the display
is refreshed, before a checkpoint is written, at the end of an epoch. Counts tell the bad batch even when noticed later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.backend.device import Device
from cupyep.errors import DivergenceError

ON_DIVERGENCE = ("stop", "halve-lr")

# This project's own choice: a network that only guesses stays near its first loss, one that recovers does so sooner.
FAR = 3.0  # times the first loss
LONG = 100  # batches
UNREST = 0.1  # of a layer's mean state: who still changes by as much an iteration does not come to rest

#: What is watched, in the order in which one makes the next: statistic -> its name in the message, the likely knob.
WATCHED = {
    "activity": ("the state of {}", "--learning-rate"),
    "loss": ("the loss", "--learning-rate"),
    "nudge_response": ("the nudged state of {}", "--beta"),
    "gradient_norm": ("the gradient of {}", "--beta"),
}


def check_finite(
    counts: Mapping[str, Any], batches: int, epoch: int, layers: Sequence[str], unrest: float = 0.0
) -> None:
    """Raise `DivergenceError` if something stopped being finite; name what was first, and where.

    The `counts` are, for each statistic of `WATCHED`, the number of batches after which its sum was still finite, one a
    layer or one; `batches` is the number done in this epoch. The names `layers` belong to the entries of
    ``gradient_norm``; those of states are the first of them. The `unrest` is what a layer's state still changes by in
    an iteration at the end of a free phase, as a part of the state: a network that does not come to rest without a
    nudge does not do so with a small one.
    """
    good = min(int(np.min(count)) for count in counts.values())
    if good == batches:
        return
    name = next(name for name in WATCHED if name in counts and np.min(counts[name]) == good)
    place = int(np.argmin(counts[name]))
    what, knob = WATCHED[name]
    if knob == "--learning-rate" and epoch == 1 and good == 0:  # nothing has been learned yet
        knob = "--gain"
    elif knob == "--beta" and unrest > UNREST:
        knob = "--gain or --feedback: the free phase does not settle, either"
    what = what.format(layers[place] if name == "gradient_norm" else _label(layers[place]))
    raise DivergenceError(f"{what} is not finite in epoch {epoch}, batch {good + 1}; lower {knob}")


def _label(layer: str) -> str:
    """Return what ``layers.3`` or ``layers.NODE`` is called in messages."""
    name = layer.removeprefix("layers.")
    return f"layer {name}" if name.isdecimal() else f"node {name}"


def check_means(means: Mapping[str, Any], epoch: int, layers: Sequence[str]) -> None:
    """Raise `DivergenceError` if a mean of the epoch (by name, a number or a list with one of `layers`) is not finite.

    Squares overflow before what they are taken of: a residual can be infinite while every state is finite.
    """
    for name, values in means.items():
        wrong = np.flatnonzero(~np.isfinite(np.asarray(values, float)))
        if wrong.size:
            where = f" of {_label(layers[wrong[0]])}" if isinstance(values, list) else ""
            raise DivergenceError(
                f"'{name}'{where} is not finite in epoch {epoch}; lower --learning-rate, --feedback or --gain"
            )


def check_arrays(arrays: Mapping[str, np.ndarray], epoch: int) -> None:
    """Raise `DivergenceError` if a parameter or a buffer of the optimizer (by name, on the host) is not finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise DivergenceError(f"'{name}' is not finite after an update in epoch {epoch}; lower --learning-rate")


class LossWatch:
    """Watches a running mean of the loss, over about the last `LONG` batches, for rising `FAR` above the first loss."""

    def __init__(self, device: Device):
        self.device = device
        self._sums: dict[str, Any] = {}

    def add(self, loss: Any) -> None:
        """Look at the mean loss of a batch, a 0-d array."""
        sums = self._sums
        if not sums:
            sums["start"] = sums["mean"] = sums["peak"] = loss * 1.0  # a copy: learners may use their arrays again
        sums["mean"] = sums["mean"] + (loss - sums["mean"]) * (1 / LONG)
        sums["peak"] = self.device.xp.maximum(sums["peak"], sums["mean"])

    def forgive(self) -> None:
        """Begin again at the first loss, for a run that was taken back."""
        if self._sums:
            self._sums["mean"] = self._sums["peak"] = self._sums["start"]

    def check(self, epoch: int) -> None:
        """Raise `DivergenceError` if the running mean has ever been above its limit."""
        if not self._sums:
            return
        start, peak = (float(self.device.to_numpy(self._sums[name])) for name in ("start", "peak"))
        # Both losses are near 1 for a guess (ln of the classes; 1/2): a trained network may start far below.
        limit = FAR * max(start, 1.0)
        if peak > limit:
            raise DivergenceError(
                f"the loss has been above {limit:.3g}, {FAR:g} times its start, for about {LONG} batches up to epoch "
                f"{epoch}; lower --learning-rate"
            )

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the counts, on the host, as `load_state_dict` takes them."""
        return {name: np.asarray(self.device.to_numpy(value)) for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from the counts of `state`; ValueError if these are none."""
        if state.keys() not in (set(), {"start", "mean", "peak"}) or any(array.shape for array in state.values()):
            raise ValueError("its losses are not watched")
        self._sums = {name: self.device.asarray(value) for name, value in state.items()}
