"""From a `TrainConfig` to the objects of a run: data set, network, signals, learner, optimizer, trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import Device
from cupyep.batch import Batch
from cupyep.data import Dataset, ImageFormat, Loader, TeacherFile, load_dataset
from cupyep.data.sources import is_own
from cupyep.diagnostics.checkup import PROBE_IMAGES, Checkup
from cupyep.diagnostics.pace import Pace
from cupyep.errors import instance, require
from cupyep.errors import path as checked_path
from cupyep.learning import Backpropagation, BackpropagationThroughTime, EquilibriumPropagation
from cupyep.learning.gradients import layer_of
from cupyep.models import build
from cupyep.network import Network
from cupyep.optim import AVERAGE, OPTIMIZERS, SGD, Adam, Optimizer
from cupyep.parallel import Communicator
from cupyep.plugins import SIGNALS
from cupyep.signals import Augmenter, Distillation, FeatureDistillation, LocalError
from cupyep.training.config import AUTO, TrainConfig, parse_layers
from cupyep.training.display import Display
from cupyep.training.outlook import smaller_settings
from cupyep.training.statistics import layer_names
from cupyep.training.trainer import Trainer

REST_IMAGES = 1000  # settled for much longer than in training


def build_dataset(config: TrainConfig) -> Dataset:
    """Load the data set; see `cupyep.data.load_dataset` for the errors."""
    sizes = config.take("image_size", "limit_train", "limit_test", "validation", "seed")
    sizes |= config.take("test_fraction") if is_own(config.dataset) else {}
    return load_dataset(config.dataset, config.data_dir, **sizes)


def build_network(config: TrainConfig, images: Dataset | ImageFormat, device: Device | str) -> Network:
    """Return the untrained network for images and classes like those of `images`."""
    pool = config.readout_pool if config.loss == "cross_entropy" else None
    names = ("width", "activation", "pooling", "loss", "feedback", "gain", "seed", "precision", "weights")
    network = build(
        config.arch,
        classes=len(images.classes),
        input_shape=images.image_shape,
        device=device,
        readout_pool=int(pool) if pool and pool.isdecimal() else pool,
        **config.take(*names) | {"exact": config.exact or (config.algorithm == "ep" and config.nudge == "classical")},
    )
    network.settling = config.settling
    return network


def build_signals(
    config: TrainConfig, network: Network, dataset: Dataset, teacher: Path | None, display: Display | None = None
) -> list[Augmenter]:
    """Return the intermediate signals: none, local error, or distillation from the file `teacher`, which is shown."""
    if config.aug != "kd":
        return make_signals(config, network)
    file = TeacherFile(checked_path("path", teacher))
    file.check(dataset)
    if config.flip and dataset.flip:
        file.logits("train", dataset.train.index[:1], 1)  # one without mirrored views is refused before the first batch
    if display is not None:
        _show_teacher(file, display.about("teacher"))
    return make_signals(config, network, file)


def _show_teacher(file: TeacherFile, display: Display) -> None:
    """Show how good a teacher that has been checked is."""
    train, test = (file.measured[name]["identity"] for name in ("train", "test"))
    text = f"{file.teacher}: train accuracy {train:.2%}, test accuracy {test:.2%}"
    display.show("note", text, train_accuracy=train, test_accuracy=test)
    if views := file.by_chance():
        found = file.measured["train"][views[0]]
        display.show(
            "warning",
            f"{file.path} knows no more of the labels than chance (view {views[0]}, train accuracy {found:.2%}): a "
            "student learns nothing from it; were its logits written in another order?",
        )


def make_signals(config: TrainConfig, network: Network, teacher: Any = None) -> list[Augmenter]:
    """Return the intermediate signals; `teacher` is what distillation asks, an open `TeacherFile`."""
    if config.aug == "none":
        return []
    common = config.take("kappa") | {"layers": signal_layers(config, network), "annealing": config.kappa_annealing}
    if maker := SIGNALS[config.aug]:
        return [instance(f"what the maker of --aug {config.aug} returns", maker(**common), Augmenter)]
    common |= {
        "loss": config.signal_loss,
        "pool": config.signal_pool,
        "learned": config.learned_maps,
        "seed": config.seed,
    }
    if config.aug == "le":
        return [LocalError(**common)]
    if config.teacher_features:
        names = {layer: feature_name(layer) for layer in common["layers"]}
        return [FeatureDistillation(teacher, names, config.kappa, config.kappa_annealing)]
    return [Distillation(teacher, temperature=config.temperature, **common)]


def signal_layers(config: TrainConfig, network: Network) -> list[int]:
    """Return the numbers of the layers with a signal."""
    graph = network.graph
    return parse_layers(config.signal_layers, network.depth, () if graph.is_chain else graph.names)


def feature_name(layer: int) -> str:
    """Return what a layer's activations are called in the teacher files that this package writes."""
    return f"layer{layer}"


