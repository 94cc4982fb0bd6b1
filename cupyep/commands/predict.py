"""Predictions of a trained run for pictures: the likeliest classes, and whether the network settled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.batch import Batch
from cupyep.data.loader import Normaliser
from cupyep.data.pictures import read_array, read_picture
from cupyep.data.sources import SOURCES
from cupyep.errors import ConvergenceWarning, DataError, require
from cupyep.training.trained import TrainedRun

TOP = 3
NOT_FINITE = "the network does not settle on it, its states grow without bounds; lower --free-steps"


@dataclass(frozen=True)
class Prediction:
    """What a network says of a picture."""

    file: Path
    # name, score and probability of the likeliest classes, the best first. The score is the readout's output; with
    # squared error it is no logit, and there is no probability
    classes: list[tuple[str, float, float | None]]
    # of the worst layer at the end of the free phase; None for networks that do not settle (backpropagation)
    residual: float | None = None
    settled: bool | None = None  # whether the residual is within the tolerance; None without a tolerance
    error: str = ""  # why there is no prediction, else empty

    def to_json(self) -> dict[str, Any]:
        """Return the prediction as plain objects."""
        if self.error:
            return {"file": str(self.file), "error": self.error}
        names = ("class", "score", "probability")
        return {
            "file": str(self.file),
            "classes": [dict(zip(names, entry, strict=True)) for entry in self.classes],
            "residual": self.residual,
            "settled": self.settled,
        }


def predict_pictures(run: TrainedRun, files: Sequence[Path], top: int | None = None) -> Iterator[Prediction]:
    """Yield the prediction of each picture, a batch at a time; those without an answer have an `error`.

    It names the `top` classes, from 1 to all; by default 3, or all of fewer.
    """
    classes = run.images.classes
    top = min(TOP, len(classes)) if top is None else top
    require(1 <= top <= len(classes), f"--top must be from 1 to {len(classes)}, the classes of {run.images.name}")
    normalise = Normaliser(run.images.mean, run.images.std, run.network.device, run.network.dtype, run.images.unit)
    for start in range(0, len(files), run.config.batch_size):
        part, errors, pixels = files[start : start + run.config.batch_size], {}, []
        for file in part:
            try:
                pixels.append(_read(file, run))
            except DataError as error:
                errors[file] = str(error)
        answers = iter(_answers(run, normalise, pixels, top) if pixels else [])
        for file in part:
            answer = None if file in errors else next(answers)
            if answer is None:
                yield Prediction(file, [], error=errors.get(file, f"{file}: {NOT_FINITE}"))
            else:
                yield Prediction(file, *answer)


def _read(file: Path, run: TrainedRun) -> np.ndarray:
    """Return a picture as the run's images are, or an image that is stored as an array."""
    images = run.images
    if file.suffix.lower() == ".npy":
        return read_array(file, images.image_shape, np.dtype(np.uint8 if images.unit == 255 else np.float32))
    if images.unit != 255:
        raise DataError(f"{file}: the run's images are floats, of which a picture knows no unit; give a .npy file")
    if run.config.dataset in SOURCES:
        return read_picture(file, SOURCES[run.config.dataset].shape, images.image_shape[0])
    return read_picture(file, images.image_shape)


def _answers(run: TrainedRun, normalise: Normaliser, pixels: list[np.ndarray], top: int) -> Iterator[tuple | None]:
    """Yield (classes, residual, settled) of each image, None where they are not finite."""
    from scipy.special import softmax  # here: it takes a quarter of a second, and most commands do without

    network = run.network
    images = normalise(network.device.asarray(np.stack(pixels)))
    batch = network.batch(Batch(images, np.zeros(len(images), np.int64), checked=True))
    with np.errstate(over="ignore", invalid="ignore"):
        scores, residuals, tolerance = _settle(run.learner, batch)
    finite = np.isfinite(scores).all(axis=1) & (True if residuals is None else np.isfinite(residuals))
    scores = np.where(finite[:, None], scores, 0)
    logits = network.readout.criterion.name == "cross_entropy"
    probabilities = softmax(scores.astype(np.float64), axis=1) if logits else None
    for n, row in enumerate(scores):
        if not finite[n]:
            yield None
            continue
        best = np.argsort(-row, kind="stable")[:top]
        listed = [
            (run.images.classes[c], float(row[c]), None if probabilities is None else float(probabilities[n, c]))
            for c in best
        ]
        residual = None if residuals is None else float(residuals[n])
        yield listed, residual, None if residual is None or tolerance is None else residual <= tolerance


def _settle(learner: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    """Return scores (N, classes), the residual of each sample's worst layer, and the tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # each picture's line says so
        found = learner.network.run_parts(batch, lambda part, *_: _judged(learner, part), learner.micro_batch)
    scores, residuals = zip(*found, strict=True)
    if residuals[0] is None:  # a feed-forward pass
        return np.concatenate(scores), None, None
    return np.concatenate(scores), np.concatenate(residuals), learner.tolerance


def _judged(learner: Any, part: Batch) -> tuple[np.ndarray, np.ndarray | None]:
    """Return scores and residuals of the samples that settle together, as in an evaluation."""
    state = learner.settled(part)
    scores = learner.network.device.to_numpy(learner.network.outputs(state.layers[-1])).copy()
    return scores, None if state.stats is None else state.stats.per_sample.max(axis=0)
