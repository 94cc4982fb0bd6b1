"""What a training comes to: loss and accuracy over the images of a split, and how a run ended."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.batch import shared_out
from cupyep.data import Loader
from cupyep.errors import ConvergenceWarning
from cupyep.parallel import Communicator

LONGER = 10  # times the steps of training: is a network at rest?


@dataclasses.dataclass
class TrainSummary:
    """How a run ended.

    Attributes
    ----------
    epoch : int
        The last one.
    test_accuracy, test_loss : float
        After the last epoch; the accuracy in [0, 1].
    best_accuracy, best_epoch : float, int
        Of the validation images where there are some, else of the test images.
    best_test_accuracy : float
        Of the test images after the best epoch.
    best_split : {"validation", "test"}
        Which of the two.
    elapsed_s : float
        All epochs together, those before a resume included.
    path : Path or None
        The run directory.
    rest : dict or None
        `at_rest` of test images after the last epoch; None of a learner that does not settle, and where a callback
        ended the run.
    """

    epoch: int
    test_accuracy: float
    test_loss: float
    best_accuracy: float
    best_epoch: int
    best_test_accuracy: float
    best_split: str
    elapsed_s: float
    path: Path | None
    rest: dict[str, Any] | None = None

    def __str__(self) -> str:
        text = (
            f"test accuracy {self.test_accuracy:.2%} after the last epoch, {self.epoch}; "
            f"{self.best_test_accuracy:.2%} after epoch {self.best_epoch} (best.h5, chosen by {self.best_split} "
            f"accuracy {self.best_accuracy:.2%}); {f'{rest_text(self.rest)}; ' if self.rest else ''}"
            f"{self.elapsed_s / 60:.1f} minutes"
        )
        return text if self.path is None else f"{text}, run directory {self.path}"

    def values(self) -> dict[str, Any]:
        """Return all of it by name, ready for JSON."""
        return {**dataclasses.asdict(self), "path": None if self.path is None else str(self.path)}


def evaluate(
    learner: Any, batches: Iterable[Any], communicator: Communicator | None = None, top: int = 0
) -> tuple[float, ...]:
    """Return how well `learner` does on labelled images.

    Parameters
    ----------
    learner : Learner
    batches : iterable of Batch
        Of a `Loader` without augmentation.
    communicator : Communicator, optional
        Of several ranks, each of which has its share of every batch; the figures are those of all.
    top : int, default 0
        If not 0, look also for the label among so many highest scores.

    Returns
    -------
    loss, accuracy : float
        Mean readout loss; fraction of right answers in [0, 1].
    top_accuracy : float
        Only with `top`: the fraction whose label is among the highest scores.
    """
    loss, correct, hits, count = 0.0, 0, 0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for batch in batches:
            own, _ = shared_out(batch)
            if own == 0:
                continue
            if top:
                scores = learner.scores(batch)
                hits = hits + _hits(learner, scores, batch, top)
                batch_loss, batch_correct = learner.judge(scores, batch)
            else:
                batch_loss, batch_correct = learner.evaluate(batch)
            loss, correct, count = loss + batch_loss, correct + batch_correct, count + own
    ranks = (communicator or Communicator()).gather((float(loss), int(correct), int(hits), count))
    loss, correct, hits, count = map(sum, zip(*ranks, strict=True))
    return (loss / count, correct / count, hits / count)[: 3 if top else 2]


def _hits(learner: Any, scores: Any, batch: Any, k: int) -> Any:
    """Return the number of samples whose scores are finite and whose label is among the `k` highest."""
    device = learner.network.device
    own = scores[device.xp.arange(len(batch)), device.asarray(batch.labels)]
    finite = device.xp.isfinite(scores).all(axis=1)
    return (((scores > own[:, None]).sum(axis=1) < k) & finite).sum()


def at_rest(
    learner: Any, batches: Loader, communicator: Communicator | None = None, watched: Callable[[Any], Any] = iter
) -> dict[str, Any]:
    """Return how many ``images`` there are, and the accuracy ``as_trained`` and settled ``longer``, `LONGER` times.

    `communicator` as in `evaluate`; `watched` is asked for the batches each time.
    """
    steps = learner.free_steps
    found: dict[str, Any] = {"images": len(batches.split)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for name, times in (("as_trained", 1), ("longer", LONGER)):
                learner.free_steps = times * steps
                found[name] = evaluate(learner, watched(batches), communicator)[1]
    finally:
        learner.free_steps = steps
    return found


def rest_text(rest: Mapping[str, Any]) -> str:
    """Return what `at_rest` found, in words."""
    return (
        f"at rest {rest['longer']:.2%} of {rest['images']} images ({LONGER} times the steps; {rest['as_trained']:.2%} "
        "as trained)"
    )
