"""The paper's experiments and this project's own, each run by one command: ``cupyep reproduce NAME``.

An experiment is a TOML file of this folder (`loading` says what it holds); what a cell measures is in `cells`, what is
read out of it in `findings`.
"""

from __future__ import annotations

from cupyep.errors import choose
from cupyep.experiments.design import SCALES, Experiment, Results
from cupyep.experiments.loading import load_experiments
from cupyep.experiments.report import write_report
from cupyep.experiments.runner import load_results, reproduce

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "Results", "find", "load_results", "reproduce", "write_report"]

EXPERIMENTS: dict[str, Experiment] = load_experiments()


def find(name: str) -> Experiment:
    """Return the experiment of that name; `ConfigurationError` with the nearest name if there is none."""
    return EXPERIMENTS[choose("experiment", name, EXPERIMENTS)]
