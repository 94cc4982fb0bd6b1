"""Which samples of a split are used: as many of each class as of any other, the same ones on every machine."""

from __future__ import annotations

import numpy as np


def balanced(labels: np.ndarray, count: int, order: np.ndarray | None = None) -> np.ndarray:
    """Return the rows of `count` samples, as equally many of every class as there are, in increasing order.

    Parameters
    ----------
    labels : ndarray of int, shape (N,)
    count : int
        From 1 to N. Where it is no multiple of the number of classes, some classes get one sample more; a class that
        has too few gives all it has, the others the rest.
    order : ndarray of int, shape (N,), optional
        A permutation of the rows: the first ones in it are taken. As they stand by default.

    Notes
    -----
    The choice for a smaller `count` is part of the choice for a larger one.
    """
    order = np.arange(len(labels)) if order is None else order
    by_class = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[by_class]
    first = np.searchsorted(sorted_labels, sorted_labels, side="left")
    turn = np.empty(len(labels), np.int64)  # of each row: how many of its class come before it
    turn[by_class] = np.arange(len(labels)) - first
    return np.sort(order[np.argsort(turn[order], kind="stable")[:count]])


def held_out(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the rows of `count` samples drawn by `seed`, class-balanced, in increasing order."""
    # The second number keeps these draws apart from those of the weights, which come from the bare seed.
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    return balanced(labels, count, order)
