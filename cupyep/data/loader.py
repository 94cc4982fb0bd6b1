"""Batches on the device: images gathered, cropped, mirrored, normalised, a square hidden; from draws on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cupyep.backend import Device, get_device, threads
from cupyep.batch import Batch, is_dtype
from cupyep.data.dataset import Dataset
from cupyep.data.selection import evened
from cupyep.data.stored import StoredImages
from cupyep.errors import flag, instance, integer, items, number, require, shown
from cupyep.ops.conv import chunked
from cupyep.ops.crop import crop

DTYPES = ("float32", "float64")
ROOM_SHARE = 0.5  # of the memory that a GPU has left; the network needs some, too
ORDER, FLIP = 0, 3  # columns of an epoch's draws that the host reads; of all six tells `CropOps.crop`
SENT_AT_ONCE = 32 << 20  # bytes: what CuPy sends goes through page-locked memory, of which it keeps as much for ever


class Normaliser:
    """Makes network inputs of pixels: a value x of channel c becomes (x / unit - mean[c]) / std[c], of type `dtype`.

    The `unit` is 255 for uint8 images, 1 for floats.
    """

    def __init__(self, mean: np.ndarray, std: np.ndarray, device: Device, dtype: Any, unit: float = 255.0):
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self.dtype = np.dtype(dtype)
        self.scale = device.asarray(1 / (unit * std), self.dtype)
        self.shift = device.asarray(-mean / std, self.dtype)

    def __call__(self, pixels: Any) -> Any:
        """Return `pixels` (..., C) on the device as normalised numbers, a new array."""
        images = pixels.astype(self.dtype)
        images *= self.scale
        images += self.shift
        return images


class Loader:
    """Iterable of `Batch` over one split; every sample once (or balanced), the last batch as small as it comes out.

    Parameters
    ----------
    dataset : Dataset
    split_name : {"train", "validation", "test"}
    batch_size : int
        At least 1.
    device : Device or str
        The images are copied there once, if they are in memory and there is room; otherwise batch by batch.
    dtype : dtype
        Of the batches: float32 or float64.
    augment : bool, default False
        Random crop and, where the data set allows it, horizontal flip.
    shuffle : bool, default False
        A new random order in every epoch.
    generator : numpy.random.Generator, optional
        Needed by `augment` and `shuffle`.
    pad : int, optional
        The crop is taken from the image widened by so many pixels on each side; default ``dataset.pad``. The added
        pixels are zero after normalisation, that is, they have the mean colour.
    flip : bool, default True
        False forbids mirroring; True allows it only where ``dataset.flip`` does.
    cutout : int, default 0
        Needs `augment`. Side of a square that is hidden in every image, after crop and flip: its centre is uniform
        among the pixels, what lies outside of the image is cut off, and hidden pixels have the mean colour.
    label_smoothing : float, default 0
        Of the batches (`Batch`), in [0, 1).
    share : tuple of two ints, default (0, 1)
        Which part of how many nearly equal ones of each batch this process takes (`Batch.share`).
    balance : bool, default False
        In every epoch images of every class equally often: some several times, others not at all. Needs `shuffle`.

    Notes
    -----
    Images are normalised by `Normaliser`. Those that are not kept on the device are read by a thread, one batch ahead
    of the one that is worked on; the batches are the same.

    Iterating draws all random numbers of the epoch at once, on the host, by sample and not by batch: the order and
    augmentation of an epoch depend on nothing but the generator's state when it begins (not on device, batch size,
    or how far the last epoch was consumed), and the state afterwards is that of the next epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        split_name: str,
        batch_size: int,
        device: Device | str,
        dtype: Any,
        augment: bool = False,
        shuffle: bool = False,
        generator: np.random.Generator | None = None,
        pad: int | None = None,
        flip: bool = True,
        cutout: int = 0,
        label_smoothing: float = 0.0,
        share: tuple[int, int] = (0, 1),
        balance: bool = False,
    ):
        instance("dataset", dataset, Dataset)
        self.batch_size = integer("batch_size", batch_size)
        self.augment, self.shuffle = flag("augment", augment), flag("shuffle", shuffle)
        self.balance = flag("balance", balance)
        require(self.shuffle or not self.balance, "balance needs shuffle")
        require(generator is not None or not (augment or shuffle), "shuffle and augment need a generator")
        if generator is not None:
            instance("generator", generator, np.random.Generator)
        require(is_dtype(dtype, DTYPES), f"dtype must be {' or '.join(DTYPES)}, not {shown(dtype)}")
        self.split = dataset.split(split_name)
        self.device = get_device(device)
        self.dtype = np.dtype(dtype)
        self.generator = generator
        self.pad = dataset.pad if pad is None else integer("pad", pad, 0)
        self.flip = flag("flip", flip) and dataset.flip
        self.cutout, side = integer("cutout", cutout, 0), min(self.split.images.shape[1:3])
        require(self.cutout <= side, f"cutout must be at most {side}, the side of the images (got {cutout})")
        require(augment or not self.cutout, "cutout needs augment")
        self.label_smoothing = number("label_smoothing", label_smoothing, 0, below=1)
        pair = items("share", share)
        require(len(pair) == 2, f"share must be two integers, not {shown(pair)}")
        parts = integer("the second of share", pair[1])
        self.share = (integer("the first of share", pair[0], 0, parts - 1), parts)
        self._images: Any = self._placed() if self._has_room() else None
        self._normalise = Normaliser(dataset.mean, dataset.std, self.device, self.dtype, dataset.unit)

    def _has_room(self) -> bool:
        """Return whether all images are to be kept on the device."""
        images, free = self.split.images, self.device.free_bytes()
        is_large = isinstance(images, StoredImages) and images.is_large
        return not is_large and (free is None or images.nbytes <= ROOM_SHARE * free)

    def _placed(self) -> Any:
        """Return all images, on the device."""
        images, device = self.split.images, self.device
        if not device.is_gpu:
            return device.asarray(images[:])
        device.use()
        there = device.empty(images.shape, images.dtype)
        for part, _ in chunked(len(images), SENT_AT_ONCE * len(images) // images.nbytes):
            there[part] = device.asarray(images[part])
        return there

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Draw an epoch and return an iterator over its batches from number `first` (of 0, 1, ...) on.

        To take up an epoch in its middle, set the generator back to its state at the beginning of that epoch.
        """
        integer("first", first, 0)
        draws = self._draw()  # here, not in the generator below: an epoch's draws are made when it begins
        there = self.device.asarray(draws) if self.augment or self.shuffle else None  # once an epoch
        starts = range(first * self.batch_size, len(self.split), self.batch_size)
        if self._images is None:
            return self._streamed(draws, there, starts)
        return (self._batch(draws, there, start) for start in starts)

    def _streamed(self, draws: np.ndarray, there: Any, starts: Sequence[int]) -> Iterator[Batch]:
        """Yield batches whose images are read while the one before is worked on."""
        rows = [draws[self._own(start)[0], ORDER] for start in starts]
        with ThreadPoolExecutor(1, "cupyep-images") as reader:
            coming = [reader.submit(self.split.images.__getitem__, places) for places in rows[:1]]
            for number, start in enumerate(starts):
                pixels = coming.pop().result()
                coming += [reader.submit(self.split.images.__getitem__, places) for places in rows[number + 1 :][:1]]
                yield self._batch(draws, there, start, self.device.asarray(pixels))

    def _draw(self) -> np.ndarray:
        """Return the random numbers of an epoch, a row for each position in it, as `CropOps.crop` takes them."""
        count, rng = len(self.split), self.generator
        draws = np.zeros((count, 6), np.int64)
        draws[:, ORDER] = np.arange(count)
        if rng is None:  # which `__init__` allows where nothing is drawn
            return draws
        if self.shuffle:
            draws[:, ORDER] = evened(self.split.labels, rng) if self.balance else rng.permutation(count)
        if self.augment:
            draws[:, 1:3] = rng.integers(0, 2 * self.pad, (2, count), endpoint=True).T
            if self.flip:
                draws[:, FLIP] = rng.integers(0, 1, count, endpoint=True)
        if self.cutout:  # drawn last: whoever hides nothing draws what was drawn before there were squares
            height, width = self.split.images.shape[1:3]
            centres = rng.integers(0, [[height], [width]], (2, count))
            draws[:, 4:] = (centres - self.cutout // 2).T
        return draws

    def _batch(self, draws: np.ndarray, there: Any, start: int, pixels: Any = None) -> Batch:
        """Return a batch: of the images on the device, or of just its own `pixels`, which are there, too."""
        rows, share = self._own(start)
        places = draws[rows, ORDER]
        if self.augment:
            images = self._crops(self._images if pixels is None else pixels, there[rows], own=pixels is not None)
        elif pixels is not None:
            images = self._normalise(pixels)
        elif self.shuffle:
            images = self._normalise(self.device.xp.take(self._images, there[rows, 0], axis=0))
        else:
            images = self._normalise(self._images[rows])
        after, _ = self._own(start + self.batch_size)
        (index, view), next_up = self._looked_up(draws, rows), self._looked_up(draws, after)
        coming = next_up if len(next_up[0]) else None
        return Batch(images, self.split.labels[places], index, view, True, coming, self.label_smoothing, share)

    def _own(self, start: int) -> tuple[slice, tuple[int, int] | None]:
        """Return this process's rows of the batch that starts at a place in the epoch, and its `Batch.share`."""
        whole = min(self.batch_size, max(len(self.split) - start, 0))
        part, parts = self.share
        first, last = (start + whole * number // parts for number in (part, part + 1))
        share = (last - first, whole) if parts > 1 else None
        return slice(first, max(last, first + 1)), share

    def _looked_up(self, draws: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return by what a teacher's logits are looked up."""
        return self.split.index[draws[rows, ORDER]], draws[rows, FLIP].astype(np.uint8)

    def _crops(self, stored: Any, draws: Any, own: bool) -> Any:
        """Return crops of `stored` by `draws` (B, 6), which are there; on a CPU each thread takes a part of them."""
        normalise = self._normalise
        how = {"scale": normalise.scale, "shift": normalise.shift, "pad": self.pad, "side": self.cutout, "own": own}
        if self.device.is_gpu:
            return crop(stored, draws, **how)
        rows = [part for part, _ in chunked(len(draws), threads.PART)]

        def cropped(part: int, turns: threads.Turns) -> Any:
            return crop(stored[rows[part]] if own else stored, draws[rows[part]], **how)

        return self.device.xp.concatenate(threads.run_parts(self, len(rows), cropped))
