"""From the name of a data set to its images: its original files are found, or fetched, checked and read."""

from __future__ import annotations

from pathlib import Path

from cupyep import errors
from cupyep.data.dataset import Dataset, Split, assembled
from cupyep.data.directories import data_directory
from cupyep.data.download import fetch
from cupyep.data.files import Layout
from cupyep.data.formats import layouts_found
from cupyep.data.images import resize
from cupyep.data.own import load_own
from cupyep.data.selection import check_limits, held_out
from cupyep.data.sources import DATASETS, SOURCES, Source, check_dataset, is_own
from cupyep.data.verify import check_original
from cupyep.errors import DataError, choose, few, flag, instance, is_integer, number, require, shown

SHOWN = 8  # names in a message


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = True,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: int | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> Dataset:
    """Load a data set from its original files, looking below `data_dir` and downloading what is not there.

    A user's own are loaded by ``file:PATH`` and ``folder:PATH``; see `cupyep.data.own` and `cupyep.data.folder`.

    Parameters
    ----------
    name : str
        One of `DATASETS`, or a user's own.
    data_dir : path, optional
        See `data_directory`. Accepted: the extracted folders, the original archives, or such a folder itself.
    download : bool, default True
        Whether to fetch the original archives (with checksum) when none is there.
    image_size : int, optional
        Height and width of the images: theirs divided by an integer, by averaging areas, rounded half up; or theirs
        times 2, 3 or 4, by repeating pixels. Of a folder of pictures any size, 32 by default.
    limit_train, limit_test : int, optional
        Keep so many samples only, the first ones of each class, equally many of each. `mean` and `std` stay those of
        the whole training part, so that a network can be evaluated with other limits than it was trained with.
    validation : int, optional
        Hold so many training samples out, equally many of each class (of a user's own data in the proportions that they
        have), before `limit_train` is applied.
    seed : int
        Which samples are held out.
    test_fraction : float
        Share of a user's own images that are for testing, drawn by `seed`, where none are set apart.

    Raises
    ------
    ConfigurationError
        If the name, the image size or a limit is not possible.
    DataError
        If files are missing and cannot be downloaded, or are not what they should be.
    """
    check_dataset(instance("data set", name, str, "a text"), "data set")
    flag("download", download)
    errors.seed("seed", seed)
    if data_dir is not None:
        errors.path("data_dir", data_dir)
    number("test_fraction", test_fraction, above=0, below=1)
    if is_own(name):
        limits = {"limit_train": limit_train, "limit_test": limit_test}
        return load_own(name, image_size, validation, seed=seed, test_fraction=test_fraction, **limits)
    source = SOURCES[name]
    check_limits(name, source.train_count, source.test_count, limit_train, limit_test, validation)
    size = _checked_size(source, image_size)
    layout = _find(source, data_directory(data_dir), download)
    arrays = layout.read()
    check_original(source, arrays, layout.place)
    train, test = (Split(s, resize(x, size), y) for s, (x, y) in zip(("train", "test"), arrays, strict=True))
    held = held_out(train.labels, validation, seed) if validation else None
    pad = max(1, source.pad * size // source.shape[0])
    return assembled(name, source.classes, train, test, held, (limit_train, limit_test), source.flip, pad)


def image_shape(name: str, image_size: int | None = None) -> tuple[int, int, int]:
    """Return (H, W, C) of the images that `load_dataset` would give, without looking for files."""
    source = SOURCES[choose("data set", name, DATASETS)]
    size = _checked_size(source, image_size)
    return (size, size, source.shape[2])


def _checked_size(source: Source, image_size: int | None) -> int:
    size = source.shape[0]
    if image_size is None:
        return size
    sizes = [n for n in range(2, 4 * size + 1) if size % n == 0 or n % size == 0]
    require(
        is_integer(image_size) and image_size in sizes,
        f"image-size is {shown(image_size)}: {source.name} is {size} x {size} and can become "
        f"{', '.join(map(str, sizes))}",
    )
    return image_size


def _find(source: Source, folder: Path, download: bool) -> Layout:
    """Return the first complete layout below `folder`, downloading the original archives if there is none."""
    layouts, note = layouts_found(source.name, folder)
    if not layouts:
        reason = fetch(source, folder) if download else "download not asked for"
        layouts = [] if reason else layouts_found(source.name, folder)[0]
        if not layouts:
            raise DataError(
                f"data set {source.name} not found in {folder} ({note}{reason}; {_seen(folder)}): put there "
                f"{source.accepts}, or name the folder that has it by --data-dir or CUPYEP_DATA"
            )
    return layouts[0]


def _seen(folder: Path) -> str:
    """Return what lies in `folder`, in words."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"the folder cannot be read: {error.strerror}"
    return f"seen there: {few(names, SHOWN) or 'nothing'}"
