"""Data sets of a user's own arrays. Oracle: NumPy on the whole arrays, loops over classes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from data_files import assert_one_line
from strict import StrictDevice

import cupyep as ep
from cupyep.data import Loader, images
from cupyep.data import stored as storing
from cupyep.data.selection import stratified
from cupyep.data.stored import StoredImages, joined
from cupyep.errors import ConfigurationError, CupyepError, DataError

RNG = np.random.default_rng(3)
X, Y = RNG.normal(3, 5, (30, 12, 20, 13)), np.arange(30) % 3
BYTES = RNG.integers(0, 256, (30, 8, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("block", [1, 3000, 1 << 23])
@pytest.mark.parametrize(("shift", "scale"), [(3, 5), (1e4, 0.1), (0, 1e-6)])
def test_statistics_of_floats_are_those_of_the_whole(monkeypatch, block, shift, scale):
    monkeypatch.setattr(images, "BLOCK_BYTES", block)
    x = RNG.normal(shift, scale, (30, 5, 4, 2)).astype(np.float32)
    x[..., 1] = shift  # no variation
    mean, std = images.channel_statistics(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [wide[..., 0].std(), 1], rtol=1e-5)


def test_networks_see_floats_minus_the_mean_over_the_deviation():
    data = ep.Dataset.from_arrays(X, Y, test=(X[:6] + 1, Y[:6]))
    assert data.image_shape == (12, 20, 13)
    assert data.classes == ("0", "1", "2")
    assert data.unit == 1
    batch = next(iter(Loader(data, "test", 6, "cpu", "float64")))
    x = X.astype(np.float32)
    wanted = ((X[:6] + 1).astype(np.float32) - x.mean((0, 1, 2), np.float64)) / x.std((0, 1, 2), np.float64)
    np.testing.assert_allclose(batch.images, wanted, atol=1e-5)
    net = ep.models.build("8p 8", classes=3, input_shape=data.image_shape, device="cpu")
    learner = ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2, schedule="synchronous")
    assert np.isfinite(learner.step(next(iter(Loader(data, "train", 6, "cpu", "float32")))).loss)


def test_bytes_stay_bytes_and_other_numbers_become_floats():
    data = ep.Dataset.from_arrays(BYTES, Y)
    assert data.train.images.dtype == np.uint8
    assert data.unit == 255
    np.testing.assert_allclose(data.mean, data.train.images.mean((0, 1, 2)) / 255, rtol=1e-6)
    deep = BYTES.astype(np.uint16) * 257
    other = ep.Dataset.from_arrays(deep, Y)
    assert other.train.images.dtype == np.float32
    assert other.unit == 1
    one, two = (next(iter(Loader(d, "test", 6, "cpu", "float64"))).images for d in (data, other))
    np.testing.assert_allclose(one, two, atol=1e-5)  # units make no difference


def test_parts_are_drawn_by_the_seed_in_the_proportions_of_the_classes():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    x = np.arange(100, dtype=np.float32).reshape(100, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    data = ep.Dataset.from_arrays(x, labels, test_fraction=0.2, validation=16, seed=1)
    parts = (data.train, data.validation, data.test)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[38, 19, 7], [10, 5, 1], [12, 6, 2]]
    numbers = [part.images[:, 0, 0, 0].astype(int) for part in parts]
    assert sorted(np.concatenate(numbers)) == list(range(100))
    for part, own in zip(parts, numbers, strict=True):
        np.testing.assert_array_equal(part.labels, labels[own])
    again, other = (ep.Dataset.from_arrays(x, labels, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(again.test.images, data.test.images)
    assert (other.test.images != data.test.images).any()


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_classes(seed):
    """Within one sample of the exact share, and nobody's last one is taken."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 40, 5)
    labels = rng.permutation(np.repeat(np.arange(5), sizes))
    count = int(rng.integers(1, len(labels) // 2))
    taken = np.bincount(labels[stratified(labels, count, seed, 2)], minlength=5)
    assert taken.sum() == count
    assert (taken < sizes).all()
    assert (abs(taken - sizes * count / len(labels)) <= 1).all()


def test_parts_that_are_given():
    held = (X[:4] + 2, Y[:4])
    data = ep.Dataset.from_arrays(X, Y, (X[:6], Y[:6]), validation=held, limit_train=9, name="mine", flip=True)
    np.testing.assert_array_equal(data.validation.images, held[0].astype(np.float32))
    np.testing.assert_array_equal(data.validation.index, np.arange(30, 34))
    assert (len(data.train), len(data.test), data.train.total, data.name, data.flip) == (9, 6, 34, "mine", True)
    both = np.concatenate([X, held[0]]).astype(np.float32)
    np.testing.assert_allclose(data.mean, both.mean((0, 1, 2)), rtol=1e-4)


def test_classes_by_name():
    names = np.array(["owl", "cat", "newt"])[Y]
    data = ep.Dataset.from_arrays(X, names, (X[:3], list(names[:3])))
    assert data.classes == ("cat", "newt", "owl")
    np.testing.assert_array_equal(data.test.labels, [2, 0, 1])
    ordered = ep.Dataset.from_arrays(X, names, (X[:3], names[:3]), classes=["owl", "cat", "newt", "none"])
    np.testing.assert_array_equal(ordered.train.labels, Y)


def tensors():
    torch = pytest.importorskip("torch")
    return torch.from_numpy(X.astype(np.float32).transpose(0, 3, 1, 2).copy()), torch.from_numpy(Y)


def test_arrays_of_other_libraries():
    x, y = tensors()
    data, own = ep.Dataset.from_arrays(x, y, channels_first=True), ep.Dataset.from_arrays(X, Y)
    np.testing.assert_array_equal(data.train.images, own.train.images)
    fake = StrictDevice().asarray(X.astype(np.float32))
    np.testing.assert_array_equal(ep.Dataset.from_arrays(fake, Y).test.images, own.test.images)
    with pytest.raises(ConfigurationError, match="detach") as error:
        ep.Dataset.from_arrays(x.requires_grad_(), y)
    assert_one_line(error, "x cannot be taken as an array")


class Samples(list):
    classes = ("a", "b", "c")


def test_samples_of_torch():
    x, y = tensors()
    torch = pytest.importorskip("torch")
    own = ep.Dataset.from_arrays(X, Y)
    data = ep.Dataset.from_torch(torch.utils.data.TensorDataset(x, y))
    np.testing.assert_array_equal(data.train.images, own.train.images)
    pictures = pytest.importorskip("PIL.Image")
    pairs = Samples((pictures.fromarray(pixels), int(label)) for pixels, label in zip(BYTES, Y, strict=True))
    data = ep.Dataset.from_torch(pairs, test=pairs[:5])
    assert data.classes == ("a", "b", "c")
    np.testing.assert_array_equal(data.train.images, BYTES)
    np.testing.assert_array_equal(data.test.images, BYTES[:5])
    grey = [(BYTES[0, ..., 0], 0), (BYTES[1, ..., 0], 1)] * 3
    assert ep.Dataset.from_torch(grey).image_shape == (8, 10, 1)
    deep = np.arange(6 * 16 * 16, dtype=np.uint16).reshape(6, 16, 16) * 40
    for mode, kind in (("I;16", np.uint16), ("I", np.int32), ("F", np.float32)):  # more than bytes hold
        images = [pictures.fromarray(pixels.astype(kind)) for pixels in deep]
        assert {image.mode for image in images} == {mode}
        data = ep.Dataset.from_torch(list(zip(images, [0, 1] * 3, strict=True)), test=[(images[0], 0)])
        np.testing.assert_array_equal(data.train.images[..., 0], deep.astype(np.float32))


WRONG = {
    "labels from one": ((X, Y + 1), "labels run from 1 to 3, and not every class from 0 on"),
    "labels from one, an empty test": ((X, Y + 1, (X, Y[:0])), "labels run from 1 to 3, and not every class from 0 on"),
    "labels missing": ((X, Y[:-1]), "30 images, but 29 labels"),
    "labels as numbers with a point": ((X, Y / 2), "y holds float64; labels are integers from 0 on, or names"),
    "one-hot": ((X, np.eye(30)), "of one-hot rows take y.argmax"),
    "negative": ((X, Y - 1), "labels run from -1 to 1"),
    "one class": ((X, Y * 0), "only one class"),
    "text": (("x", Y), "x holds <U1; images are"),
    "ragged": (([[1], [1, 2]], Y), "x cannot be taken as an array"),
    "a vector": ((Y, Y), "x has shape (30,); images are (N, H, W, C)"),
    "empty": ((X[:0], Y[:0]), "x has shape (0, 12, 20, 13)"),
    "objects": ((np.full((2, 3, 3, 1), None), [0, 1]), "x holds object"),
    "channels first": ((X.transpose(0, 3, 1, 2)[:, :3], Y), "looks like (N, C, H, W); give channels_first=True"),
    "NaN": ((np.where(np.arange(30)[:, None, None, None] == 7, np.nan, X), Y), "image 7 has values that are NaN"),
    "too large for float32": ((X * 1e40, Y), "image 0 has values that are NaN or infinite"),
    "test of another size": ((X, Y, (X[:, :8], Y)), "test images are float32 (8, 20, 13), train images float32 (12"),
    "test of another type": ((X, Y, (BYTES, Y)), "they must agree"),
    "test without labels": ((X, Y, X), "test must be (x, y)"),
    "names and numbers": ((X, Y, (X, Y.astype(str))), "some labels are names and some are numbers"),
    "unknown name": ((X, Y.astype(str), (X, ["9"] * 30)), "label '9' is no class of the training images"),
    "too few names": ((X, Y, None, ["a", "b"]), "there are 2 classes"),
    "a name twice": ((X, Y, None, ["a", "b", "a"]), "two classes have the same name"),
    "all held out": ((X, Y, None, None, 24), "validation is 24: arrays has 24 train images"),
    "held out a text": ((X, Y, None, None, "x"), "validation must be (x, y)"),
    "one image": ((X[:1], Y[:1], None, ["a", "b"]), "has one image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_one_line(case):
    arguments, message = WRONG[case]
    with pytest.raises(CupyepError) as error:
        ep.Dataset.from_arrays(*arguments)
    assert_one_line(error, message)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (iter([(BYTES[0], 0)]), "must be a map-style data set"),
        ([], "holds no samples"),
        ([BYTES[0], BYTES[1]], "sample 0 of samples is no pair"),
        ([(BYTES[0], 0), (BYTES[0, :4], 1)], "image 1 of samples is uint8 (4, 10, 3), image 0 uint8 (8, 10, 3)"),
        ([(BYTES[0], 0.5)], "label 0 of samples must be an integer or a name, not 0.5"),
        ([(Y, 0)], "image 0 of samples has shape (30,)"),
    ],
)
def test_wrong_samples_are_one_line(samples, message):
    with pytest.raises((DataError, ConfigurationError)) as error:
        ep.Dataset.from_torch(samples)
    assert_one_line(error, message)


def stored(array):
    return StoredImages(array.__getitem__, array.shape, array.dtype)


@pytest.mark.parametrize("x", [X.astype(np.float32), BYTES], ids=["floats", "bytes"])
@pytest.mark.parametrize("how", [{}, {"shuffle": True}, {"shuffle": True, "augment": True}], ids=str)
def test_streamed_batches_are_those_of_images_in_memory(monkeypatch, x, how):
    monkeypatch.setattr(storing, "RESIDENT_BYTES", 0)
    found = []
    for images_ in (x, stored(x)):
        data = ep.Dataset.from_arrays(images_, Y, validation=4, flip=True)
        batches = Loader(data, "train", 7, "cpu", "float32", generator=np.random.default_rng(5), **how)
        found.append([*batches, *batches.batches(1), *Loader(data, "validation", 7, "cpu", "float32")])
    assert len(found[0]) == len(found[1]) == 6
    for one, two in zip(*found, strict=True):
        for name in ("images", "labels", "index", "view"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_a_gpu_without_room_gets_batches(monkeypatch):
    device, whole = StrictDevice(), ep.Dataset.from_arrays(BYTES, Y)
    for free, resident in ((whole.train.images.nbytes * 2, True), (whole.train.images.nbytes * 2 - 2, False)):
        monkeypatch.setattr(device, "free_bytes", lambda free=free: free)
        batches = Loader(whole, "train", 8, device, "float32")
        assert (batches._images is not None) == resident
        first = next(iter(batches)).images
        np.testing.assert_array_equal(
            device.to_numpy(first), next(iter(Loader(whole, "train", 8, "cpu", "float32"))).images
        )


def test_the_next_batch_is_read_while_one_is_worked_on(monkeypatch):
    read, asked = threading.Event(), []

    def slow(rows):
        asked.append(len(rows))
        if len(asked) == 2:
            read.set()
        return BYTES[rows]

    data = ep.Dataset.from_arrays(BYTES, Y, (BYTES, Y))
    object.__setattr__(data.train, "images", StoredImages(slow, BYTES.shape, np.uint8))
    monkeypatch.setattr(storing, "RESIDENT_BYTES", 0)
    iterator = iter(Loader(data, "train", 10, "cpu", "float32"))
    next(iterator)
    assert read.wait(60), "the second batch is not read before it is asked for"
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("cupyep-images")]


def test_balanced_epochs():
    """Of every class equally many; of a small one each image equally often; every batch of an epoch is as looked up."""
    labels = np.repeat([0, 1, 2], [40, 7, 3])
    x = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1).repeat(4, 1).repeat(4, 2)
    data = ep.Dataset.from_arrays(x, labels, (x, labels))
    generator = np.random.default_rng(0)
    batches = Loader(data, "train", 8, "cpu", "float64", shuffle=True, balance=True, generator=generator)
    seen, fewer = [], set()
    for _ in range(12):
        epoch = list(batches)
        index = np.concatenate([batch.index for batch in epoch])
        assert sorted(np.bincount(labels[index])) == [16, 17, 17]
        fewer.add(int(np.bincount(labels[index]).argmin()))
        for c in (1, 2):
            times = np.bincount(index, minlength=50)[labels == c]
            assert times.max() - times.min() <= 1
        pixels = np.concatenate([batch.images[:, 0, 0, 0] for batch in epoch])
        np.testing.assert_allclose(pixels, (index - data.mean[0]) / data.std[0], rtol=1e-6)
        np.testing.assert_array_equal(np.concatenate([batch.labels for batch in epoch]), labels[index])
        seen.append(set(index[labels[index] == 0]))
    assert len(seen[0]) == 16 or len(seen[0]) == 17
    assert seen[0] != seen[1]
    assert fewer == {0, 1, 2}, "what does not divide evenly falls to other classes every time"
    with pytest.raises(ConfigurationError, match="balance needs shuffle"):
        Loader(data, "train", 8, "cpu", "float64", balance=True)


def test_joined_images():
    both = joined(stored(X[:20]), X[20:])
    for rows in (slice(3, 25), np.array([29, 0, 20, 19]), slice(None)):
        np.testing.assert_array_equal(both[rows], X[rows])
    np.testing.assert_array_equal(joined(X[:2], X[2:4]), X[:4])
    np.testing.assert_array_equal(both.select(np.array([21, 1, 5]))[np.array([2, 0])], X[[5, 21]])
