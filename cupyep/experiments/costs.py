"""What learning costs: seconds and operations to an accuracy, by schedule and algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cupyep.experiments import figures
from cupyep.experiments.design import Cell, Column, Experiment, Results, Row
from cupyep.experiments.signals import PAPER, SMALL
from cupyep.experiments.trained import TEST_ACCURACY, TRAIN_LOSS, train_cell
from cupyep.learning import Learner
from cupyep.learning.operations import OperationCounter
from cupyep.network import Network
from cupyep.training.config import TrainConfig

TARGET = 0.35  # test accuracy


def cost_cell(cell: Cell) -> dict[str, Any]:
    """Train, counting the operations of every epoch (its evaluation included)."""
    counters: list[OperationCounter] = []

    def count(network: Network, config: TrainConfig) -> dict[str, Any]:
        found, counters[-1].operations = counters[-1].operations, 0
        return {"operations": found}

    def prepare(learner: Learner) -> None:
        counters.append(OperationCounter(learner))

    return train_cell(cell, count, every_epoch=True, prepare=prepare)


def epochs_to_target(cell: Mapping[str, Any]) -> int | None:
    """Return the first epoch after which the test accuracy was `TARGET` or more, None if none was."""
    course = cell.get("test_accuracy", [])
    return next((epoch for epoch, accuracy in enumerate(course, 1) if accuracy >= TARGET), None)


def minutes_to_target(cell: Mapping[str, Any]) -> float | None:
    epoch = epochs_to_target(cell)
    return None if epoch is None else cell["elapsed_minutes"][epoch - 1]


def operations_to_target(cell: Mapping[str, Any]) -> float | None:
    """Return the operations of all products until `TARGET` was reached, in units of 10^12."""
    epoch = epochs_to_target(cell)
    return None if epoch is None else math.fsum(probe["operations"] for probe in cell["probes"][:epoch]) / 1e12


def _verdict(results: Results) -> str:
    minutes = {row.key: results.mean(row.key, minutes_to_target) for row in results.rows}
    labels = {row.key: row.label for row in results.rows}
    reached = {key: value for key, value in minutes.items() if not math.isnan(value)}
    if not reached:
        return f"None reaches {TARGET:.0%} here."
    ranked = sorted(reached, key=reached.get)
    missed = [labels[key] for key in minutes if key not in reached]
    tail = f"; not reached by {', '.join(missed)}" if missed else ""
    order = "; ".join(f"{labels[key]}: {reached[key]:.2f}" for key in ranked)
    return f"Minutes to {TARGET:.0%} test accuracy, fastest first: {order}{tail}."


STRONG = {"feedback": 1.0, "gain": 0.6}
WEAK = {"feedback": 0.1, "gain": 1.2, "free_steps": 2, "nudged_steps": 2}
SYNCHRONOUS = {"schedule": "synchronous", "free_steps": 60, "nudged_steps": 20}
EVENODD = {**STRONG, "schedule": "evenodd", "relaxation": 1.0, "free_steps": 30, "nudged_steps": 10}
RELAXED = {**EVENODD, "relaxation": 1.6, "free_steps": 16, "nudged_steps": 8}
ROWS = (
    Row("synchronous", "EP, synchronous, 60 + 20 steps", {**STRONG, **SYNCHRONOUS}),
    Row("evenodd", "EP, even/odd, 30 + 10 iterations", EVENODD),
    Row("relaxed", "EP, even/odd over-relaxed, 16 + 8 iterations", RELAXED),
    Row("tolerance", "EP, the same to a residual of 1e-3", {**RELAXED, "free_steps": 60, "tolerance": 1e-3}),
    Row("sweeps", "EP, 6 + 3 sweeps", {**STRONG, "free_steps": 6, "nudged_steps": 3}),
    Row("weak", "EP, lambda 0.1, 2 + 2 sweeps", WEAK),
    Row("weak-one", "EP, lambda 0.1, 2 + 1 sweeps", {**WEAK, "nudged_steps": 1}),
    Row("weak-least", "EP, lambda 0.1, 1 + 1 sweeps", {**WEAK, "free_steps": 1, "nudged_steps": 1}),
    Row("tangent", "EP, lambda 0.1, 2 + 2 sweeps, tangent", {**WEAK, "scheme": "tangent"}),
    Row("bptt", "BPTT, 60 + 20 steps", {**STRONG, **SYNCHRONOUS, "algorithm": "bptt"}),
    Row("bp", "BP", {"feedback": 0.1, "gain": 1.2, "algorithm": "bp"}),
)  # fmt: skip

COST = Experiment(
    name="cost",
    title="time and products to an accuracy",
    claim=f"EP pays for its memory with settling ({PAPER}); even/odd updates, over-relaxation, a tolerance and weak "
    "feedback each take off a part of that.",
    setting={
        "small": "VGG-5 of 32 to 128 channels, CIFAR-10 reduced to 16 x 16 pixels, 4000 training and 1000 test images, "
        "6 epochs of batches of 32, crop and flip, Adam 1e-3 with a cosine, no signals. Nudged phases start at "
        "the free state, deviation form.",
        "full": "VGG-5, full width, CIFAR-10, 30 epochs, no signals, deviation form.",
    },
    base={
        "small": {
            **{name: SMALL[name] for name in ("dataset", "image_size", "limit_test", "schedule", "beta")},
            "batch_size": 32,
            "arch": "vgg5",
            "width": 0.25,
            "limit_train": 4000,
            "epochs": 6,
        },
        "full": {"arch": "vgg5", "dataset": "cifar10", "schedule": "sweeps", "epochs": 30},
    },
    rows={"small": ROWS, "full": ROWS},
    seeds={"small": 1, "full": 1},
    measure=cost_cell,
    columns=(
        Column(f"epochs to {TARGET:.0%}", epochs_to_target, ".1f"),
        Column("minutes", minutes_to_target, ".2f"),
        Column("10^12 operations", operations_to_target, ".2f"),
        TRAIN_LOSS,
        TEST_ACCURACY,
    ),
    figures={"courses": figures.courses("train_loss", "test_accuracy")},
    verdict=_verdict,
    remarks="Operations are those of all products of the edges (a multiply and an add are two), counted "
    "from the orders of update (of an epoch that was stopped and went on, only those since then); minutes are those of "
    "the machine named below. Both include the evaluation after every epoch. With one seed an epoch more or less to "
    "the target is chance.",
)
