"""Small networks, batches and signals for the tests of the core."""

from __future__ import annotations

import numpy as np
from oracle import Oracle, Term

import cupyep as ep
from cupyep.learning.gradients import Gradients, packed_size
from cupyep.ops.buffers import Arena

CLASSES = 3


def gradients_of(arrays, xp=np):
    """Return arrays by path as a learner returns its gradients."""
    shapes = {path: array.shape for path, array in arrays.items()}
    gradients = Gradients(xp.zeros(packed_size(shapes), next(iter(arrays.values())).dtype), shapes)
    for path, array in arrays.items():
        gradients[path][...] = array
    return gradients


def network(
    kind="conv",
    device="cpu",
    *,
    pooling="average",
    loss="cross_entropy",
    feedback=1.0,
    activation="sigmoid",
    gain=0.5,
    precision="float64",
    seed=0,
    bias=0.3,
):
    """Return a network with biases that are not zero.

    Of three state layers (four with squared error) for the kinds "conv" and "dense", of one for "single".
    """
    if kind == "conv":
        layers = [
            ep.Conv2d((6, 6, 2), 3, pooling=pooling),
            ep.Conv2d((3, 3, 3), 4),
            ep.Conv2d((3, 3, 4), 4, kernel=2, pooling=pooling),
        ]
    elif kind == "dense":
        layers = [ep.Linear((6, 6, 2), 7), ep.Linear((7,), 6), ep.Linear((6,), 5)]
    else:  # "single": one layer of states
        layers = [ep.Linear((6, 6, 2), CLASSES if loss == "squared_error" else 7)]
    if loss == "squared_error" and kind != "single":
        layers.append(ep.Linear(layers[-1].out_shape, CLASSES))
    net = ep.Network(
        layers,
        CLASSES,
        activation=activation,
        loss=loss,
        feedback=feedback,
        gain=gain,
        seed=seed,
        device=device,
        precision=precision,
    )
    generator = np.random.default_rng([seed, 1])
    for path, array in net.parameters().items():
        if path.endswith(".bias"):
            array[...] = net.device.asarray(bias * generator.uniform(0.5, 1.5, array.shape), net.dtype)
    return net


def batch_of(net, samples=3, seed=0):
    """Return a batch with index and view; images are uniform in [0, 1], as float64 on every precision."""
    generator = np.random.default_rng([seed, 2])
    images = generator.uniform(0, 1, (samples, *net.input_shape))
    labels = np.arange(samples) % CLASSES
    view = (np.arange(samples) % 2).astype(np.uint8)
    return ep.Batch(net.device.asarray(images, net.dtype), labels, np.arange(samples) + 5, view)


def bind(ops, xp):
    """Give an edge's operations memory of their own, full of what is no number: nothing may depend on it."""
    arena = Arena(xp, ops.nbytes)
    arena.block[...] = 255
    ops.bind(arena, [xp.zeros(shape, dtype) for shape, dtype in ops.derived])
    return ops


class Teacher:
    """Logits that depend on sample and view, made of nothing but these two; also features."""

    feature_layers = {"middle": (3, 3, 4)}

    def logits(self, split, index, view):
        assert split == "train"
        index, view = np.asarray(index, float), np.asarray(view, float)
        return 2 * np.sin(np.stack([index + 1 + 10 * view, 2 * index - view, 3 * index + 2 * view], axis=1))

    def feature(self, layer, split, index, view):
        assert (layer, split) == ("middle", "train")
        shape = self.feature_layers[layer]
        return np.stack([np.random.default_rng(pair).uniform(0, 1, shape) for pair in zip(index, view, strict=True)])


def signals_of(kind, **options):
    """Return ``plain``: none, ``le``: local errors, ``kd``: distillation with a learned map and temperature."""
    if kind == "plain":
        return []
    if kind == "le":
        return [ep.LocalError([1, 2], kappa=0.7, seed=3, **options)]
    return [ep.Distillation(Teacher(), [2], kappa=0.4, temperature=2.0, learned=True, seed=4, **options)]


def oracle_terms(net, batch, signals=(), parameters=None):
    """Return the loss of a nudge as oracle terms; learned maps are read from `parameters` where they are there."""
    own = {k: v for k, v in (parameters or {}).items() if k.startswith("readout")}
    return [Oracle(net, own).readout_term(batch.labels), *signal_terms(net, batch, signals, parameters)]


def signal_terms(net, batch, signals=(), parameters=None):
    """Return the part of signals of `oracle_terms`."""
    parameters, terms = parameters or {}, []
    for i, signal in enumerate(signals):
        for layer in signal.layers:
            if isinstance(signal, ep.FeatureDistillation):
                target = signal.teacher.feature(signal.features[layer], "train", batch.index, batch.view)
                terms.append(Term(layer, "squared_error", target.reshape(len(target), -1), signal.kappa))
                continue
            own = np.array(net.device.to_numpy(signal.term(layer).weight), np.float64)
            matrix = parameters.get(f"signals.{i}.layer{layer}.weight", own)
            loss, temperature = signal.criterion.name, getattr(signal.criterion, "temperature", 1.0)
            if isinstance(signal, ep.Distillation):
                z = Teacher().logits("train", batch.index, batch.view)
                e = np.exp(z / temperature)
                target = z if loss == "squared_error" else e / e.sum(axis=1, keepdims=True)
            else:
                target = np.eye(net.classes)[batch.labels]
            pool = signal.term(layer).pool or 1  # dense layers have none
            terms.append(Term(layer, loss, target, signal.kappa, matrix, 0.0, temperature, pool))
    return terms


def on_host(net, mapping):
    """Return arrays by path as float64 NumPy."""
    return {path: np.array(net.device.to_numpy(array), np.float64) for path, array in mapping.items()}


def hosts(net, arrays):
    """Return arrays as float64 NumPy."""
    return [np.array(net.device.to_numpy(array), np.float64) for array in arrays]


class Halved(ep.Linear):
    """A dense map of half strength."""

    def linear_drive(self, s, out, winners, ops):
        super().linear_drive(s, out, winners, ops)
        out *= 0.5

    def topdown(self, s, winners, out, ops):
        super().topdown(s, winners, out, ops)
        out *= 0.5

    def add_gradient(self, s_below, s, winners, weight, bias, ops):
        super().add_gradient(s_below, 0.5 * s, winners, weight, None, ops)
        if bias is not None:
            bias += s.sum(axis=0)


class Sparsity(ep.Augmenter):
    def loss(self, layer, state, target):
        return abs(state).reshape(len(state), -1).sum(axis=1)

    def gradient(self, layer, state, target):
        return ep.array_module(state).sign(state)
