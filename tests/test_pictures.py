"""Pictures read by Pillow become images of a data set. Oracle: pixels computed by hand; files damaged by hand."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
from data_files import assert_one_line

from cupyep.data import sources
from cupyep.data.pictures import find_pictures, read_picture
from cupyep.errors import ConfigurationError, DataError

Image = pytest.importorskip("PIL.Image")
COLOUR, GREY = sources.SOURCES["cifar10"].shape, sources.SOURCES["mnist"].shape
EIGHT, EIGHT_GREY = (8, 8, 3), (8, 8, 1)


def pixels(shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "gif"])
def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path, suffix):
    array = pixels() if suffix != "gif" else np.repeat(pixels((8, 8, 1)), 3, axis=2)
    path = save(tmp_path / f"p.{suffix}", array)
    np.testing.assert_array_equal(read_picture(path, EIGHT, 8), array)


def test_large_pictures_are_averaged_and_cut_to_the_middle_square(tmp_path):
    small = pixels((8, 8, 3))
    large = np.zeros((24, 40, 3), np.uint8)
    large[:, 8:32] = small.repeat(3, axis=0).repeat(3, axis=1)
    path = save(tmp_path / "p.png", large)
    np.testing.assert_array_equal(read_picture(path, EIGHT, 8), small)


def test_small_pictures_are_enlarged_by_repeating_pixels(tmp_path):
    small = pixels((4, 4, 3))
    path = save(tmp_path / "p.png", small)
    np.testing.assert_array_equal(read_picture(path, EIGHT, 8), small.repeat(2, axis=0).repeat(2, axis=1))


def test_the_size_of_the_run_is_reached_as_by_the_data_set(tmp_path):
    """First the data set's own size, then averaged or enlarged as `load_dataset` does."""
    array = pixels((8, 8, 3))
    path = save(tmp_path / "p.png", array)
    means = array.reshape(4, 2, 4, 2, 3).astype(int).sum(axis=(1, 3))
    np.testing.assert_array_equal(read_picture(path, EIGHT, 4), (means + 2) // 4)
    np.testing.assert_array_equal(read_picture(path, EIGHT, 16), array.repeat(2, axis=0).repeat(2, axis=1))


def test_grey_for_a_colour_network_and_colours_for_a_grey_one(tmp_path):
    grey = pixels((8, 8))
    image = read_picture(save(tmp_path / "g.png", grey), EIGHT, 8)
    np.testing.assert_array_equal(image, grey[..., None].repeat(3, axis=2))
    colour = pixels((8, 8, 3))
    image = read_picture(save(tmp_path / "c.png", colour), EIGHT_GREY, 8)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(image[..., 0], luma, atol=1)
    assert image.shape == (8, 8, 1)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    path = tmp_path / "d.png"
    Image.fromarray(deep).save(path)
    np.testing.assert_array_equal(read_picture(path, EIGHT_GREY, 8)[..., 0], deep // 256)


def test_transparent_parts_are_white_and_palettes_become_colours(tmp_path):
    array = pixels((8, 8, 4))
    array[..., 3] = np.where(np.arange(8) < 4, 255, 0)
    image = read_picture(save(tmp_path / "t.png", array), EIGHT, 8)
    np.testing.assert_array_equal(image[:, :4], array[:, :4, :3])
    assert (image[:, 4:] == 255).all()
    flat = Image.new("P", (8, 8), 1)
    flat.putpalette([0, 0, 0, 10, 20, 30])
    flat.save(tmp_path / "p.png")
    assert (read_picture(tmp_path / "p.png", EIGHT, 8) == [10, 20, 30]).all()
    black_and_white = Image.new("1", (8, 8), 1)
    black_and_white.save(tmp_path / "b.png")
    assert (read_picture(tmp_path / "b.png", EIGHT, 8) == 255).all()


def test_pictures_are_turned_upright(tmp_path):
    array, exif = pixels((8, 8, 3)), Image.Exif()
    exif[0x0112] = 3  # upside down
    path = save(tmp_path / "p.png", array, exif=exif)
    np.testing.assert_array_equal(read_picture(path, EIGHT, 8), array[::-1, ::-1])


def png_header(width, height):
    """Return the beginning of a PNG file that promises a huge picture."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8000, 7000), (100_000, 100_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_before_they_are_unpacked(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(DataError, match="million") as error:
        read_picture(path, COLOUR, 32)
    assert_one_line(error, path, "make it smaller")


@pytest.mark.parametrize("left", [0, 1, 10, 0.3, 0.7, -1])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_truncated_pictures_are_one_line(tmp_path, suffix, left):
    path = save(tmp_path / f"p.{suffix}", pixels((64, 64, 3)))
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    if left == -1 and suffix in ("gif", "webp", "tiff", "png", "jpg"):  # the last byte may say nothing
        return
    with pytest.raises(DataError, match="is not a readable picture") as error:
        read_picture(path, COLOUR, 32)
    assert_one_line(error, path)


def test_files_that_are_no_pictures(tmp_path):
    floats = tmp_path / "f.tiff"
    Image.fromarray(np.zeros((8, 8), np.float32)).save(floats)
    with pytest.raises(DataError, match="pixels of 32 bits; save it with 8 or 16 bits"):
        read_picture(floats, COLOUR, 32)
    path = tmp_path / "p.png"
    for content in (b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"import os"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a readable picture") as error:
            read_picture(path, COLOUR, 32)
        assert_one_line(error, path)


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigurationError, match=r'pip install "cupyep\[images\]"'):
        read_picture(tmp_path / "p.png", COLOUR, 32)


def test_files_and_folders(tmp_path):
    for name in ("b.PNG", "a.jpeg", "notes.txt", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    odd = tmp_path / "notes.txt"
    assert find_pictures([odd, tmp_path]) == [odd, tmp_path / "a.jpeg", tmp_path / "b.PNG", odd]  # no picture: said
    with pytest.raises(DataError, match="there is no file or folder"):
        find_pictures([tmp_path / "gone.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in folder"):
        find_pictures([tmp_path / "empty"])


@pytest.mark.parametrize(("name", "dtype"), [("x.pgm", ">u2"), ("x.png", "<u2")])
def test_sixteen_bits_of_every_format_are_scaled(tmp_path, name, dtype):
    """The PGM is written by hand: a head, then big-endian pairs of bytes."""
    values = (np.arange(784).reshape(28, 28) * 83).astype(dtype)
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 28 28 65535\n" + values.tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(read_picture(tmp_path / name, GREY, 28)[..., 0], values // 256)
