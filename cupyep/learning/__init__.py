"""Gradients by Equilibrium Propagation, backpropagation through time and feed-forward backpropagation, compared."""

from cupyep.learning.backprop import Backpropagation
from cupyep.learning.bptt import BackpropagationThroughTime
from cupyep.learning.check import check_gradients
from cupyep.learning.custom import check_activation, check_edge, check_signal
from cupyep.learning.equilibrium import EquilibriumPropagation
from cupyep.learning.gradients import Gradients
from cupyep.learning.learner import Learner, StepResult

__all__ = [
    "Backpropagation",
    "BackpropagationThroughTime",
    "EquilibriumPropagation",
    "Gradients",
    "Learner",
    "StepResult",
    "check_activation",
    "check_edge",
    "check_gradients",
    "check_signal",
]
