"""A trainer's state as a checkpoint, and back: what it takes to go on bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.errors import CheckpointError, one_line
from cupyep.persistence.checkpoint import NUMBERS, Checkpoint, restore_parameters
from cupyep.persistence.network_file import difference
from cupyep.training.config import RESUME_OPTIONS, option_name
from cupyep.training.divergence import LossWatch, check_arrays
from cupyep.training.statistics import EpochStatistics, layer_names

#: The numbers that say how far a run is: their names in a checkpoint, and as attributes of a trainer.
PROGRESS = {name: {"epoch": "epochs_done", "batch": "batches_done"}.get(name, name) for name in NUMBERS}

KEPT_FILTERS = 8  # epochs at most, whose first layer a run keeps


def take_snapshot(trainer: Any) -> Checkpoint:
    """Return all that `trainer` needs to go on; between epochs its first layer's filters join those it keeps.

    `DivergenceError` if a parameter or a buffer of the optimizer is not finite.
    """
    host = trainer.device.to_numpy
    parameters = {path: host(array) for path, array in trainer.learner.parameters().items()}
    optimizer = {name: host(array) for name, array in trainer.optimizer.state_dict().items()}
    check_arrays(parameters | optimizer, trainer.epochs_done + bool(trainer.batches_done))
    statistics = _tagged("loss", trainer.watch.state_dict())
    generators = {name: generator.bit_generator.state for name, generator in trainer.generators.items()}
    if trainer.batches_done:
        statistics |= _tagged("epoch", trainer.statistics.state_dict())
        generators["data"] = trainer.epoch_start
    checkpoint = Checkpoint(
        parameters=parameters,
        optimizer=optimizer,
        statistics=statistics,
        generators=generators,
        network=trainer.network.describe() | {"signals": _signals(trainer)},
        config={} if trainer.directory is None else dataclasses.asdict(trainer.directory.config),
        settling={} if _pace(trainer) is None else _pace(trainer).state_dict(),
        images={} if trainer.images is None else trainer.images.to_json(),
        **{name: getattr(trainer, attribute) for name, attribute in PROGRESS.items()},
    )
    if not trainer.batches_done:
        weight = first_filters(checkpoint, trainer.network.graph.named_depths())
        trainer.filters = kept_filters(trainer.filters, trainer.epochs_done, weight)
    checkpoint.statistics |= _tagged("filters", {str(epoch): weight for epoch, weight in trainer.filters.items()})
    return checkpoint


def first_filters(checkpoint: Checkpoint, nodes: Iterable[str] | None) -> np.ndarray | None:
    """Return the weight (kh, kw, C, K) of the first layer (of those `nodes`); None if it is no convolution."""
    weight = checkpoint.weights().get(f"layers.{next(iter(nodes or ()), '1')}.weight")
    return weight if weight is not None and weight.ndim == 4 else None


def kept_filters(filters: Mapping[int, np.ndarray], epoch: int, weight: np.ndarray | None) -> dict[int, np.ndarray]:
    """Return what a run keeps of `filters` (by epoch), and of those of its new `epoch`: at most `KEPT_FILTERS`.

    These are evenly spaced from epoch 0 and depend on `epoch` only: a resumed run keeps what a straight one does.
    """
    if weight is None:
        return {}
    stride = 1 << (epoch // KEPT_FILTERS).bit_length()
    known = {**filters, epoch: weight.copy()}
    return {at: known[at] for at in sorted(known) if at % stride == 0 and at <= epoch}


def saved_filters(saved: Checkpoint) -> dict[int, np.ndarray]:
    """Return the first layer's filters that a checkpoint keeps, by epoch; raise `ValueError` if they are none."""
    filters = {int(epoch): weight for epoch, weight in _part(saved.statistics, "filters").items()}
    shapes = {weight.shape for weight in filters.values()}
    if len(shapes) > 1 or any(len(shape) != 4 for shape in shapes):
        raise ValueError("the filters of its first layer are of several shapes")
    return filters


def restore_snapshot(trainer: Any, path: Path, saved: Checkpoint) -> None:
    """Bring `trainer` to the state `saved`, which was read from `path`.

    `CheckpointError` if parameters or the state of the optimizer do not fit.
    """
    restore_parameters(path, saved.parameters, trainer.learner.parameters(), trainer.device)
    trainer.optimizer.load_state_dict(saved.optimizer)
    for name, generator in trainer.generators.items():
        generator.bit_generator.state = saved.generators[name]
    for name, attribute in PROGRESS.items():
        setattr(trainer, attribute, getattr(saved, name))
    trainer.watch.load_state_dict(_part(saved.statistics, "loss"))
    trainer.filters = saved_filters(saved)
    if _pace(trainer) is not None:
        _pace(trainer).load_state_dict(saved.settling)
    if saved.batch:
        trainer.begin_epoch()
        trainer.statistics.load_state_dict(_part(saved.statistics, "epoch"))


