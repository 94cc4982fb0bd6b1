"""Intermediate learning signals: auxiliary losses at chosen layers during the nudge (arXiv 2508.15989).

The nudged phase descends ``L + kappa * sum_{i in layers} L_i(s^i, target_i)``; the free phase knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep import errors
from cupyep.backend.device import Device
from cupyep.batch import Batch
from cupyep.data.teacher import SPLITS, TeacherFile
from cupyep.errors import ConfigurationError, choose, flag, instance, integer, is_integer, items, number, require, shown
from cupyep.heads import Head, LossTerm, Nudge
from cupyep.losses import SquaredError, get_loss
from cupyep.optim import LR_SCHEDULES

ANNEALINGS = ("constant", "cosine")  # of `LR_SCHEDULES`


class _LayerTerm(LossTerm):
    """A user's augmenter seen from one layer."""

    def __init__(self, augmenter: Augmenter, layer: int):
        self.augmenter = augmenter
        self.layer = layer

    def loss(self, state: Any, target: Any) -> Any:
        return self.augmenter.loss(self.layer, state, target)

    def add_force(self, state: Any, target: Any, scale: Any, force: Any, scratch: Any = None) -> None:
        gradient = self.augmenter.gradient(self.layer, state, target)
        shape = getattr(gradient, "shape", ())  # another one would be spread over the state
        if shape != state.shape:
            raise ConfigurationError(
                f"{type(self.augmenter).__name__}, layer {self.layer}: the gradient has shape {shape}, "
                f"the state {tuple(state.shape)}; they must be equal"
            )
        force += scale.reshape(-1, *[1] * (force.ndim - 1)) * gradient


