"""Data sets: folders, downloads, limits, image sizes, statistics."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    assert_one_line,
    cifar_binary_files,
    idx_files,
    random_arrays,
    shrink_source,
    write_archive,
    write_files,
)

from cupyep.data import DATASETS, Dataset, Split, data_directory, load_dataset, sources
from cupyep.data.images import bilinear, channel_statistics, resize, shrink
from cupyep.errors import ConfigurationError, DataError


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    """Write a small CIFAR-10; return its folder and arrays."""
    shrink_source(monkeypatch, "cifar10")
    arrays = random_arrays((32, 32, 3), 10)
    write_files(tmp_path / "cifar-10-batches-bin", cifar_binary_files("cifar10", arrays))
    return tmp_path, arrays


def test_table():
    sizes = {"cifar10": 10, "cifar100": 100, "cifar100-coarse": 20, "mnist": 10, "fashion-mnist": 10, "kmnist": 10,
             "emnist-letters": 26, "emnist-balanced": 47, "emnist-digits": 10, "svhn": 10, "svhn-extra": 10,
             "digits": 10}  # fmt: skip
    assert tuple(sizes) == DATASETS
    for name, source in sources.SOURCES.items():
        assert len(set(source.classes)) == sizes[name]
        assert all(len(remote.md5) == 32 for remote in source.remotes)
    assert sources.SOURCES["cifar100"].classes == tuple(sorted(sources.SOURCES["cifar100"].classes))
    assert {name for name, source in sources.SOURCES.items() if source.flip} == {
        "cifar10", "cifar100", "cifar100-coarse", "fashion-mnist",
    }  # fmt: skip


def test_unknown_name_has_the_nearest():
    with pytest.raises(ConfigurationError, match="unknown data set 'cifra10'; did you mean 'cifar10'"):
        load_dataset("cifra10")


def test_data_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("CUPYEP_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data_directory() == Path("/home/someone/.cache/cupyep")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_directory() == Path("/cache/cupyep")
    monkeypatch.setenv("CUPYEP_DATA", "~/images")
    assert data_directory() == Path("/home/someone/images")
    assert data_directory(tmp_path) == tmp_path
    assert data_directory("~/x") == Path("/home/someone/x")


def test_environment_variable_is_used(monkeypatch, cifar10):
    folder, arrays = cifar10
    monkeypatch.setenv("CUPYEP_DATA", str(folder))
    np.testing.assert_array_equal(load_dataset("cifar10", download=False).test.images, arrays[1][0])


def test_limits_take_the_first_of_each_class_and_leave_the_statistics(cifar10):
    folder, ((images, labels), _) = cifar10
    whole = load_dataset("cifar10", folder)
    dataset = load_dataset("cifar10", folder, limit_train=7, limit_test=1)
    firsts = sorted({labels.tolist().index(c) for c in range(10)})[:7]
    np.testing.assert_array_equal(dataset.train.images, images[firsts])
    np.testing.assert_array_equal(dataset.train.labels, labels[firsts])
    np.testing.assert_array_equal(dataset.train.index, firsts)
    assert (len(dataset.train), dataset.train.total) == (7, 50)
    assert (len(dataset.test), dataset.test.total) == (1, 10)
    np.testing.assert_array_equal(dataset.mean, whole.mean)
    assert dataset.train.images.base is None  # the rest can be freed


@pytest.mark.parametrize("limit", [0, -1, 51])
def test_impossible_limits(cifar10, limit):
    with pytest.raises(
        ConfigurationError, match=f"limit-train is {limit}: cifar10 has 50 train images, choose from 1 to 50"
    ):
        load_dataset("cifar10", cifar10[0], limit_train=limit)
    with pytest.raises(ConfigurationError, match="limit-test is 11"):
        load_dataset("cifar10", cifar10[0], limit_test=11)


def test_split_take():
    split = Split("train", np.zeros((3, 2, 2, 1), np.uint8), np.arange(3))
    assert split.take(2).take(1).total == 3
    for count in (0, 4):
        with pytest.raises(ConfigurationError, match="choose from 1 to 3"):
            split.take(count)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((3, 2, 2, 1)), np.arange(3)),
        (np.zeros((3, 2, 2), np.uint8), np.arange(3)),
        (np.zeros((0, 2, 2, 1), np.uint8), np.arange(0)),
        (np.zeros((3, 2, 2, 1), np.uint8), np.arange(4)),
        (np.zeros((3, 2, 2, 1), np.uint8), np.arange(3.0)),
    ],
)
def test_wrong_split(images, labels):
    with pytest.raises(DataError, match="split train: ") as error:
        Split("train", images, labels)
    assert_one_line(error)


def test_dataset_of_ones_own():
    def split(name, size=2, label=1):
        return Split(name, np.full((3, size, size, 1), 51, np.uint8), np.full(3, label))

    dataset = Dataset.from_splits("mine", ("a", "b"), split("train"), split("test"), flip=True, pad=1)
    assert dataset.mean == pytest.approx(0.2)
    assert dataset.std == 1  # constant images
    assert dataset.split("test") is dataset.test
    with pytest.raises(DataError, match="data set mine, split test: 3 of 3 labels lie outside 0..1"):
        Dataset.from_splits("mine", ("a", "b"), split("train"), split("test", label=2))
    with pytest.raises(DataError, match="they must agree"):
        Dataset.from_splits("mine", ("a", "b"), split("train"), split("test", size=4))
    with pytest.raises(ConfigurationError, match="unknown split 'valid'"):
        dataset.split("valid")


@pytest.mark.parametrize("count", [3, 2001])
def test_channel_statistics(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 5, 2), dtype=np.uint8)
    images[..., 1] //= 7
    mean, std = channel_statistics(images)
    for c in range(2):
        values = [int(v) / 255 for v in images[..., c].ravel()]
        average = sum(values) / len(values)
        assert mean[c] == pytest.approx(average, rel=1e-6)
        assert std[c] == pytest.approx((sum((v - average) ** 2 for v in values) / len(values)) ** 0.5, rel=1e-6)


def test_statistics_of_a_nearly_constant_channel():
    """One pixel of 20000 differs by one step: a std of 1 / 255 / sqrt(20000) must not be taken for zero."""
    images = np.full((20000, 1, 1, 1), 255, np.uint8)
    assert channel_statistics(images)[1] == 1
    images[5] = 254
    assert channel_statistics(images)[1] == pytest.approx(1 / 255 / 20000**0.5, rel=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8, 12, 40])
@pytest.mark.parametrize("shape", [(12, 12), (5, 9)])
def test_bilinear_is_that_of_pytorch(shape, size):
    functional = pytest.importorskip("torch.nn.functional")
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(1).standard_normal((2, *shape, 3))
    wanted = functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), (size, size), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(bilinear(images, size), wanted.numpy().transpose(0, 2, 3, 1), atol=1e-12)
    assert bilinear(images.astype(np.float32), size).dtype == np.float32


def test_bilinear_of_a_ramp():
    """Twice as large: new pixels lie a quarter of an old one beside its middle; at the edge there is nobody else."""
    ramp = np.arange(4.0).reshape(1, 1, 4, 1).repeat(4, axis=1)
    wanted = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    np.testing.assert_allclose(bilinear(ramp, 8)[0, :, :, 0], np.tile(wanted, (8, 1)), atol=1e-15)
    np.testing.assert_allclose(bilinear(ramp, 4), ramp)


@pytest.mark.parametrize(("count", "factor"), [(2, 2), (2, 4), (2003, 2)])
def test_shrink_is_the_area_mean_rounded_half_up(count, factor):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 4, 3), dtype=np.uint8)
    small = shrink(images, factor)
    assert small.dtype == np.uint8
    assert small.shape == (count, 8 // factor, 4 // factor, 3)
    for n in (0, count - 1):
        for y in range(8 // factor):
            for x in range(4 // factor):
                for c in range(3):
                    cells = [
                        int(images[n, y * factor + i, x * factor + j, c]) for i in range(factor) for j in range(factor)
                    ]
                    assert small[n, y, x, c] == int(np.floor(sum(cells) / factor**2 + 0.5))


def test_image_size(cifar10):
    folder, arrays = cifar10
    dataset = load_dataset("cifar10", folder, image_size=8)
    assert dataset.image_shape == (8, 8, 3)
    assert dataset.pad == 1
    corner = arrays[0][0][0, :4, :4, 0].astype(int).sum()
    assert dataset.train.images[0, 0, 0, 0] == (corner + 8) // 16
    assert dataset.mean == pytest.approx(dataset.train.images.mean(axis=(0, 1, 2)) / 255)
    assert load_dataset("cifar10", folder, image_size=16).pad == 2
    assert load_dataset("cifar10", folder, image_size=32).pad == 4


def test_enlarged_images_repeat_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    large = resize(images, 12)
    for y in range(12):
        for x in range(12):
            np.testing.assert_array_equal(large[:, y, x], images[:, y // 3, x // 3])


@pytest.mark.parametrize("size", [0, 5, 24, 160, -16])
def test_impossible_image_size(cifar10, size):
    message = f"image-size is {size}: cifar10 is 32 x 32 and can become 2, 4, 8, 16, 32, 64, 96, 128"
    with pytest.raises(ConfigurationError, match=message):
        load_dataset("cifar10", cifar10[0], image_size=size)


def test_missing_without_download(tmp_path):
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", tmp_path, download=False)
    assert_one_line(error, tmp_path, "cifar-10-binary.tar.gz", "cifar-10-batches-py", "--data-dir", "CUPYEP_DATA")


def test_missing_without_pooch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError) as error:
        load_dataset("mnist", tmp_path)
    assert_one_line(error, 'pip install "cupyep[download]"', "idx files", tmp_path, "--data-dir")


def stub_pooch(monkeypatch, retrieve):
    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConnectionError("no route\nto host"), "failed: the host cannot be reached"),
        (PermissionError("read only"), "failed: PermissionError"),
        (ValueError("MD5 hash of downloaded file does not match"), "MD5 sum is not the published c32a1d4ab5d0"),
    ],
)
def test_failed_download_is_one_line(monkeypatch, tmp_path, failure, reason):
    def retrieve(*_, **__):
        raise failure

    stub_pooch(monkeypatch, retrieve)
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", tmp_path)
    assert_one_line(error, reason, "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", tmp_path, "--data-dir")


@pytest.mark.parametrize("failure", [ConnectionError("no route"), ValueError("MD5 hash does not match")])
def test_a_failed_download_leaves_no_folder(monkeypatch, tmp_path, failure):
    """Its own empty ones are removed; what was there, or is not empty, stays."""

    def retrieve(*_, path, **__):
        path.mkdir(parents=True)
        raise failure

    stub_pooch(monkeypatch, retrieve)
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "new" / "deeper"):
        with pytest.raises(DataError):
            load_dataset("mnist", folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_download_of_a_cifar_archive(monkeypatch, tmp_path):
    shrink_source(monkeypatch, "cifar10")
    arrays, calls = random_arrays((32, 32, 3), 10), []

    def retrieve(url, known_hash, fname, path, progressbar):
        calls.append((url, known_hash))
        write_archive(Path(path) / fname, "cifar-10-batches-bin", cifar_binary_files("cifar10", arrays))

    stub_pooch(monkeypatch, retrieve)
    for _ in range(2):  # the second time from the archive that is there now
        np.testing.assert_array_equal(load_dataset("cifar10", tmp_path).train.images, arrays[0][0])
    assert calls == [
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530")
    ]


def test_download_that_leaves_nothing(monkeypatch, tmp_path):
    stub_pooch(monkeypatch, lambda *_, **__: None)
    with pytest.raises(DataError, match="data set cifar10 not found"):
        load_dataset("cifar10", tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve the four IDX files of a small Fashion-MNIST, named in the table, from this machine."""
    small = shrink_source(monkeypatch, "fashion-mnist")
    arrays = random_arrays((28, 28, 1), 10)
    files = idx_files(arrays)
    write_files(tmp_path / "served", files)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        remotes = tuple(
            sources.Remote(base + name, hashlib.md5(raw).hexdigest(), f"fashion-mnist/{name}")
            for name, raw in files.items()
        )
        monkeypatch.setitem(sources.SOURCES, "fashion-mnist", dataclasses.replace(small, remotes=remotes))
        yield tmp_path, arrays
        server.shutdown()


