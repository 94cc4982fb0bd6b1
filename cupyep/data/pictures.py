"""Picture files of any size as images of a data set: colours, form, size. Needs Pillow (extra ``images``).

A picture is made as the data set's own images are: turned upright as its EXIF data say, transparent parts white, 16
bits to 8, to grey or colours as the data set is, cut to the largest part in the middle that has the data set's form (a
square), brought to the data set's size by averaging areas (enlarged by repeating pixels), and from there, as all its
images, to the size that the run asked for.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.data.files import ARRAY_ERRORS
from cupyep.data.images import resize
from cupyep.errors import DataError, needing, one_line

#: Formats that Pillow reads by itself; others, such as EPS, would start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 50_000_000
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
GREY = ("1", "L", "LA", "I", "F", *GREY_16)
COLOURS = {1: "L", 3: "RGB"}


def find_pictures(paths: list[Path]) -> list[Path]:
    """Return the files among `paths`, and for every folder the files in it (not below it) by name; no hidden ones.

    What is no picture is among them, so that whoever reads them says so. `DataError` if there is no such path, or no
    picture in a folder.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            if not any(file.suffix.lower() in (*SUFFIXES, ".npy") for file in inside):
                raise DataError(f"no pictures in folder {path} (looked for {', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no file or folder {path}")
    return found


def read_picture(path: Path, shape: tuple[int, int, int], size: int | None = None) -> np.ndarray:
    """Return the picture at `path` as an image of a data set whose images have a `shape` (H, W, C), C 1 or 3: uint8.

    With a `size` as one of (size, size, C), which `cupyep.data.images.resize` must be able to make of square images of
    `shape`. `ConfigurationError` if Pillow is not installed; `DataError` if the file is no picture, is damaged, too
    large, or has pixels of more than 16 bits, or if no picture has so many channels.
    """
    height, width, channels = shape
    if channels not in COLOURS:
        raise DataError(f"{path}: a picture has 1 or 3 channels, the data set's images have {channels}")
    with opened(path) as (picture, Image, ImageOps):  # noqa: N806
        kind = picture.format  # which a transposed copy forgets
        picture = ImageOps.exif_transpose(picture)
        picture = _coloured(path, picture, kind, channels, Image)
        part = ImageOps.fit(picture, (width, height), Image.Resampling.BOX)
        pixels = np.asarray(part, np.uint8).reshape(1, height, width, channels)
    return pixels[0] if size is None else resize(pixels, size)[0]


def is_grey(path: Path) -> bool:
    """Return whether the picture at `path` is stored without colours; raises as `read_picture` does."""
    with opened(path) as (picture, *_):
        return picture.mode in GREY


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yield a picture, not yet decoded, and Pillow's modules; whatever goes wrong with it is a `DataError`."""
    with needing('pictures need Pillow: pip install "cupyep[images]"'):
        from PIL import Image, ImageOps
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    most = f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS // 10**6} million"
                    raise DataError(f"{path}: has {most}; make it smaller")
                yield picture, Image, ImageOps
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: has more than {MAX_PIXELS // 10**6} million pixels; make it smaller") from error
    except Exception as error:  # a damaged picture can raise nearly any type; each becomes one line
        raise DataError(f"{path}: is not a readable picture ({one_line(error)})") from error


def read_array(path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """Return the one image of `shape` in a .npy file, for data sets that no picture can show.

    `DataError` if the file is damaged, holds objects, or another shape or type.
    """
    try:
        image = np.load(path, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise DataError(f"{path}: is not a readable .npy file ({one_line(error)})") from error
    image = image[..., None] if image.ndim == 2 else image
    of_kind = image.dtype == dtype if dtype == np.uint8 else image.dtype.kind in "uif"
    if image.shape != shape or not of_kind or not np.isfinite(image).all():
        raise DataError(f"{path}: should be one image, {dtype} {shape} and finite, but is {image.dtype} {image.shape}")
    return image.astype(dtype, copy=False)


def _coloured(path: Path, picture: Any, kind: str, channels: int, image: Any) -> Any:
    """Return `picture` in grey (1 channel) or red, green, blue (3), 8 bits each."""
    # Mode I is Pillow's for the 16 bits of PPM and PNG, which cannot hold more; it would clip such values, not scale.
    if picture.mode in GREY_16 or (picture.mode == "I" and kind in ("PPM", "PNG")):
        picture = image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise DataError(f"{path}: has pixels of 32 bits; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(COLOURS[channels])