def _pace(trainer: Any) -> Any:
    """Return what chooses the steps of a trainer's phases (`cupyep.diagnostics.pace`); None if nothing does."""
    return None if trainer.checkup is None else trainer.checkup.pace


def check_same_run(trainer: Any, path: Path, saved: Checkpoint) -> None:
    """Raise `CheckpointError` unless the checkpoint `saved`, read from `path`, is one that `trainer` can go on from."""
    began = saved
    if saved.settling:  # which may have lowered the feedback; what the run began with is compared as its option
        feedback = saved.config.get("feedback", saved.network.get("feedback"))
        began = dataclasses.replace(saved, network=saved.network | {"feedback": feedback})
    check_same_network(path, began, trainer.network)
    for name, value in dataclasses.asdict(trainer.directory.config).items():
        old = saved.config.get(name, value)
        if old != value and name not in RESUME_OPTIONS:
            raise CheckpointError(f"checkpoint '{path}' belongs to a run with {option_name(name)} {old}, not {value}")
    others = difference(saved.network, {"signals": _signals(trainer)})
    if others:
        raise CheckpointError(f"checkpoint '{path}' belongs to a run with other signals: {others}")
    if trainer.images is not None:
        check_unchanged(f"checkpoint '{path}'", saved.images.get("fingerprint", ""), trainer.images)
        if any(saved.images.get(name, "") not in ("", getattr(trainer.images, name)) for name in ("samples", "judged")):
            raise CheckpointError(
                f"checkpoint '{path}' belongs to a run on other images of {trainer.images.name}: limits, or a seed "
                "that holds images out, are others; give those that it began with (a run by ep.fit goes on by "
                "fit(resume=True))"
            )
    if set(saved.generators) != set(trainer.generators):
        raise CheckpointError(f"checkpoint '{path}' lacks the state of a random generator; it is of another version")
    try:
        _try_state(trainer, saved)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"checkpoint '{path}' is damaged: {one_line(error)}") from error


def check_unchanged(what: str, fingerprint: str, images: Any) -> None:
    """Raise `CheckpointError` unless `images`, a data set or its format, are those of a run's `fingerprint`, if any."""
    if fingerprint not in ("", images.fingerprint):
        raise CheckpointError(
            f"{what} belongs to a run on other images or labels: {images.name} has changed since it began; bring back "
            "what was there, or start a new run"
        )


def _signals(trainer: Any) -> list[dict[str, Any]]:
    return json.loads(json.dumps([signal.describe() for signal in trainer.learner.signals]))


def _try_state(trainer: Any, saved: Checkpoint) -> None:
    """Take up what a file can get wrong in too many ways to list, without changing `trainer`."""
    for name, generator in trainer.generators.items():
        type(generator.bit_generator)().state = saved.generators[name]
    LossWatch(trainer.device).load_state_dict(_part(saved.statistics, "loss"))
    saved_filters(saved)
    pace = _pace(trainer)
    if pace is not None and saved.settling and saved.settling.keys() != pace.state_dict().keys():
        raise ValueError("its settling is not that of such a run")
    statistics = EpochStatistics(trainer.device, saved.epoch + 1, layer_names(trainer.learner.parameters()))
    if saved.batch:
        statistics.load_state_dict(_part(saved.statistics, "epoch"))
        statistics.read()
    if saved.batch > len(trainer.train) or saved.batch != statistics.batches:
        raise ValueError(f"its statistics are not those of {saved.batch} batches")


def check_same_network(path: Path, saved: Checkpoint, network: Any) -> None:
    """Raise `CheckpointError` unless the checkpoint `saved`, read from `path`, is of a network like `network`."""
    found = difference(saved.network, network.describe())
    if found:
        raise CheckpointError(f"checkpoint '{path}' belongs to another network: {found}")


def _tagged(tag: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{tag}.{name}": array for name, array in state.items()}


def _part(state: Mapping[str, np.ndarray], tag: str) -> dict[str, np.ndarray]:
    """Return what `_tagged` made names of with `tag`, under its own names."""
    return {name.removeprefix(f"{tag}."): array for name, array in state.items() if name.startswith(f"{tag}.")}
