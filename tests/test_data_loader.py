"""Batches: every sample once, normalised, cropped and mirrored as a naive loop does, reproducible."""

from __future__ import annotations

import types

import numpy as np
import pytest

from cupyep.backend import Device
from cupyep.data import Dataset, Loader, Split
from cupyep.errors import ConfigurationError


def make_dataset(count=23, shape=(6, 5, 3), flip=True, pad=2):
    rng = np.random.default_rng(0)

    def split(name, count):
        return Split(name, rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 4, count))

    return Dataset.from_splits("synthetic", tuple("abcd"), split("train", count), split("test", 7), flip, pad)


def make_loader(dataset, seed=3, batch_size=4, dtype="float64", **options):
    options = {"augment": True, "shuffle": True} | options
    return Loader(dataset, "train", batch_size, "cpu", dtype, generator=np.random.default_rng(seed), **options)


def normalised(dataset, n, y, x):
    """Return pixel (y, x) of train image n by the formula, or zeros outside of the image."""
    _, height, width, channels = dataset.train.images.shape
    if not (0 <= y < height and 0 <= x < width):
        return [0.0] * channels
    pixel = dataset.train.images[n, y, x]
    return [(pixel[c] / 255 - float(dataset.mean[c])) / float(dataset.std[c]) for c in range(channels)]


def test_plain_batches_in_order():
    dataset = make_dataset()
    loader = Loader(dataset, "train", 4, "cpu", "float64")
    batches = list(loader)
    assert len(loader) == len(batches) == 6
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([b.index for b in batches]), np.arange(23))
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), dataset.train.labels)
    images = np.concatenate([b.images for b in batches])
    expected = [[[normalised(dataset, n, y, x) for x in range(5)] for y in range(6)] for n in range(23)]
    np.testing.assert_allclose(images, expected, rtol=1e-12, atol=1e-12)
    assert images.mean(axis=(0, 1, 2)) == pytest.approx([0, 0, 0], abs=1e-6)
    assert images.std(axis=(0, 1, 2)) == pytest.approx([1, 1, 1], abs=1e-6)
    for batch in batches:
        assert batch.index.dtype == np.int64
        assert batch.labels.dtype == np.int64
        assert batch.view.dtype == np.uint8
        assert not batch.view.any()


def test_test_split_and_dtype():
    dataset = make_dataset()
    (batch,) = Loader(dataset, "test", 100, Device("cpu"), np.float32)
    assert batch.images.dtype == np.float32
    assert len(batch) == 7
    np.testing.assert_array_equal(batch.labels, dataset.test.labels)
    stored = dataset.test.images.copy()
    batch.images[:] = 0
    np.testing.assert_array_equal(dataset.test.images, stored)  # a batch is not a window into the data set


def test_shuffle_gives_every_sample_once():
    dataset = make_dataset()
    loader = make_loader(dataset, augment=False)
    first, second = ([batch.index for batch in loader] for _ in range(2))
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(23))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    for batch in loader:
        np.testing.assert_array_equal(batch.labels, dataset.train.labels[batch.index])
        for image, n in zip(batch.images, batch.index, strict=True):
            expected = [[normalised(dataset, n, y, x) for x in range(5)] for y in range(6)]
            np.testing.assert_allclose(image, expected, rtol=1e-12, atol=1e-12)


def find_crops(dataset, image, n, view, pad):
    """Return every (dy, dx) in 0 .. 2 pad for which `image` is that crop of padded image n, mirrored if view is 1."""
    height, width = image.shape[:2]
    found = []
    for dy in range(2 * pad + 1):
        for dx in range(2 * pad + 1):
            crop = [[normalised(dataset, n, y + dy - pad, x + dx - pad) for x in range(width)] for y in range(height)]
            crop = [row[::-1] for row in crop] if view else crop
            if np.allclose(image, crop, rtol=1e-12, atol=1e-12):
                found.append((dy, dx))
    return found


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_augmented_images_against_a_naive_loop(pad):
    dataset = make_dataset()
    offsets, views = set(), []
    for batch in make_loader(dataset, pad=pad):
        for image, n, view in zip(batch.images, batch.index, batch.view, strict=True):
            (offset,) = find_crops(dataset, image, n, view, pad)  # exactly one crop fits
            offsets.add(offset)
            views.append(int(view))
    assert set(views) == {0, 1}
    assert len(offsets) > (0 if pad == 0 else 5)