class Augmenter:
    """A loss at chosen layers, weighted by kappa. Subclass it with `loss` and `gradient` to add your own.

    Parameters
    ----------
    layers : int, sequence of int or str, or "all"
        Layers, counted from 1 (the layer that sees the image), or names of nodes; ``"all"`` is every layer of the
        network that the signal is bound to.
    kappa : float
        Weight against the readout's loss, at least 0.
    annealing : {"cosine", "constant"}
        How `kappa` changes over training: falling as a half cosine to zero, or not at all.

    Attributes
    ----------
    layers : list of int
        Also with names, as given, before it is bound.
    kappa : float
        The current weight.
    nbytes : int
        Bytes of what its targets are taken from, kept on the device.
    """

    nbytes = 0

    def __init__(self, layers: int | Sequence[int | str] | str, kappa: float = 0.1, annealing: str = "cosine"):
        self.every_layer = isinstance(layers, str) and layers == "all"
        require(
            self.every_layer or not isinstance(layers, str),
            f"signal layers must be numbers, a list of names, or 'all', not {shown(layers)}",
        )
        given = [] if self.every_layer else [layers] if is_integer(layers) else items("signal layers", layers)
        self.layers: list[Any] = [_layer("each of the signal layers", layer) for layer in given]
        require(self.every_layer or len(given) > 0, "a signal needs at least one layer; layers are empty")
        require(len(set(self.layers)) == len(self.layers), f"signal layers must not repeat: {self.layers}")
        self.kappa = self.initial_kappa = number("kappa", kappa, 0)
        self.annealing = choose("kappa annealing", annealing, ANNEALINGS)
        self._terms: dict[int, LossTerm] = {}
        self.network: Any = None  # the one it is bound to

    def anneal(self, progress: float) -> None:
        """Set `kappa` for training progress from 0 to 1: ``kappa_0 (1 + cos(pi progress)) / 2`` if annealed."""
        self.kappa = self.initial_kappa * LR_SCHEDULES[self.annealing](progress)

    def bind(self, shapes: Sequence[tuple[int, ...]], classes: int, device: Device, dtype: Any) -> None:
        """Prepare for a network, whose `bind` calls this once, with `layers` as numbers by then.

        Parameters
        ----------
        shapes : sequence of tuple
            Shapes of s^1 .. s^L without the batch axis.
        classes : int
        device : Device
        dtype : dtype

        Raises
        ------
        ConfigurationError
            If a layer repeats, by its name and its number.
        """
        if self.every_layer:
            self.layers = list(range(1, len(shapes) + 1))
        require(len(set(self.layers)) == len(self.layers), f"signal layers must not repeat: {self.layers}")
        self.device, self.dtype, self.classes = device, dtype, classes
        self._terms = {layer: self.make_term(layer, shapes[layer - 1]) for layer in self.layers}

    def make_term(self, layer: int, shape: tuple[int, ...]) -> LossTerm:
        """Return the loss term of one layer; the default calls `loss` and `gradient` of this object."""
        return _LayerTerm(self, layer)

    def target(self, layer: int, batch: Batch) -> Any:
        """Return the target of one layer, an array with a row a sample on the device, or None."""
        return None

    def loss(self, layer: int, state: Any, target: Any) -> Any:
        """Return the loss a sample, shape (B,), of `state` (B, *shape of the layer)."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(layer, state, target)")

    def gradient(self, layer: int, state: Any, target: Any) -> Any:
        """Return dloss/dstate, shape of `state`."""
        raise NotImplementedError(f"{type(self).__name__} must define gradient(layer, state, target)")

    def describe(self) -> dict[str, Any]:
        """Return what sets this signal apart, as JSON has it: a run that goes on must have the signals it began with.

        One of your own with further settings adds them.
        """
        found = {"type": type(self).__name__, "layers": self.layers, "kappa": self.initial_kappa}
        return found | {"annealing": self.annealing}

    def nudges(self, batch: Batch) -> list[Nudge]:
        """Return the summands of the nudging loss for a batch, none while kappa is 0."""
        if self.kappa == 0:
            return []
        return [Nudge(term, self.kappa, _target(self, layer, batch)) for layer, term in self._terms.items()]

    def parameters(self) -> dict[str, Any]:
        """Return learned maps as ``{"layer3.weight": ...}``; empty where all maps are fixed."""
        return {
            f"layer{layer}.{name}": array
            for layer, term in self._terms.items()
            for name, array in term.parameters().items()
        }

    def term(self, layer: int) -> LossTerm:
        """Return the loss term of one layer."""
        return self._terms[layer]


class _MapAugmenter(Augmenter):
    """A head a layer: a random (or learned) map from the state to the classes."""

    def _map(self, loss: str, temperature: float, pool: int | None, learned: bool, gain: float, seed: int) -> None:
        """Take up what the maps are, and what is asked of their outputs."""
        self.criterion = get_loss(loss, number("temperature", temperature, above=0))
        self.pool = None if pool is None else integer("pool", pool)
        self.learned = flag("learned", learned)
        self.gain = number("gain", gain, above=0)
        self.seed = errors.seed("seed", seed)

    def make_term(self, layer: int, shape: tuple[int, ...]) -> LossTerm:
        head = Head(layer, shape, self.criterion, self.classes, learned=self.learned, pool=self.pool)
        head.initialize(np.random.default_rng([self.seed, layer]), self.gain, self.device, self.dtype)
        return head

    def describe(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("pool", "learned", "gain", "seed")}
        return super().describe() | {"loss": self.criterion.name, "temperature": self.criterion.temperature} | settings

    def nudges(self, batch: Batch) -> list[Nudge]:
        if self.kappa == 0:
            return []
        target = _target(self, self.layers[0], batch)  # one serves all layers
        return [Nudge(term, self.kappa, target) for term in self._terms.values()]


class LocalError(_MapAugmenter):
    """Local error: ``L_i = CE(softmax(B_i s^i), y)`` or ``1/2 |B_i s^i - y|^2`` with B_i random and fixed, or learned.

    Parameters
    ----------
    layers, kappa, annealing
        See `Augmenter`.
    loss : {"cross_entropy", "squared_error"}
    learned : bool, default False
        Train the maps B_i together with the network instead of keeping them as drawn.
    pool : int, optional
        Average the state over ``pool x pool`` windows before the map.
    gain : float
        B_i is drawn from N(0, gain^2 / dim).
    seed : int
        Of the maps.
    """

    def __init__(
        self,
        layers: int | Sequence[int | str] | str,
        kappa: float = 0.1,
        annealing: str = "cosine",
        loss: str = "cross_entropy",
        learned: bool = False,
        pool: int | None = None,
        gain: float = 1.0,
        seed: int = 0,
    ):
        super().__init__(layers, kappa, annealing)
        self._map(loss, 1.0, pool, learned, gain, seed)

    def target(self, layer: int, batch: Batch) -> Any:
        return batch.one_hot(self.classes, self.dtype, self.device)


class Distillation(_MapAugmenter):
    """Knowledge distillation: the map's output follows a teacher's logits z.

    ``L_i = T^2 CE(softmax(z / T), softmax(A_i s^i / T))`` or ``1/2 |A_i s^i - z|^2``.

    Parameters
    ----------
    teacher : TeacherFile
        Anything with ``logits(split, index, view)`` returning (B, classes) will do.
    layers, kappa, annealing, loss, pool, gain, seed
        See `LocalError`.
    temperature : float
        T, positive; used by the cross-entropy.
    learned : bool, default True
        As of `LocalError`.
    split : str
        Which part of the teacher file a batch's indices refer to.
    """

    def __init__(
        self,
        teacher: TeacherFile,
        layers: int | Sequence[int | str] | str,
        kappa: float = 0.1,
        annealing: str = "cosine",
        loss: str = "cross_entropy",
        temperature: float = 1.0,
        learned: bool = True,
        pool: int | None = None,
        gain: float = 1.0,
        seed: int = 0,
        split: str = "train",
    ):
        super().__init__(layers, kappa, annealing)
        self._map(loss, temperature, pool, learned, gain, seed)
        self.teacher = _that_has(teacher, "logits")
        self.split = choose("split", split, SPLITS)
        self._table: Any = None  # the teacher's logits on the device

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None}

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # of a table that is read first when it is asked for
        table = self.teacher.table(self.split) if isinstance(self.teacher, TeacherFile) else None
        return 0 if table is None else table.nbytes

    @classmethod
    def from_file(cls, path: str | Path, layers: int | Sequence[int | str] | str, **options: Any) -> Distillation:
        """Return a signal whose teacher is the file at `path` (see `cupyep.data.TeacherFile`)."""
        return cls(TeacherFile(path), layers, **options)

    def target(self, layer: int, batch: Batch) -> Any:
        _require_index(batch)
        return self.criterion.soften(self._logits(batch).astype(self.dtype))

    def _logits(self, batch: Batch) -> Any:
        """Return a batch's logits on the device, where the teacher's table is kept if it has one of moderate size."""
        teacher, split, device = self.teacher, self.split, self.device
        if self._table is None and isinstance(teacher, TeacherFile):
            table = teacher.table(split)
            self._table = None if table is None else device.asarray(self._checked(table))
        if self._table is not None:
            places = teacher.places(split, batch.index, batch.view)
            return device.xp.take(self._table, device.asarray(places), axis=0)
        logits = self._checked(teacher.logits(split, batch.index, batch.view))
        _expect(teacher, split, batch)
        return device.asarray(logits, self.dtype)

    def _checked(self, logits: np.ndarray) -> np.ndarray:
        found = logits.shape[1]
        message = f"the teacher has {found} classes, the network {self.classes}; use a teacher for this data set"
        require(found == self.classes, message)
        return logits


class FeatureDistillation(Augmenter):
    """Unweighted distillation: ``L_i = 1/2 |s^i - t^i|^2`` with t^i the teacher's own activations of the same shape.

    Parameters
    ----------
    teacher : TeacherFile
        With features.
    features : dict
        Layer, its number or name -> name of the teacher's feature map, which must have the shape of the layer's state.
    kappa, annealing, split
        See `Distillation`.
    """

    def __init__(
        self,
        teacher: TeacherFile,
        features: dict[int | str, str],
        kappa: float = 0.1,
        annealing: str = "cosine",
        split: str = "train",
    ):
        instance("features", features, Mapping, "a mapping of layers to names")
        for layer, name in features.items():
            _layer("each layer of features", layer)
            instance("each name of features", name, str, "a text")
        super().__init__(list(features), kappa, annealing)
        self.teacher = _that_has(teacher, "feature")
        self.features = dict(features)
        self.split = choose("split", split, SPLITS)

    def bind(self, shapes: Sequence[tuple[int, ...]], classes: int, device: Device, dtype: Any) -> None:
        self.features = dict(zip(self.layers, self.features.values(), strict=True))  # now by number
        super().bind(shapes, classes, device, dtype)

    def make_term(self, layer: int, shape: tuple[int, ...]) -> LossTerm:
        name = self.features[layer]
        available = self.teacher.feature_layers
        choose("teacher feature", name, available)
        if tuple(available[name]) != tuple(shape):
            raise ConfigurationError(
                f"teacher feature '{name}' has shape {tuple(available[name])}, layer {layer} has {tuple(shape)}; "
                "unweighted distillation needs equal shapes"
            )
        head = Head(layer, shape, SquaredError(), identity=True)
        head.initialize(np.random.default_rng(0), 1.0, self.device, self.dtype)
        return head

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"features": list(self.features.values())}

    def target(self, layer: int, batch: Batch) -> Any:
        _require_index(batch)
        feature = self.teacher.feature(self.features[layer], self.split, batch.index, batch.view)
        _expect(self.teacher, self.split, batch, self.features[layer])
        return self.device.asarray(feature.astype(self.dtype))


def _target(signal: Augmenter, layer: int, batch: Batch) -> Any:
    """Return a signal's target for a layer if it has a row a sample, or is None."""
    target = signal.target(layer, batch)
    rows = getattr(target, "shape", ())[:1]
    require(
        target is None or rows == (len(batch),),
        f"{type(signal).__name__}, layer {layer}: a target is an array with a row for each of the {len(batch)} "
        f"samples, not {shown(target)}",
    )
    return target


def _layer(name: str, layer: Any) -> int | str:
    return layer if isinstance(layer, str) else integer(name, layer)


def _that_has(teacher: Any, method: str) -> Any:
    require(callable(getattr(teacher, method, None)), f"teacher must be a TeacherFile, not {shown(teacher)}")
    return teacher


def _expect(teacher: Any, split: str, batch: Batch, layer: str | None = None) -> None:
    """Let a teacher file read what the batch after this one will ask for."""
    if batch.coming is not None and isinstance(teacher, TeacherFile):
        teacher.expect(split, *batch.coming, layer)


def _require_index(batch: Batch) -> None:
    if batch.index is None or batch.view is None:
        raise ConfigurationError(
            "distillation looks logits up by sample: give a Batch with index and view, not bare labels"
        )
