"""`TrainConfig`: every option of ``cupyep train`` in one table, and its TOML form (config.toml, recipes).

One field is one option: its default, its help line, its group in ``--help-all`` and the rule that its values obey. The
command line is generated from this table, recipes and config.toml use the same names, one function writes all messages.
What an option `needs` is in its field, too: given where it would change nothing, it is refused (`require_used`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from cupyep.activations import ACTIVATIONS
from cupyep.backend import PRECISIONS
from cupyep.data import DATASETS
from cupyep.data.sources import absolute_name, check_dataset
from cupyep.diagnostics.pace import ON_UNSETTLED
from cupyep.errors import ConfigurationError, nearest, require
from cupyep.files import expanded, read_text
from cupyep.learning.equilibrium import FORMS, SCHEMES
from cupyep.losses import LOSSES
from cupyep.models import ARCHITECTURES, architecture
from cupyep.optim import LR_SCHEDULES, OPTIMIZERS
from cupyep.plugins import SIGNALS as AUGMENTERS
from cupyep.settling import (
    SCHEDULES,
    UNROLLED_STEPS,
    WEAK,
    check_betas,
    check_relaxation,
    default_beta,
    default_relaxation,
    default_steps,
)
from cupyep.signals import ANNEALINGS
from cupyep.training.divergence import ON_DIVERGENCE
from cupyep.training.options import checked, missing, option
from cupyep.weights import PARAMETRISATIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOML_BYTES = 1 << 15  # of a recipe or config.toml, at most
DOTS = 200  # in a line; the parser's memory grows with the square of the parts of a name
MOST_LAYERS = 10000
AUTO = "auto"  # steps that follow the settling
WRITTEN = "# Written by cupyep"  # how the config.toml of a run begins


def check_readout_pool(value: str, name: str) -> None:
    """Raise ConfigurationError unless `value` is ``"global"`` or a positive integer as text."""
    number = value.isdecimal() and len(value) < 7 and int(value) > 0
    require(value == "global" or number, f"{name} must be global or the side of a window, such as 2 (got '{value}')")


NETWORK, DATA, GRADIENT, SIGNALS, OPTIMIZER, RUN = (
    partial(option, group) for group in ("Network", "Data", "Gradient", "Intermediate signals", "Optimizer", "Run")
)


@dataclass
class TrainConfig:
    """Every option of a training run; the fields are described by ``cupyep train --help-all``.

    Raises
    ------
    ConfigurationError
        On construction, if a value breaks the rule of its option or two options contradict each other.
    """

    # A default of None that the type has not is replaced: `__post_init__` chooses.
    # fmt: off
    arch: str = NETWORK("vgg5", str, "Architecture, by name or as a text: '32 32p 64s 64+64' are convolutions with "
                        "so many channels, s stride 2, p pooling, + a residual block; mlp:512,512 dense layers.",
                        choices=ARCHITECTURES, check=architecture)
    width: float = NETWORK(1.0, float, "Multiplies the number of channels of every layer.", above=0)
    activation: str = NETWORK(None, str, "Activation of the states; unset: that of the architecture, "
                              "hard_sigmoid, but relu6 of hopfield-resnet13 and relu of resnet9, resnet18.",
                              choices=ACTIVATIONS)
    weights: str = NETWORK(None, str, "plain: weights are trained as they are; standardized: filter by filter "
                           "of mean 0, with a gain a channel that is trained, or fixed; unset: plain, but "
                           "standardized of resnet9, resnet18.", choices=tuple(PARAMETRISATIONS))
    readout_pool: str | None = NETWORK(None, str, "The softmax readout sees averages of the last map over N x N "
                                       "pixels, or global ones; unset: the map, but global of resnet9 and resnet18.",
                                       check=check_readout_pool, needs=("readout",))
    pooling: str = NETWORK("max", str, "Pooling of the convolutions.", choices=("max", "average"))
    loss: str = NETWORK("cross_entropy", str, "cross_entropy: a softmax readout on top; squared_error: the output "
                        "layer is a state.", choices=LOSSES)
    gain: float | list[float] | None = NETWORK(None, list, "Gain of the initial weights, one number or one a layer; "
                                               "unset: chosen for activation and feedback.", above=0, needs=("drawn",))
    lsuv: bool = NETWORK(False, bool, "Scale the initial weights until the drive of every layer has unit variance on "
                         "the first images (LSUV).", needs=("drawn",))
    init_from: str | None = NETWORK(None, str, "Start from the weights of this file (.h5 of a network or checkpoint, "
                                    ".npz or .safetensors of cupyep export); unset: they are drawn.")
    feedback: float = NETWORK(WEAK, float, "Feedback weight lambda: 1 is the Hopfield network of the papers, "
                              "towards 0 backpropagation.", above=0, high=1, needs=("feedback",))

    dataset: str = DATA("cifar10", str, "Data set, by name or of your own: file:PATH (.npz, .h5 with x and y) or "
                        "folder:PATH (pictures, a sub-folder a class).", choices=DATASETS, check=check_dataset)
    data_dir: str | None = DATA(None, str, "Folder with the data set's files; unset: $CUPYEP_DATA or the user's cache.",
                                machine=True)
    image_size: int | None = DATA(None, int, "Resize the images to N x N pixels; unset: as they are, pictures of a "
                                  "folder 32 x 32.", low=1, needs=("sizes",))
    limit_train: int | None = DATA(None, int, "Use N training images, the first of each class, equally many of each; "
                                   "unset: all.", low=1)
    limit_test: int | None = DATA(None, int, "Use N test images, the first of each class, equally many of each; "
                                  "unset: all.", low=1)
    validation: int | None = DATA(None, int, "Hold N training images out, equally many of each class (of your own data "
                                  "in their proportions), drawn by the seed, and choose best.h5 by them; unset: none, "
                                  "the test images choose it.", low=1)
    test_fraction: float = DATA(0.2, float, "Share of your own images that is for testing, of each class alike, drawn "
                                "by the seed, where none are set apart.", above=0, below=1, needs=("own data",))
    class_weights: str = DATA("none", str, "balanced: classes of few images weigh as much as others, by being shown "
                              "more often; every epoch draws anew.", choices=("none", "balanced"))
    crop: bool = DATA(True, bool, "Random crops of the padded training images.")
    flip: bool = DATA(True, bool, "Random horizontal flips (never for digits and house numbers).", needs=("mirrored",))
    cutout: int | None = DATA(None, int, "Hide a square of N x N pixels in every training image, anywhere (cutout); "
                              "unset: none.", low=1)

    algorithm: str = GRADIENT("ep", str, "ep: Equilibrium Propagation; bptt: backpropagation through time; bp: "
                              "feed-forward backpropagation.", choices=("ep", "bptt", "bp"))
    beta: float = GRADIENT(None, float, "Strength of the nudge; unset: 0.05, 0.5 with a feedback above 0.3.", above=0,
                           needs=("ep", "finite"))
    free_steps: int | str = GRADIENT(None, int, "Steps of the free phase (the most, with --tolerance); unset: 2 "
                                     "sweeps, 6 with a feedback above 0.3, 60 of the other schedules.", low=1,
                                     word=AUTO, word_text=", or auto: after every epoch as many as it was found "
                                     "to need", needs=("settling",))
    nudged_steps: int | str = GRADIENT(None, int, "Steps of a nudged phase (of bptt those unrolled); unset: 1 "
                                       "sweep, 2 with a feedback above 0.03, 4 above 0.3, 20 otherwise.", low=1,
                                       word=AUTO, word_text=", or auto", needs=("settling",))
    on_unsettled: str = GRADIENT("warn", str, "With auto steps, when a phase does not contract or needs more than 8 "
                                 "sweeps (200 other steps): say so, also halve the feedback, or also stop.",
                                 choices=ON_UNSETTLED, needs=("auto",))
    schedule: str = GRADIENT("sweeps", str, "Order in which layers are updated.", choices=SCHEDULES,
                             needs=("settling",))
    relaxation: float = GRADIENT(None, float, "How far an update goes, in terms of what the rule says: above 1 "
                                 "evenodd settles strong feedback in fewer steps; unset: 1.6 for evenodd with "
                                 "a feedback above 0.3, 1 otherwise.", above=0, below=2, needs=("settling",))
    tolerance: float | None = GRADIENT(None, float, "End a phase when the residual is below this; unset: "
                                              "never.", above=0, needs=("settling",))
    scheme: str = GRADIENT("centered", str, "Which nudged phases estimate the gradient.", choices=SCHEMES,
                           needs=("ep",))
    nudge: str = GRADIENT("deviation", str, "Nudged phases as states (classical) or as deviations from the free state.",
                          choices=FORMS, needs=("ep",))

    aug: str = SIGNALS("none", str, "No signals, le (local error) or kd (knowledge distillation).",
                       choices=AUGMENTERS)
    signal_layers: str = SIGNALS("all", str, "Layers with a signal, such as 2,3,4 or 2-5 or all; "
                                "of a network with skips also names of nodes.", needs=("signal",))
    kappa: float = SIGNALS(0.1, float, "Weight of the signals at the start.", low=0, needs=("signal",))
    kappa_annealing: str = SIGNALS("cosine", str, "Course of kappa over the training.", choices=ANNEALINGS,
                                   needs=("signal",))
    signal_loss: str = SIGNALS("cross_entropy", str, "Loss of the signals.", choices=LOSSES, needs=("mapped", "maps"))
    signal_pool: int | None = SIGNALS(None, int, "Average a state over N x N pixels before its signal's map.", low=1,
                                      needs=("mapped", "maps"))
    temperature: float = SIGNALS(1.0, float, "Temperature of the teacher's outputs (kd).", above=0,
                                 needs=("kd", "maps", "softmax"))
    learned_maps: bool = SIGNALS(None, bool, "Learn the maps of the signals instead of fixing them; unset: kd "
                                 "learns them, le does not.", needs=("mapped", "maps"))
    teacher_features: bool = SIGNALS(False, bool, "Follow the teacher's own activations of the same shape, unweighted, "
                                     "instead of its outputs (kd; needs --no-crop).", needs=("kd",))
    teacher: str | None = SIGNALS(None, str, "Teacher file (kd); unset: train one by backpropagation.", needs=("kd",),
                                  machine=True)
    teacher_epochs: int = SIGNALS(30, int, "Epochs of the teacher that kd trains without --teacher.", low=1,
                                  needs=("kd", "own teacher"))

    epochs: int = OPTIMIZER(10, int, "Number of passes over the training images.", low=1)
    batch_size: int = OPTIMIZER(128, int, "Images in a batch.", low=1)
    micro_batch: int | None = OPTIMIZER(None, int, "Process a batch in parts of at most N images, to save memory; "
                                        "gradients are those of the whole batch; unset: at once.", low=1)
    optimizer: str = OPTIMIZER("adam", str, "Optimizer.", choices=tuple(OPTIMIZERS))
    learning_rate: float | list[float] = OPTIMIZER(1e-3, list, "Learning rate, one number or one a layer, readout "
                                                   "last.", above=0)
    lr_schedule: str = OPTIMIZER("cosine", str, "Course of the learning rate; step: a tenth from 1/2 of the run, and "
                                 "again from 3/4.", choices=tuple(LR_SCHEDULES))
    warmup: float = OPTIMIZER(0.0, float, "Epochs in which the learning rate rises from 0 to that of its schedule.",
                              low=0)
    momentum: float = OPTIMIZER(0.9, float, "Momentum of sgd.", low=0, below=1, needs=("sgd",))
    nesterov: bool = OPTIMIZER(False, bool, "Nesterov's form of the momentum.", needs=("sgd",))
    weight_decay: float = OPTIMIZER(None, float, "L2 penalty on every parameter, decoupled from the gradient by "
                                    "adamw; unset: 0, but 0.01 of adamw.", low=0)
    clip_unit_norm: float | None = OPTIMIZER(None, float, "Clip the gradient of every unit (filter) to so many times "
                                             "the norm of its weights, such as 0.02 (AGC); unset: no.", above=0)
    label_smoothing: float = OPTIMIZER(0.0, float, "Part of a training label that goes to all classes alike, such as "
                                       "0.1.", low=0, below=1)
    ema: float | None = OPTIMIZER(None, float, "Judge and keep a running average of the parameters with this decay, "
                                  "such as 0.999, instead of the parameters themselves; unset: no.", above=0, below=1)
    patience: int | None = OPTIMIZER(None, int, "Stop after so many epochs without a better accuracy of what chooses "
                                     "best.h5 (--validation); unset: never.", low=1)

    seed: int = RUN(0, int, "Seed of weights, signal maps, order of the images and their crops.", low=0)
    device: str = RUN("auto", str, "What computes: auto (a GPU if one can be used, else the CPU), cpu, cuda or cuda:N.",
                      machine=True)
    scratch_mb: float | None = RUN(None, float, "Scratch of a chunk of a batch in MB: more is fewer, larger products, "
                                   "outside the cache; unset: what stays in it.", above=0, below=1e6, machine=True)
    precision: str = RUN("float32", str, "Number format; parameters and optimizer are float32 in all but float64.",
                         choices=PRECISIONS)
    exact: bool = RUN(False, bool, "Direct sums in place of Winograd's products, which a CPU takes in float32: slower, "
                      "with a tenth of the rounding; always so with --nudge classical.")
    checkpoint_minutes: float = RUN(10.0, float, "Save the run every so many minutes, besides after every epoch; 0 is "
                                    "after every batch.", low=0)
    on_divergence: str = RUN("stop", str, "When numbers stop being finite or the loss stays far above its start: stop, "
                             "or go back to the end of the last epoch and halve the learning rate (up to five times).",
                             choices=ON_DIVERGENCE)
    plugin: str | None = RUN(None, str, "Python module, or file .py, that registers architectures, activations, "
                             "signals of your own; imported because you name it here, never because a run or recipe "
                             "does; unset: none.")
    # fmt: on

    def __post_init__(self) -> None:
        for spec in fields(self):
            setattr(self, spec.name, checked(spec, getattr(self, spec.name), option_name(spec.name), self.plugin))
        self.dataset = absolute_name(self.dataset)
        self.data_dir = self.data_dir and os.path.abspath(expanded(self.data_dir))  # from wherever the run goes on
        own = architecture(self.arch)
        self.activation, self.weights = self.activation or own.activation, self.weights or own.weights
        if self.weight_decay is None:
            self.weight_decay = 0.01 if self.optimizer == "adamw" else 0.0
        require(
            self.warmup <= self.epochs, f"--warmup must be at most the {self.epochs} --epochs (got {self.warmup:g})"
        )
        require(not self.nesterov or self.momentum > 0, "--nesterov needs a --momentum above 0")
        require(
            not (self.teacher_features and (self.crop or self.cutout) and self.aug == "kd"),
            "--teacher-features needs --no-crop and no --cutout: a teacher's activations belong to the image as it is",
        )
        parse_layers(self.signal_layers, sys.maxsize, None)
        self.learned_maps = self.aug == "kd" if self.learned_maps is None else self.learned_maps
        free, nudged = default_steps(self.schedule, self.feedback)
        nudged = UNROLLED_STEPS if self.algorithm == "bptt" else nudged
        self.free_steps, self.nudged_steps = self.free_steps or free, self.nudged_steps or nudged
        auto = AUTO in (self.free_steps, self.nudged_steps)
        require(not auto or self.tolerance is None, "--tolerance ends every phase by itself: give it, or auto steps")
        require(self.nudged_steps != AUTO or self.algorithm != "bptt", "--nudged-steps auto needs --algorithm ep")
        self.beta = self.beta or default_beta(self.feedback)
        self.relaxation = self.relaxation or default_relaxation(self.schedule, self.feedback)
        check_relaxation(self.relaxation, self.schedule)
        if self.algorithm == "ep":
            check_betas([self.beta], self.loss, self.scheme == "tangent")

    def take(self, *names: str) -> dict[str, Any]:
        """Return the options of some names, for whatever takes arguments called like them; auto steps as they begin."""
        steps = default_steps(self.schedule, self.feedback)
        begin = dict(zip(("free_steps", "nudged_steps"), steps, strict=True))
        values = {name: getattr(self, name) for name in names}
        return {name: begin[name] if name in begin and value == AUTO else value for name, value in values.items()}

    @property
    def settling(self) -> dict[str, Any]:
        """What `Network.settling` is of a network that is trained so."""
        found = {"steps": self.take("free_steps")["free_steps"], **self.take("schedule", "relaxation")}
        if self.algorithm == "bp":
            return found | {"feedforward": True}
        found |= {} if self.tolerance is None else {"tolerance": self.tolerance}
        return found | ({"unrolled_steps": self.nudged_steps} if self.algorithm == "bptt" else {})

    def to_toml(self) -> str:
        """Return the options as TOML, grouped by comments; options that are unset (None) are left out."""
        lines, group = [], None
        for spec in fields(self):
            if spec.metadata["group"] != group:
                group = spec.metadata["group"]
                lines += ["", f"# {group}"]
            value = getattr(self, spec.name)
            if value is not None:
                lines.append(f"{spec.name} = {_toml_value(value)}")
        return "\n".join(lines[1:]) + "\n"


#: What a run's own file calls by names that are none here: what `cupyep.fit` was given.
OF_FIT = {
    "arch": "a network made in Python goes on there, by ep.fit(resume=True), or with the --plugin that registers it so",
    "dataset": "a run on data made in Python goes on there, by ep.fit(resume=True)",
}

#: The options by name, in the order of ``--help-all``.
OPTIONS: dict[str, Field] = {spec.name: spec for spec in fields(TrainConfig)}
# Each machine's own affair: of every rank, where a run goes on, where it is passed on to others.
MACHINE = tuple(name for name, spec in OPTIONS.items() if spec.metadata.get("machine"))
# What may differ when a run is resumed: how long it goes on, where it finds machine and files, how it survives.
RESUME_OPTIONS = ("epochs", *MACHINE, "checkpoint_minutes", "on_divergence", "on_unsettled", "patience", "plugin")


def option_name(name: str) -> str:
    """Return the command-line spelling of a field: ``free_steps`` -> ``--free-steps``."""
    return "--" + name.replace("_", "-")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the options in a config.toml or recipe by name, their values checked one by one.

    `ConfigurationError`, whose message names file and key, if the file is missing or not TOML, names an unknown option,
    or has a value that breaks the rule of its option.
    """
    try:
        text = read_text(path, TOML_BYTES)
        if max(line.count(".") for line in text.split("\n")) > DOTS:
            raise ValueError(f"a line with more than {DOTS} dots")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not text, a number too long, arrays nested too deeply
        raise ConfigurationError(f"'{path}' is not valid TOML: {error}") from error
    for name, value in values.items():
        try:
            check_option(name)
            checked(OPTIONS[name], value, name, values.get("plugin"))
        except ConfigurationError as error:
            of_fit = name in OF_FIT and "is of a plugin" not in str(error) and text.startswith(WRITTEN)
            told = f"{str(error).partition(' (choose')[0]}; {OF_FIT[name]}" if of_fit else error
            raise ConfigurationError(f"'{path}': {told}") from error
    return values