def test_download_with_pooch_itself(server):
    pytest.importorskip("pooch")
    folder, arrays = server[0] / "new" / "data", server[1]
    dataset = load_dataset("fashion-mnist", folder)
    np.testing.assert_array_equal(dataset.train.images, arrays[0][0])
    assert len(list((folder / "fashion-mnist").iterdir())) == 4


def test_interrupted_download_goes_on(server):
    pytest.importorskip("pooch")
    folder, served = server[0] / "data", server[0] / "served"
    last = served / "t10k-labels-idx1-ubyte.gz"
    last.rename(server[0] / "away")
    with pytest.raises(DataError, match="404") as error:
        load_dataset("fashion-mnist", folder)
    assert_one_line(error, last.name, folder)
    assert len(list((folder / "fashion-mnist").iterdir())) == 3
    (server[0] / "away").rename(last)
    assert len(load_dataset("fashion-mnist", folder).train) == 50


def test_wrong_checksum_with_pooch_itself(server):
    pytest.importorskip("pooch")
    victim = server[0] / "served" / "train-images-idx3-ubyte.gz"
    victim.write_bytes(victim.read_bytes() + b"x")
    with pytest.raises(DataError, match="discarded: its MD5 sum") as error:
        load_dataset("fashion-mnist", server[0] / "data")
    assert_one_line(error, victim.name)
    assert not (server[0] / "data").exists()
