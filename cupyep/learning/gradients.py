"""The gradients of all parameters in one run of memory, so that what is done to all of them is one operation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.ops.reduction import norms

ALIGNED = 16  # elements: whole packs of 16 bytes, and half a line of the cache


class Gradients(Mapping[str, Any]):
    """Gradients by parameter path, views of one array.

    Parameters
    ----------
    packed : array of shape (`packed_size` of the shapes,)
        Zeros. Of one type for all, that in which the network computes.
    shapes : mapping of str to tuple
        Of the parameters, in their order: those of a layer follow one another.

    Attributes
    ----------
    packed : array
        All of them in the order of the parameters, each at a multiple of `ALIGNED` elements, with zeros between them.
        Zeroing, scaling, a sum over machines, a norm of all are one operation on this.
    layers : dict of str to slice
        Where the parameters of each layer lie in `packed`, by `layer_of`.
    """

    def __init__(self, packed: Any, shapes: Mapping[str, tuple[int, ...]]):
        self.packed, self.shapes = packed, dict(shapes)
        self.layers: dict[str, slice] = {}
        self._views, start = {}, 0
        for path, shape in self.shapes.items():
            stop = start + math.prod(shape)
            self._views[path] = packed[start:stop].reshape(shape)
            first = self.layers.get(layer_of(path), slice(start, None)).start
            self.layers[layer_of(path)] = slice(first, stop)
            start = _aligned(stop)
        self._bounds = [place.start for place in self.layers.values()] + [start]
        self._places = array_module(packed).asarray(np.asarray(self._bounds, np.int64))

    def __getitem__(self, path: str) -> Any:
        return self._views[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy is one run of memory, too
        return Gradients, (self.packed, self.shapes)

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiply the gradients of layers, neighbours, by their factors: one operation for a run that has the same."""
        for factor, layers in itertools.groupby(factors, factors.__getitem__):
            places = [self.layers[layer] for layer in layers]
            run = self.packed[places[0].start : places[-1].stop]
            run *= factor  # of the slice itself: CuPy would copy it onto itself

    def norms(self) -> Any:
        """Return the Euclidean norm of each layer's gradient, weight and bias together, in the order of `layers`."""
        return norms(self.packed, self._bounds, self._places)


def layer_of(path: str) -> str:
    """Return the layer that a parameter belongs to: ``layers.1.weight``, ``layers.1.image.weight`` -> ``layers.1``."""
    return ".".join(path.split(".")[:2]) if path.startswith("layers.") else path.rpartition(".")[0]


def packed_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the elements that arrays of some shapes take in `Gradients.packed`."""
    return sum(_aligned(math.prod(shape)) for shape in shapes.values())


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNED) * ALIGNED