def make_config(*layers: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in which later `layers` (such as recipe, command line) override earlier ones."""
    merged = {name: value for layer in layers for name, value in layer.items()}
    for name in merged:
        check_option(name)
    return TrainConfig(**merged)


def require_used(given: Mapping[str, Any], *settings: Mapping[str, Any], where: str = "") -> None:
    """Raise `ConfigurationError` for an option that has no effect in any of some `settings`.

    `given` are the options that somebody gave, be it with the value that they have anyway; `settings` are values by
    name, those that are missing are defaults; the message begins with `where`.
    """
    cases = [{name: spec.default for name, spec in OPTIONS.items()} | dict(values) for values in settings]
    for name, value in given.items():
        lacking = [missing(OPTIONS[name], case) for case in cases]
        flag = option_name(f"no_{name}" if value is False else name)
        require(not all(lacking), f"{where}{flag} needs {(lacking[0] or [''])[0]}")


def differing(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Return the names of the options that are not the same in two runs, those that have no effect in both left out."""
    ours, theirs = vars(config), vars(other)
    changed = [spec for spec in OPTIONS.values() if ours[spec.name] != theirs[spec.name]]
    return [spec.name for spec in changed if not (missing(spec, ours) and missing(spec, theirs))]


def check_option(name: str) -> None:
    """Raise `ConfigurationError` if there is no option of that name."""
    if name not in OPTIONS:
        raise ConfigurationError(f"unknown option '{name}'{nearest(name, OPTIONS)}")


def parse_layers(text: str, depth: int, nodes: Sequence[str] | None = ()) -> list[int]:
    """Return the layer numbers that `text` names: ``"all"``, ``"2,3,4"``, ``"2-5"``, ``"1,3-5"``, or names of nodes.

    Layers count from 1 to `depth`; `nodes` are their names, where they have any, None if that is not known yet: then
    every name will do. `ConfigurationError` if the text is none of these forms or names a layer that does not exist.
    """
    if text == "all":
        return list(range(1, depth + 1)) if depth < sys.maxsize else []
    layers: list[int] = []
    for part in text.split(","):
        if nodes and part.strip() in nodes:
            layers.append(nodes.index(part.strip()) + 1)
            continue
        numeric = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if nodes is None and not numeric and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", part.strip()):
            continue
        names = f" or of {', '.join(nodes)}" if nodes else ""
        if numeric is None:
            raise ConfigurationError(f"--signal-layers must be like 2,3,4 or 2-5 or all{names} (got '{text}')")
        require(len(part) <= 12, f"--signal-layers names a layer that no network has (got '{text}')")
        begin, end = int(numeric[1]), int(numeric[2] or numeric[1])
        require(1 <= begin <= end, f"--signal-layers counts layers upwards from 1 (got '{text}')")
        require(end <= MOST_LAYERS, f"--signal-layers names a layer that no network has (got '{text}')")
        require(end <= depth, f"--signal-layers names layer {end}, but the network has layers 1 to {depth}")
        layers += range(begin, end + 1)
    require(len(set(layers)) == len(layers), f"--signal-layers names a layer twice (got '{text}')")
    return sorted(layers)


def _toml_value(value: Any) -> str:
    """Return `value` (bool, int, float, str or list of numbers) as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
