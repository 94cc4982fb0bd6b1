"""Some samples and their labels, and what arrays of them must be: all that goes into a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cupyep.backend import Device, array_module
from cupyep.errors import ConfigurationError, instance, require


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of one split, ready for a network.

    Attributes
    ----------
    images : array of float, shape (N, H, W, C), on the device
        Normalised images.
    labels : ndarray of int64, shape (N,), on the host, or None
    index : ndarray of int64, shape (N,), on the host, optional
        Canonical index of each sample (`Split.index`); teacher logits are looked up by it.
    view : ndarray of uint8, shape (N,), on the host, optional
        0 where the image is as stored, 1 where it is mirrored (see `cupyep.data.VIEWS`).
    checked : bool
        Whether the values of the images are known to be good, as a `Loader`'s are; a look at them waits for the GPU.
    coming : tuple of two ndarrays, optional
        `index` and `view` of the batch after this one: a teacher in a file is read ahead by them.
    label_smoothing : float
        Part of a label, in [0, 1), that `one_hot` spreads over all classes alike.
    share : tuple of two ints, optional
        Where a batch is dealt out to several processes: how many samples of it are this one's, and how many there are.
        A process for which none is left has one that counts for nothing.
    """

    images: Any
    labels: np.ndarray | None
    index: np.ndarray | None = None
    view: np.ndarray | None = None
    checked: bool = False
    coming: tuple[np.ndarray, np.ndarray] | None = None
    label_smoothing: float = 0.0
    share: tuple[int, int] | None = None
    _labels: Any = field(default=None, init=False, repr=False)  # on the device; not what `replace` hands on
    _rows: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # made of them

    def __len__(self) -> int:
        return len(self.images if self.labels is None else self.labels)

    def part(self, rows: slice) -> Batch:
        """Return a batch of some of the samples, which shares their memory."""
        instance("rows", rows, slice)
        arrays = (self.images, self.labels, self.index, self.view)
        images, labels, index, view = (None if array is None else array[rows] for array in arrays)
        part = replace(self, images=images, labels=labels, index=index, view=view)
        return part if self._labels is None else part._with(self._labels[rows])

    def _with(self, labels: Any) -> Batch:
        object.__setattr__(self, "_labels", labels)
        return self

    def placed(self, device: Device) -> Batch:
        """Return the same batch with its labels on `device` as well: they are sent once, and not whenever needed."""
        same = replace(self)
        return same if self.labels is None else same._with(device.asarray(self.labels))

    @property
    def nearest_labels(self) -> Any:
        """The labels on the device where the batch is `placed`, else those on the host."""
        return self.labels if self._labels is None else self._labels

    def one_hot(self, classes: int, dtype: Any, device: Device) -> Any:
        """Return the labels as rows (N, classes) on `device`, smoothed; where the batch is `placed`, made once."""
        if self._labels is None:
            return self._smoothed(one_hot(self.labels, classes, dtype, device))
        key = (classes, np.dtype(dtype), device)
        if key not in self._rows:
            self._rows[key] = self._smoothed(one_hot(self._labels, classes, dtype, device))
        return self._rows[key]

    def _smoothed(self, rows: Any) -> Any:
        if self.label_smoothing:
            rows *= 1 - self.label_smoothing
            rows += self.label_smoothing / rows.shape[-1]
        return rows


def is_dtype(value: Any, names: Sequence[str]) -> bool:
    """Return whether `value` is one of some types of numbers: a name, a class or a dtype of NumPy."""
    return isinstance(value, (str, type, np.dtype)) and str(getattr(value, "__name__", value)) in names


def shared_out(batch: Any) -> tuple[int, int]:
    """Return how many samples of a batch are this process's, and how many it has over all processes."""
    return getattr(batch, "share", None) or (len(batch), len(batch))


def checked_images(x: Any, shape: tuple[int, ...], stored: Any, values: bool = True) -> Any:
    """Return images as an array, where they are, if they are floats (N, *shape), finite, N >= 1.

    `stored` is the type that they become, in which their values must stay finite. bfloat16 is taken as well as the
    float types of NumPy. Whether to look at the `values`: on a GPU that waits. `ConfigurationError` if they are not so.
    """
    x = as_array("images", x)
    takes = f"this network takes (N, {', '.join(map(str, shape))}), channels last"
    fits = x.ndim == len(shape) + 1 and x.shape[1:] == shape
    transposed = "; transpose them: x.transpose(0, 2, 3, 1)" if x.shape[1:] == (*shape[2:], *shape[:2]) else ""
    hint = "; N is at least 1" if fits else transposed
    require(fits and len(x) > 0, f"images have shape {tuple(x.shape)}, {takes}{hint}")
    require(
        x.dtype.kind == "f" or x.dtype.name == "bfloat16",
        f"images are {x.dtype}, not normalised floats: take (x / 255 - mean) / std, with the data set's mean and std "
        "a channel (Dataset.mean, Dataset.std); a Loader does so",
    )
    if values:
        xp = array_module(x)
        with np.errstate(over="ignore"):  # what becomes infinite is the question
            kept = x.astype(stored, copy=False) if np.dtype(stored).kind == "f" else x
        finite = xp.isfinite(kept).reshape(len(x), -1).min(axis=1)
        finite = finite if isinstance(finite, np.ndarray) else xp.asnumpy(finite)
        if not finite.all():
            first = int(finite.argmin())
            raise ConfigurationError(
                f"image {first} has values that are NaN or infinite, as {stored}; correct or leave it out"
            )
    return x


def checked_labels(labels: Any, samples: int, classes: int) -> np.ndarray:
    """Return labels as int64 (N,) on the host if they are `samples` integers from 0 to ``classes - 1``.

    `ConfigurationError` if they are not.
    """
    labels = as_array("labels", labels)
    labels = labels if isinstance(labels, np.ndarray) else array_module(labels).asnumpy(labels)
    hint = "; of one-hot rows take y.argmax(axis=1)" if labels.shape == (samples, classes) else ""
    require(
        labels.shape == (samples,),
        f"{samples} images need {samples} labels, not an array of shape {labels.shape}{hint}",
    )
    require(labels.dtype.kind in "iu", f"labels must be integers from 0 to {classes - 1}, not {labels.dtype}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        first = wrong[0]
        raise ConfigurationError(f"labels must be integers from 0 to {classes - 1}, not {labels[first]} (at {first})")
    return labels.astype(np.int64, copy=False)


def one_hot(labels: Any, classes: int, dtype: Any, device: Any) -> Any:
    """Return labels (N,) as one-hot rows (N, classes) on `device`, where labels that are there already are not checked.

    A look at them would wait for the GPU.
    """
    if isinstance(labels, (np.ndarray, list, tuple)):
        labels = np.asarray(labels)
        require(
            labels.ndim == 1 and (labels.size == 0 or (labels.min() >= 0 and labels.max() < classes)),
            f"labels must be a vector of integers from 0 to {classes - 1}",
        )
    labels = device.asarray(labels)
    return (labels[:, None] == device.xp.arange(classes)).astype(dtype)


def as_array(what: str, x: Any) -> Any:
    """Return `x` if it is an array of any device, else as a NumPy array."""
    try:
        array_module(x)
        return x
    except TypeError:
        pass  # no array yet: a list, a tensor of another library
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{what} must be an array of numbers, not {type(x).__name__}: {error}") from error
