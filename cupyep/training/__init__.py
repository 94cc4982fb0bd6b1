"""Training: configuration, run directory, trainer, display, teachers."""

from cupyep.training.config import TrainConfig, make_config, read_toml
from cupyep.training.fit import FitResult, fit
from cupyep.training.results import TrainSummary, evaluate
from cupyep.training.run_directory import RunDirectory
from cupyep.training.runs import evaluate_run, resume_run, start_run
from cupyep.training.teacher import export_logits, feedforward, teacher_config, train_teacher
from cupyep.training.trainer import Trainer

__all__ = [
    "FitResult",
    "RunDirectory",
    "TrainConfig",
    "TrainSummary",
    "Trainer",
    "evaluate",
    "evaluate_run",
    "export_logits",
    "fit",
    "feedforward",
    "make_config",
    "read_toml",
    "resume_run",
    "start_run",
    "teacher_config",
    "train_teacher",
]
