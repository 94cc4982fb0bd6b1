"""Which class is taken for which: the test images settled with the best checkpoint of a run, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupyep.files import can_write, read_json, write_json
from cupyep.heads import ranked
from cupyep.training.build import evaluation_batches
from cupyep.training.display import Display
from cupyep.training.run_directory import RunDirectory
from cupyep.training.trained import load_trained

CONFUSION = "confusion.json"


def confusion_of(
    run: RunDirectory, given: Mapping[str, Any] | None = None, display: Display | None = None
) -> tuple[np.ndarray, list[str]]:
    """Return the confusion matrix of the best checkpoint of `run`, and the names of the classes.

    It costs as much as an evaluation, and is kept in confusion.json until there is a better checkpoint. Options `given`
    may differ from the run's: ``data_dir``, ``batch_size``, ``device``.

    The matrix, int64 (classes, classes), has the numbers of test images of a class (row) that are taken for a class
    (column). `CupyepError` if there is no best checkpoint, the data set is not there, or scores are not finite.
    """
    epoch = run.load("best").epoch
    kept = _kept(run, epoch)
    if kept is not None:
        return kept
    trained = load_trained(run.path, "best", given)
    batches = evaluation_batches(trained.config, trained.dataset(), trained.network, "test")
    matrix = np.zeros((trained.network.classes,) * 2, np.int64)
    for batch in (display or Display()).over(batches, "test images"):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            scores = trained.network.device.to_numpy(trained.learner.scores(batch))
        np.add.at(matrix, (batch.labels, ranked(scores)[:, 0]), 1)
    classes = list(trained.images.classes)
    if can_write(run.path):
        write_json(run.path / CONFUSION, {"epoch": epoch, "classes": classes, "matrix": matrix.tolist()})
    return matrix, classes


def _kept(run: RunDirectory, epoch: int) -> tuple[np.ndarray, list[str]] | None:
    """Return what confusion.json holds if it is of that epoch and sound: it is made anew otherwise."""
    path = run.path / CONFUSION
    try:
        content = read_json(path, 1 << 24)
        matrix, classes = np.array(content["matrix"]), [str(name) for name in content["classes"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = matrix.dtype.kind == "i" and matrix.shape == (len(classes),) * 2 and matrix.sum() > 0 and matrix.min() >= 0
    return (matrix, classes) if sound and content.get("epoch") == epoch else None
