"""Which samples of a split are used, the same ones on every machine.

Of each class as many as of any other; what is set apart of a user's own data in the proportions that they have.
"""

from __future__ import annotations

import numpy as np

from cupyep.errors import is_integer, require, shown


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
    turn = _turns(labels, order)
    return np.sort(order[np.argsort(turn[order], kind="stable")[:count]])


def _turns(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return of each row how many of its class come before it in `order`."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class], side="left")
    return turn


def held_out(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the rows of `count` samples drawn by `seed`, class-balanced, in increasing order."""
    # The second number keeps these draws apart from those of the weights, which come from the bare seed.
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    return balanced(labels, count, order)


def stratified(labels: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """Return the rows of `count` samples drawn by `seed`, of every class its share, in increasing order.

    Shares are rounded by the largest remainders; a class of two samples or more keeps at least one, as long as others
    can give for it. Draws of different `stream` are independent.
    """
    order = np.random.default_rng([seed, stream]).permutation(len(labels))
    sizes = np.bincount(labels)
    exact = sizes * (count / len(labels))
    # The place of a sample in its class, in terms of the class's share: what is below 1/2 more than the share is taken.
    turn = _turns(labels, order)
    is_last = turn == sizes[labels] - 1
    key = turn + 1 - exact[labels] + np.where(is_last, len(labels), 0)
    return np.sort(order[np.argsort(key[order], kind="stable")[:count]])


def evened(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return as many rows as there are, in random order, of every class equally many.

    A class with fewer images than its share gives each of them equally often, give or take one; of a larger one another
    part is drawn every time. In the mean that is a loss in which a sample of class c weighs N / (classes * N_c).
    """
    present = np.unique(labels)
    shares = np.full(len(present), len(labels) // len(present))
    shares[generator.permutation(len(present))[: len(labels) % len(present)]] += 1
    order = []
    for label, share in zip(present, shares, strict=True):
        rows = np.flatnonzero(labels == label)
        turns = [generator.permutation(rows) for _ in range(-(-share // len(rows)))]
        order += [row for turn in turns for row in turn][:share]
    return generator.permutation(order)


def check_limits(
    name: str,
    train_count: int,
    test_count: int,
    limit_train: int | None,
    limit_test: int | None,
    validation: int | None,
) -> None:
    """Raise `ConfigurationError` unless so many images can be held out and used of so many."""
    most = train_count - 1
    require(
        validation is None or (is_integer(validation) and 1 <= validation <= most),
        f"validation is {shown(validation)}: {name} has {train_count} train images, choose from 1 to {most}",
    )
    limits = (("train", limit_train, train_count, validation or 0), ("test", limit_test, test_count, 0))
    for what, limit, count, held in limits:
        note = f", {held} of them held out" if held else ""
        require(
            limit is None or (is_integer(limit) and 1 <= limit <= count - held),
            f"limit-{what} is {shown(limit)}: {name} has {count} {what} images{note}, choose from 1 to {count - held}",
        )
