"""cupyep: Equilibrium Propagation with intermediate learning signals for deep convolutional convergent RNNs."""

from cupyep import plots
from cupyep._version import __version__
from cupyep.activations import ACTIVATIONS, Activation, Clip, Tanh, get_activation
from cupyep.backend import Device, array_module, get_device, gpu_status
from cupyep.backend.threads import get_threads, set_threads
from cupyep.batch import Batch
from cupyep.data import DATASETS, Dataset, Loader, TeacherFile, TeacherWriter, load_dataset
from cupyep.energy import HopfieldEnergy
from cupyep.errors import (
    CheckpointError,
    ConfigurationError,
    ConvergenceWarning,
    CupyepError,
    DataError,
    DeviceError,
    DivergenceError,
    GraphWarning,
    PrecisionWarning,
    TeacherError,
)
from cupyep.graph import Connection, Graph
from cupyep.heads import Head, LossTerm, Nudge
from cupyep.layers import Conv2d, Edge, Identity, Linear
from cupyep.learning import (
    Backpropagation,
    BackpropagationThroughTime,
    EquilibriumPropagation,
    StepResult,
    check_activation,
    check_edge,
    check_gradients,
    check_signal,
)
from cupyep.losses import CrossEntropy, SquaredError
from cupyep.models import ARCHITECTURES, build, vgg
from cupyep.network import Network
from cupyep.optim import SGD, Adam, AdamW
from cupyep.plugins import register_activation, register_architecture, register_signal
from cupyep.settling import SettleStats
from cupyep.signals import Augmenter, Distillation, FeatureDistillation, LocalError
from cupyep.state import State
from cupyep.training.fit import FitResult, fit

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "Activation",
    "Adam",
    "AdamW",
    "Augmenter",
    "Backpropagation",
    "BackpropagationThroughTime",
    "Batch",
    "CheckpointError",
    "Clip",
    "ConfigurationError",
    "ConvergenceWarning",
    "Conv2d",
    "CrossEntropy",
    "CupyepError",
    "DATASETS",
    "DataError",
    "Dataset",
    "Device",
    "DeviceError",
    "Distillation",
    "DivergenceError",
    "Edge",
    "HopfieldEnergy",
    "Connection",
    "Graph",
    "EquilibriumPropagation",
    "FeatureDistillation",
    "FitResult",
    "GraphWarning",
    "Head",
    "Identity",
    "Linear",
    "Loader",
    "LocalError",
    "LossTerm",
    "Network",
    "Nudge",
    "PrecisionWarning",
    "SGD",
    "SettleStats",
    "SquaredError",
    "State",
    "StepResult",
    "Tanh",
    "TeacherError",
    "TeacherFile",
    "TeacherWriter",
    "__version__",
    "array_module",
    "build",
    "check_activation",
    "check_edge",
    "check_gradients",
    "check_signal",
    "fit",
    "get_activation",
    "get_device",
    "get_threads",
    "gpu_status",
    "load_dataset",
    "plots",
    "register_activation",
    "register_architecture",
    "register_signal",
    "set_threads",
    "vgg",
]
