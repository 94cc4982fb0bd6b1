"""The paper's experiments and this project's own, each run by one command: ``cupyep reproduce NAME``."""

from __future__ import annotations

from cupyep.errors import choose
from cupyep.experiments.costs import COST
from cupyep.experiments.design import SCALES, Experiment, Results
from cupyep.experiments.feedback import ACTIVATIONS, FEEDBACK
from cupyep.experiments.headline import VGG7, VGG12
from cupyep.experiments.memory import MEMORY
from cupyep.experiments.nudges import FIDELITY, NUDGE
from cupyep.experiments.report import write_report
from cupyep.experiments.running import load_results, reproduce
from cupyep.experiments.signals import BASELINE, KAPPA, KD_VARIANTS, PLACEMENT, SIGNALS, VANISHING

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "Results", "find", "load_results", "reproduce", "write_report"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        BASELINE,
        VANISHING,
        SIGNALS,
        PLACEMENT,
        KAPPA,
        KD_VARIANTS,
        ACTIVATIONS,
        FEEDBACK,
        NUDGE,
        FIDELITY,
        MEMORY,
        COST,
        VGG7,
        VGG12,
    )
}


def find(name: str) -> Experiment:
    """Return the experiment of that name; `ConfigurationError` with the nearest name if there is none."""
    return EXPERIMENTS[choose("experiment", name, EXPERIMENTS)]