def build_learner(
    config: TrainConfig, network: Network, signals: Sequence[Augmenter], generator: np.random.Generator
) -> Any:
    """Return the learner of ``config.algorithm``; `generator` draws the signs of the scheme ``random``."""
    shared = {"signals": signals, **config.take("micro_batch")}
    if config.algorithm == "bp":
        return Backpropagation(network, **shared)
    shared |= config.take("free_steps", "schedule", "tolerance", "relaxation")
    if config.algorithm == "bptt":
        return BackpropagationThroughTime(network, unrolled_steps=config.take("nudged_steps")["nudged_steps"], **shared)
    return EquilibriumPropagation(
        network, generator=generator, **config.take("beta", "nudged_steps", "scheme", "nudge"), **shared
    )


def build_optimizer(config: TrainConfig, parameters: dict[str, Any]) -> Optimizer:
    """Return the optimizer; a list of learning rates is one a layer, and learned maps of signals take the last."""
    rates: Any = config.learning_rate
    if isinstance(rates, list):
        layers = layer_names(path for path in parameters if not path.startswith("signals."))
        told = f"--learning-rate has {len(rates)} numbers, but the layers are {', '.join(layers)}"
        require(len(rates) == len(layers), told)
        by_layer = dict(zip(layers, rates, strict=True))
        rates = {path: by_layer.get(layer_of(path), rates[-1]) for path in parameters}
    shared = config.take("weight_decay", "ema", "clip_unit_norm")
    if config.optimizer == "sgd":
        shared |= config.take("momentum", "nesterov")
    return OPTIMIZERS[config.optimizer](parameters, rates, **shared)


def optimizer_slots(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the buffers that the optimizer keeps for every parameter."""
    own = SGD.slots(config.momentum) if config.optimizer == "sgd" else Adam.SLOTS
    return own if config.ema is None else (*own, AVERAGE)


def training_batches(
    config: TrainConfig,
    dataset: Dataset,
    network: Network,
    generator: np.random.Generator,
    share: tuple[int, int] = (0, 1),
) -> Loader:
    """Return the training batches, shuffled and augmented by draws of `generator`; of each the `share` of a process."""
    return Loader(
        dataset,
        "train",
        config.batch_size,
        network.device,
        network.dtype,
        augment=config.crop or config.flip or config.cutout is not None,
        shuffle=True,
        generator=generator,
        pad=None if config.crop else 0,
        flip=config.flip,
        cutout=config.cutout or 0,
        label_smoothing=config.label_smoothing,
        share=share,
        balance=config.class_weights == "balanced",
    )


def evaluation_batches(
    config: TrainConfig, dataset: Dataset, network: Network, split: str = "test", share: tuple[int, int] = (0, 1)
) -> Loader:
    """Return the batches of a split, in their order and as they are; of each the `share` of a process."""
    return Loader(dataset, split, config.batch_size, network.device, network.dtype, share=share)


def first_images(dataset: Dataset, network: Network, count: int, share: tuple[int, int] = (0, 1)) -> Batch:
    """Return `count` training images (or all there are), the first of each class, not augmented; or a share of them."""
    few = _few(dataset, "train", count)
    return next(iter(Loader(few, "train", count, network.device, network.dtype, share=share)))


def rest_batches(
    config: TrainConfig,
    dataset: Dataset,
    network: Network,
    split: str = "test",
    share: tuple[int, int] = (0, 1),
    count: int = REST_IMAGES,
) -> Loader:
    """Return the batches of `count` images of a split (or all there are), the first of each class, for `at_rest`."""
    return evaluation_batches(config, _few(dataset, split, count), network, split, share)


def _few(dataset: Dataset, split: str, count: int) -> Dataset:
    images = getattr(dataset, split)
    return dataclasses.replace(dataset, **{split: images.balanced(min(count, len(images)))})


def build_checkup(config: TrainConfig, learner: Any, batch: Batch) -> Checkup:
    """Return what looks at the learner after every epoch, and chooses its steps where they are ``auto``."""
    auto = [phase for phase in ("free", "nudged") if getattr(config, f"{phase}_steps") == AUTO]
    pace = Pace(learner, batch, auto, config.on_unsettled) if auto and config.algorithm != "bp" else None
    return Checkup(learner, batch, config.batch_size, pace)


def build_trainer(
    config: TrainConfig,
    dataset: Dataset,
    network: Network,
    signals: Sequence[Augmenter] = (),
    display: Display | None = None,
    communicator: Communicator | None = None,
) -> Trainer:
    """Return the trainer of `network`, with all generators drawn from ``config.seed``."""
    share = (communicator.rank, communicator.size) if communicator else (0, 1)
    draws, signs = map(np.random.default_rng, np.random.SeedSequence(config.seed).spawn(2))
    learner = build_learner(config, network, signals, signs)
    trainer = Trainer(
        learner,
        build_optimizer(config, learner.parameters()),
        training_batches(config, dataset, network, draws, share),
        evaluation_batches(config, dataset, network, share=share),
        validation=evaluation_batches(config, dataset, network, "validation", share) if dataset.validation else None,
        generators={"learner": signs},
        images=ImageFormat.of(dataset),
        checkup=build_checkup(config, learner, first_images(dataset, network, PROBE_IMAGES, share)),
        rest=rest_batches(config, dataset, network, share=share),
        display=display,
        communicator=communicator,
        **config.take("epochs", "lr_schedule", "warmup", "patience", "checkpoint_minutes", "on_divergence"),
    )
    trainer.outlook.smaller = smaller_settings(config, network)
    return trainer
