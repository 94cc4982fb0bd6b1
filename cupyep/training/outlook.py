"""How long a run will take: said after some batches, before anybody has waited for an epoch."""

from __future__ import annotations

import time
from typing import Any

from cupyep.models import takes
from cupyep.training.config import TrainConfig
from cupyep.training.display import Display, clock
from cupyep.training.options import NEEDS

LEAST_S, LEAST_BATCHES = 10.0, 3  # measured; the first batch, in which kernels are made and memory is taken, is not
LEAST_LEFT = 0.1  # of all images of the run: with less to do nothing is said
LONG_S = 3600.0


class Outlook:
    """Estimates how long a run goes on; once it is long, names what may be lowered.

    Parameters
    ----------
    display : Display
        Shows it; one that `advises` the settings, too.

    Attributes
    ----------
    smaller : list of str
        The settings that may be lowered.
    """

    def __init__(self, display: Display):
        self.display = display
        self.smaller: list[str] = []
        self._begin: tuple[float, int] | None = None  # the clock and the images of the epoch when the first batch ended
        self._batches = 0
        self._told = self._advised = False

    def after_batch(self, trainer: Any, waited: bool) -> None:
        """Look at the clock; say the estimate where enough is measured, and the device has done it (`waited`)."""
        done = trainer.statistics.count
        if self._begin is None:
            self._begin = time.monotonic(), done
            return
        self._batches += 1
        seconds = time.monotonic() - self._begin[0]
        if self._told or not waited or self._batches < LEAST_BATCHES or seconds < LEAST_S:
            return
        self._told = True
        epoch = len(trainer.train.split)
        left = (trainer.epochs - trainer.epochs_done) * epoch - done
        if left > LEAST_LEFT * trainer.epochs * epoch:
            rate = (done - self._begin[1]) / seconds
            self._say(trainer, left / rate, f" at {rate:.{int(rate < 10)}f} images/s, evaluation not counted", rate)

    def after_epoch(self, trainer: Any, left_s: float) -> None:
        """Say it of what is long with its evaluation only, now that this is known; the line of the epoch has the time.

        What has not been measured until now is not estimated any more.
        """
        if left_s > LONG_S and not self._advised and self._advice():
            self._say(trainer, left_s, " with evaluation", trainer.records[-1]["images_per_s"])
        self._told = self._advised = True

    def _advice(self) -> list[str]:
        return self.smaller if self.display.advises else []

    def _say(self, trainer: Any, left_s: float, how: str, rate: float) -> None:
        names = self._advice() if left_s > LONG_S else []
        self._advised = self._advised or bool(names)
        epochs = trainer.epochs - trainer.epochs_done
        text = f"about {clock(left_s)} left: {epochs} epoch{'s' if epochs > 1 else ''}{how}"
        text += f"; for less, lower {', '.join(names)}" if names else ""
        self.display.show("estimate", text, left_s=left_s, images_per_s=rate, epochs=epochs, smaller=names)


def smaller_settings(config: TrainConfig, network: Any) -> list[str]:
    """Return the options of `cupyep train` that make a run of `config` shorter when they are lowered."""
    half = [side // 2 for side in network.input_shape[:-1]] + [network.input_shape[-1]]
    sizes, drawn = (NEEDS[need][1](vars(config)) for need in ("sizes", "drawn"))
    may = {
        "--width": drawn,
        "--limit-train": True,
        "--image-size": sizes and drawn and takes(config.arch, half, **config.take("width", "pooling")),
        "--epochs": config.epochs > 1,
    }
    return [name for name, applies in may.items() if applies]
