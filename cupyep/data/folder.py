"""A folder of pictures, a sub-folder a class, as one file of arrays in the cache.

Either ``train``, ``test`` and, if there is one, ``val`` hold the folders of the classes, or the folder itself does. A
picture belongs to the class in whose folder, or below it, it lies; hidden files and what is no picture by its name are
passed over. Tiny-ImageNet is read as it comes: its annotated part for validation, the only other one with labels, is
for testing. How a picture becomes an image: `cupyep.data.pictures`. Where all of them are grey, so are the images.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cupyep.data.directories import cache_directory
from cupyep.data.pictures import SUFFIXES, is_grey, read_picture
from cupyep.errors import DataError, reporting
from cupyep.files import can_write, read_text, remove_leftovers, replacing

DEFAULT_SIZE = 32  # pixels a side, as most recipes have them
PARTS = {"": ("train", "training"), "_val": ("val", "valid", "validation"), "_test": ("test", "testing")}
ANNOTATIONS = Path("val", "val_annotations.txt")  # of Tiny-ImageNet: a file's name, a tab, its class, a box
TEXT_BYTES = 1 << 24
DAY_S = 86400.0
MADE_AS = 1  # of how images are made of pictures; another number makes all of them anew
LAYOUT = "a sub-folder a class, or train, val and test with such sub-folders"
Listing = dict[str, list[tuple[Path, str]]]
"""Pictures and their classes by the end of a part's name, as `PARTS` has it."""


def pictures_file(folder: Path, size: int) -> Path:
    """Return the .npz file of the pictures in `folder` as images of `size` x `size`; made if it is not in the cache.

    It is kept under a checksum of names, lengths and times of all pictures. `DataError` if there are no such pictures,
    one cannot be read, or the file cannot be kept.
    """
    listing = list_pictures(folder)
    files = [
        (part, label, str(path.relative_to(folder)), *_stamp(path)) for part in listing for path, label in listing[part]
    ]
    digest = hashlib.sha256(json.dumps([MADE_AS, size, files]).encode()).hexdigest()[:16]
    file = cache_directory() / "pictures" / f"{digest}.npz"
    if not file.is_file():
        if not can_write(file.parent):
            raise DataError(f"cannot keep the images of {folder} in {file.parent}: name another folder by CUPYEP_CACHE")
        with reporting(DataError, f"cannot keep the images of {folder} in {file.parent}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file.parent, DAY_S)
            _write(file, listing, size)
    return file


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def list_pictures(folder: Path) -> Listing:
    """Return the pictures in `folder` with their classes, in the order of their names; `DataError` if none lie so."""
    if not folder.exists():
        raise DataError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: for arrays in a file, use --dataset file:{folder}")
    with reporting(DataError, f"cannot read {folder}"):
        if (folder / ANNOTATIONS).is_file():
            found = {"": folder / "train", "_test": folder / ANNOTATIONS.parent}
            parts = _tiny_imagenet(folder)
        else:
            found = _parts(folder)
            parts = {part: list(_of_classes(place)) for part, place in found.items()}
    classes = {label for _, label in parts[""]}
    for part, place in found.items():
        strange = sorted({label for _, label in parts[part]} - classes)
        if strange:
            raise DataError(f"{place}: class '{strange[0]}' is not among those in {found['']}")
        if not parts[part]:
            raise DataError(f"{place}: no pictures in it; expected {LAYOUT} ({', '.join(SUFFIXES)})")
    if len(classes) < 2:
        raise DataError(f"{found['']}: only one class, '{next(iter(classes))}'; expected {LAYOUT}")
    return parts


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folders of the parts: those called so, if there are folders in the one for training; else `folder`."""
    names = {path.name.lower(): path for path in _folders(folder)}
    found = {part: names[name] for part, known in PARTS.items() for name in reversed(known) if name in names}
    if "" in found and _folders(found[""]):
        return found
    if "_test" in found and set(names) <= {name for known in PARTS.values() for name in known} and "" not in found:
        raise DataError(f"{folder}: has a part for testing, but no folder train beside it; expected {LAYOUT}")
    return {"": folder}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _of_classes(folder: Path) -> Iterator[tuple[Path, str]]:
    loose = next((path for path in sorted(folder.iterdir()) if _is_picture(path)), None)
    if loose is not None:
        raise DataError(f"{loose} lies in the folder of no class; expected {LAYOUT}")
    for place in _folders(folder):
        inside = [
            Path(top) / name for top, _, names in os.walk(place) for name in names if _is_picture(Path(top) / name)
        ]
        if not inside:
            raise DataError(f"{place}: no pictures of class '{place.name}' in it; remove it, or fill it")
        yield from ((path, place.name) for path in sorted(inside))


def _tiny_imagenet(folder: Path) -> Listing:
    """Return the pictures of Tiny-ImageNet, its classes by their first name in words.txt, where no other has it."""
    parts: Listing = {"": list(_of_classes(folder / "train")), "_test": []}
    for line in _lines(folder / ANNOTATIONS):
        name, _, rest = line.partition("\t")
        path = folder / ANNOTATIONS.parent / "images" / Path(name).name
        if not path.is_file():
            raise DataError(f"{path} is missing, of which {ANNOTATIONS} tells; get the data set again")
        parts["_test"].append((path, rest.split("\t")[0]))
    pairs = [line.split("\t", 1) for line in (_lines(folder / "words.txt") if (folder / "words.txt").is_file() else [])]
    known = {label for _, label in parts[""]}
    words = {pair[0]: pair[1].split(",")[0] for pair in pairs if len(pair) == 2 and pair[0] in known}
    unique = {label: word for label, word in words.items() if list(words.values()).count(word) == 1}
    return {part: [(path, unique.get(label, label)) for path, label in inside] for part, inside in parts.items()}


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path, TEXT_BYTES).splitlines()
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _write(file: Path, listing: Listing, size: int) -> None:
    """Write the images, one at a time, and their labels as .npz."""
    classes = sorted({label for _, label in listing[""]})
    grey = all(is_grey(path) for pictures in listing.values() for path, _ in pictures)
    shape = (size, size, 1 if grey else 3)
    with replacing(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for part, pictures in listing.items():
            with archive.open(f"x{part}.npy", "w", force_zip64=True) as out:
                head = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), *shape)}
                np.lib.format.write_array_header_1_0(out, head)
                for path, _ in pictures:
                    out.write(read_picture(path, shape).tobytes())
            with archive.open(f"y{part}.npy", "w") as out:
                np.lib.format.write_array(out, np.array([classes.index(label) for _, label in pictures]))
        with archive.open("classes.npy", "w") as out:
            np.lib.format.write_array(out, np.array(classes), allow_pickle=False)
