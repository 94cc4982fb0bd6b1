"""Crops of batches: arrays and crop.cu through the shim, against a loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cpu import compiler, twins
from quadrants import quadrant_data

import cupyep as ep
from cupyep.ops.crop import SOURCE, CropOps, CudaCropOps

ops = twins(SOURCE, CropOps, CudaCropOps)


def cropped(image, draw, pad, side):
    """Return the crop of one image of float64, pixel by pixel."""
    (height, width, channels), (dy, dx, flip, top, left) = image.shape, draw
    wide = np.zeros((height + 2 * pad, width + 2 * pad, channels))
    wide[pad : pad + height, pad : pad + width] = image
    out = np.zeros(image.shape)
    for y in range(height):
        for x in range(width):
            hidden = top <= y < top + side and left <= x < left + side
            out[y, x] = 0 if hidden else wide[y + dy, (width - 1 - x if flip else x) + dx]
    return out


@pytest.mark.parametrize("number", ["float32", "float64"])
@pytest.mark.parametrize("stored", ["uint8", "float32", "float64"])  # the last one has no kernel
@pytest.mark.parametrize(("shape", "pad", "side"), [((7, 5, 3), 2, 0), ((4, 70, 5), 3, 2), ((1, 1, 1), 0, 1)])
@pytest.mark.parametrize("own", [False, True])
def test_crops(ops, rng, shape, pad, side, own, stored, number):
    """Every place of the crop, both ways, squares that reach over the border and one that lies outside."""
    samples, count = 9, 9 if own else 20
    images = rng.integers(0, 256, (count, *shape)) if stored == "uint8" else rng.standard_normal((count, *shape))
    images = images.astype(stored)
    draws = np.empty((samples, 6), np.int64)
    draws[:, 0] = 1 << 40 if own else rng.integers(0, count, samples)  # whatever is drawn
    draws[:, 1:3] = rng.integers(0, 2 * pad, (samples, 2), endpoint=True)
    draws[:, 3] = np.arange(samples) % 2
    draws[:, 4:] = rng.integers(-1, max(shape[:2]), (samples, 2))
    draws[0, 4:] = -side
    scale, shift = (rng.standard_normal(shape[2]).astype(number) for _ in range(2))
    found = ops.crop(images, draws, scale, shift, pad, side, own)
    assert found.dtype == number
    rows = range(samples) if own else draws[:, 0]
    exact = [images[row].astype(float) * scale + shift for row in rows]
    expected = [cropped(image, draw[1:], pad, side) for image, draw in zip(exact, draws, strict=True)]
    rtol = 1e-14 if number == "float64" else 1e-6
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=200 * rtol)


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
def test_a_batch_is_one_launch(fake_gpu):
    """And what a loader on the host gives, for an epoch with crops, mirrors and squares."""
    data, batches = quadrant_data(), {}
    for device in (fake_gpu, ep.get_device("cpu")):
        how = {"augment": True, "shuffle": True, "generator": np.random.default_rng(1), "cutout": 3, "pad": 2}
        loader = ep.Loader(data, "train", 32, device, "float32", **how)
        batches[device.name] = [np.array(device.to_numpy(batch.images)) for batch in loader]
        if device.is_gpu:
            (launched,) = set(fake_gpu.launcher(SOURCE).launched)
            assert launched == "crop<unsigned char, float>"
            assert len(fake_gpu.launcher(SOURCE).launched) == len(loader)
    for found, expected in zip(batches["cuda:0"], batches["cpu"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
@pytest.mark.parametrize("large", [False, True], ids=["kept on the device", "sent batch by batch"])
@pytest.mark.parametrize("layout", ["Fortran's", "channels first"])
def test_images_of_any_layout_are_cropped(fake_gpu, rng, monkeypatch, layout, large):
    """CuPy keeps the order of a Fortran-contiguous array, which a kernel cannot read."""
    images = rng.integers(0, 256, (10, 3, 6, 5)).astype(np.uint8).transpose(0, 2, 3, 1)
    images = np.asfortranarray(images) if layout == "Fortran's" else images
    split = ep.data.Split("train", images, np.arange(10) % 2)
    data = ep.data.Dataset.from_splits("noise", ("a", "b"), split, split, flip=True, pad=2)
    if large:
        monkeypatch.setattr(ep.Loader, "_has_room", lambda loader: False)
    found, expected = (
        ep.Loader(data, "train", 4, device, "float32", True, True, np.random.default_rng(1))
        for device in (fake_gpu, ep.get_device("cpu"))
    )
    for own, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(fake_gpu.to_numpy(own.images), theirs.images, rtol=1e-6, atol=1e-6)


def test_images_are_sent_to_a_gpu_piece_by_piece(fake_gpu, rng, monkeypatch):
    """CuPy page-locks as much memory as it sends at once, and keeps it."""
    images, sent = rng.integers(0, 256, (10, 4, 4, 3)).astype(np.uint8), []
    split = ep.data.Split("train", images, np.arange(10) % 2)
    data, inner = ep.data.Dataset.from_splits("noise", ("a", "b"), split, split, flip=True, pad=0), fake_gpu.asarray
    monkeypatch.setattr(fake_gpu, "asarray", lambda array, *how: sent.append(np.shape(array)) or inner(array, *how))
    for at_once, lengths in ((3 * 48 + 47, [3, 3, 3, 1]), (1, [1] * 10), (10**9, [10])):
        monkeypatch.setattr("cupyep.data.loader.SENT_AT_ONCE", at_once)
        sent.clear()
        loader = ep.Loader(data, "train", 4, fake_gpu, "float32")
        assert [shape[0] for shape in sent if len(shape) == 4] == lengths
        np.testing.assert_array_equal(fake_gpu.to_numpy(loader._images), images)