def test_draws_are_uniform():
    """Each crop offset and view is equally frequent: 2000 draws of 25 offsets, within five standard deviations."""
    dataset = make_dataset(count=2000, shape=(1, 1, 1))
    _, dy, dx, flip, *_ = make_loader(dataset)._draw().T
    for values, kinds in ((dy, 5), (dx, 5), (flip, 2), (dy * 5 + dx, 25)):
        counts = np.bincount(values, minlength=kinds)
        assert len(counts) == kinds
        assert np.abs(counts - 2000 / kinds).max() < 5 * (2000 / kinds) ** 0.5


def test_flip_only_where_data_set_and_caller_allow_it():
    for data_flip, flip, expected in ((True, True, True), (True, False, False), (False, True, False)):
        loader = make_loader(make_dataset(flip=data_flip), flip=flip, batch_size=23)
        (batch,) = loader
        assert batch.view.any() == expected


@pytest.mark.parametrize(("side", "shape"), [(1, (6, 5, 3)), (2, (6, 5, 3)), (3, (6, 5, 3)), (5, (6, 5, 3))])
def test_cutout_hides_a_square_around_a_pixel(side, shape):
    """Against a plain loop over all centres; without it the images of the same draws are the same elsewhere."""
    dataset = make_dataset(count=60, shape=shape)
    loader = make_loader(dataset, cutout=side, dtype="float32")
    (cut, *others), (whole, *same) = collect(loader), collect(make_loader(dataset, dtype="float32"))
    assert_equal_epochs(others, same)
    height, width, _ = shape
    squares = {}
    for y, x in np.ndindex(height, width):
        rows = [r for r in range(y - side // 2, y - side // 2 + side) if 0 <= r < height]
        columns = [c for c in range(x - side // 2, x - side // 2 + side) if 0 <= c < width]
        hidden = np.zeros((height, width), bool)
        for r in rows:
            for c in columns:
                hidden[r, c] = True
        squares[y, x] = hidden
    seen = set()
    for image, before in zip(cut, whole, strict=True):
        fits = [at for at, hidden in squares.items() if np.array_equal(image, np.where(hidden[..., None], 0, before))]
        assert fits
        seen |= {fits[0]} if len(fits) == 1 else set()
    assert len(seen) > 10 or side == 5


def test_cutout_draws_centres_uniformly_and_after_all_others():
    dataset = make_dataset(count=3000, shape=(4, 3, 1))
    loader, plain = make_loader(dataset, cutout=2), make_loader(dataset)
    draws, without = loader._draw(), plain._draw()
    np.testing.assert_array_equal(draws[:, :4], without[:, :4])
    centres = (draws[:, 4] + 1) * 3 + draws[:, 5] + 1
    counts = np.bincount(centres, minlength=12)
    assert len(counts) == 12
    assert np.abs(counts - 250).max() < 5 * 250**0.5


def test_pad_of_the_data_set_is_the_default():
    dataset = make_dataset(pad=1)
    given, default = make_loader(dataset, pad=1), make_loader(dataset)
    for a, b in zip(given, default, strict=True):
        np.testing.assert_array_equal(a.images, b.images)


def collect(loader):
    batches = list(loader)
    return [np.concatenate([getattr(b, name) for b in batches]) for name in ("images", "labels", "index", "view")]


def assert_equal_epochs(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_epochs_follow_from_the_generator_state():
    """A state saved after an epoch gives the next one again, exactly: so a run can be resumed."""
    dataset = make_dataset()
    loader = make_loader(dataset)
    first = collect(loader)
    state = loader.generator.bit_generator.state
    second = collect(loader)
    assert first[2].tolist() != second[2].tolist()
    resumed = make_loader(dataset, seed=99)
    resumed.generator.bit_generator.state = state
    assert_equal_epochs(collect(resumed), second)
    assert resumed.generator.bit_generator.state == loader.generator.bit_generator.state
    assert_equal_epochs(collect(make_loader(dataset)), first)


def test_epoch_depends_neither_on_batch_size_nor_on_how_far_the_last_was_read():
    dataset = make_dataset()
    loader = make_loader(dataset)
    next(iter(loader))
    second = collect(loader)
    whole = make_loader(dataset, batch_size=23)
    collect(whole)
    assert_equal_epochs(collect(whole), second)


def test_plain_loader_leaves_the_generator_alone():
    loader = make_loader(make_dataset(), augment=False, shuffle=False)
    before = loader.generator.bit_generator.state
    collect(loader)
    assert loader.generator.bit_generator.state == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, not 0"),
        ({"pad": -1}, "pad must be an integer of at least 0, not -1"),
        ({"generator": None}, "need a generator"),
        ({"generator": None, "shuffle": False}, "need a generator"),
        ({"split_name": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"cutout": -1}, "cutout must be an integer of at least 0, not -1"),
        ({"cutout": 6}, "cutout must be at most 5, the side of the images"),
        ({"cutout": 2, "augment": False}, "cutout needs augment"),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"split_name": "train", "batch_size": 4, "device": "cpu", "dtype": "float32", "augment": True}
    arguments |= {"shuffle": True, "generator": np.random.default_rng(0)} | options
    with pytest.raises(ConfigurationError, match=message):
        Loader(make_dataset(), **arguments)


class FakeDeviceArray(np.ndarray):
    """Refuses, as CuPy does, to meet a host array in an operation or as an index."""

    @property
    def array_module(self):
        return fake_xp()

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        for value in (*inputs, *out):
            assert isinstance(value, (FakeDeviceArray, int, float)), f"host array in {ufunc.__name__}"
        plain = [v.view(np.ndarray) if isinstance(v, np.ndarray) else v for v in inputs]
        if out:
            kwargs["out"] = tuple(v.view(np.ndarray) for v in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        return out[0] if out else result.view(FakeDeviceArray)

    def __array_function__(self, function, types, args, kwargs):
        raise AssertionError(f"numpy.{function.__name__} called on a device array")

    def __getitem__(self, key):
        for part in key if isinstance(key, tuple) else (key,):
            assert not isinstance(part, np.ndarray) or isinstance(part, FakeDeviceArray), "host array as index"
        return super().__getitem__(key)


def fake_xp():
    """Return the part of an array module that the loader needs, for `FakeDeviceArray`."""

    def on_device(function):
        def call(*args, **kwargs):
            host = [a for a in args if isinstance(a, np.ndarray) and not isinstance(a, FakeDeviceArray)]
            assert not host, f"host array in {function.__name__}"
            plain = [a.view(np.ndarray) if isinstance(a, np.ndarray) else a for a in args]
            return function(*plain, **kwargs).view(FakeDeviceArray)

        return call

    return types.SimpleNamespace(
        __name__="fake",
        asarray=lambda array, dtype=None, order=None: np.array(array, dtype, order=order).view(FakeDeviceArray),
        arange=on_device(np.arange),
        empty=on_device(np.empty),
        take=on_device(np.take),
        where=on_device(np.where),
    )


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_host_and_device_arrays_never_meet(augment, shuffle):
    device = Device("cpu")
    device.xp, device.is_gpu, device.free_bytes, device.use = fake_xp(), True, lambda: None, lambda: None
    options = {"augment": augment, "shuffle": shuffle, "generator": np.random.default_rng(3)}
    dataset = make_dataset()
    on_host = make_loader(dataset, augment=augment, shuffle=shuffle)
    for batch, expected in zip(Loader(dataset, "train", 4, device, "float64", **options), on_host, strict=True):
        assert type(batch.images) is FakeDeviceArray
        assert type(batch.labels) is type(batch.index) is type(batch.view) is np.ndarray
        np.testing.assert_array_equal(batch.images.view(np.ndarray), expected.images)
