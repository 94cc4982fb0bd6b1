"""Two classes of tiny images, a tiny network, and a learner of one number, for the tests of `cupyep.training`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from small import gradients_of

import cupyep as ep
from cupyep.data import Dataset, Split
from cupyep.learning.learner import StepResult
from cupyep.training import runs
from cupyep.training.config import make_config
from cupyep.training.display import Display
from cupyep.training.trainer import Trainer

TIMES = {"images_per_s", "threads", "elapsed_s", "peak_memory_bytes"}
TINY = {"arch": "vgg5", "width": 0.02, "free_steps": 6, "nudged_steps": 4, "batch_size": 16, "device": "cpu"}


def quadrant_data(train=40, test=20, flip=True):
    """Two classes of 16 x 16 images: the upper or the lower half is brighter. Mirroring keeps the class."""
    rng = np.random.default_rng(5)

    def split(name, count):
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, 16, 16, 3))
        for image, label in zip(images, labels, strict=True):
            image[8 * label : 8 * label + 8] += 120
        return Split(name, images.astype(np.uint8), labels.astype(np.int64))

    return Dataset.from_splits("quadrants", ("up", "down"), split("train", train), split("test", test), flip, pad=2)


class Recorder(Display):
    """Keeps what is shown, as (event, text, values)."""

    def __init__(self):
        super().__init__(quiet=False)
        self.events = []

    def _emit(self, event, text, values):
        self.events.append((event, text, values))

    def texts(self, event):
        return [text for name, text, _ in self.events if name == event]


SILENT = Display(quiet=True, write=lambda _: None)


def run(values, path, **more):
    """Return the trainer of a new run in `path` (with the fixture `quadrants`)."""
    return runs.start_run(make_config(TINY, values), path, display=SILENT, **more)


def numbers(directory):
    """Return the records of a run without what depends on the clock."""
    return [{key: value for key, value in r.items() if key not in TIMES} for r in directory.metrics()]


def assert_same_state(one, two):
    """Two checkpoints hold the same state, bit for bit."""
    for group in ("parameters", "optimizer", "statistics"):
        first, second = getattr(one, group), getattr(two, group)
        assert set(first) == set(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
            assert first[name].dtype == second[name].dtype, name
    for name in ("generators", "epoch", "batch", "best_accuracy", "best_epoch", "halvings"):
        assert getattr(one, name) == getattr(two, name), name


class FakeLearner:
    """Gradient 1 for one number; test accuracies as listed."""

    def __init__(self, accuracies):
        self.parameter = np.zeros(1)
        graph = ep.Graph([ep.Linear((1,), 1)])
        description = {"describe": lambda: {"classes": 3}, "config": {}}
        self.network = SimpleNamespace(device=ep.get_device("cpu"), graph=graph, **description)
        self.signals = [ep.LocalError([1], kappa=0.8)]
        self.kappas = []
        self.accuracies = list(accuracies)

    def parameters(self):
        return {"layers.1.weight": self.parameter}

    def step(self, batch):
        self.kappas.append(self.signals[0].kappa)
        zero = np.zeros(1)
        levels = (zero, zero, zero)
        return StepResult(
            gradients_of({"layers.1.weight": np.ones(1)}), np.asarray(1.0), np.asarray(0), len(batch), *levels
        )

    def evaluate(self, batch):
        return np.asarray(2.0 * len(batch)), np.asarray(round(self.accuracies.pop(0) * len(batch)))


class FakeBatches(list):
    generator = np.random.default_rng(0)

    @property
    def split(self):
        return [x for batch in self for x in batch]

    def batches(self, first=0):
        return iter(self[first:])


def fake_trainer(accuracies=(0.5, 0.75, 0.75), **more):
    learner = FakeLearner(accuracies)
    optimizer = ep.SGD(learner.parameters(), 0.1, momentum=0.0)
    batches = FakeBatches([range(4), range(4)])
    more = {"epochs": len(accuracies), "display": SILENT} | more
    return Trainer(learner, optimizer, batches, FakeBatches([range(4)]), **more)
