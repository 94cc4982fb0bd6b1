"""What a network has to know of its images: the classes, the size, and how pixels were normalised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.data.dataset import Dataset, Split
from cupyep.data.images import add_to_digest

SUMS = ("fingerprint", "samples", "judged")
LOOKED_AT = 100  # images in a checksum


@dataclass(frozen=True, eq=False)
class ImageFormat:
    """The form of a data set, without its images."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (H, W, C)
    mean: np.ndarray  # (C,)
    std: np.ndarray
    unit: float = 255.0
    fingerprint: str = ""  # see `Dataset`
    samples: str = ""  # checksum of which images are for training: their numbers and labels, and a few of them
    judged: str = ""  # the same of those for validation and test

    @classmethod
    def of(cls, dataset: Dataset) -> ImageFormat:
        """Return the format of the images of `dataset`."""
        names = ("name", "classes", "image_shape", "mean", "std", "unit", "fingerprint")
        samples, judged = _checksum(dataset.train), _checksum(dataset.validation, dataset.test)
        return cls(**{name: getattr(dataset, name) for name in names}, samples=samples, judged=judged)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes; numbers come back bit for bit."""
        lists = {"classes": list(self.classes), "image_shape": list(self.image_shape)}
        numbers = {"mean": self.mean.tolist(), "std": self.std.tolist(), "unit": self.unit}
        return {"name": self.name, **lists, **numbers, **{key: getattr(self, key) for key in SUMS}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageFormat:
        """Return the format that `to_json` described; `ValueError`, `TypeError` or `KeyError` for anything else."""
        name, classes, shape = values["name"], tuple(values["classes"]), tuple(values["image_shape"])
        mean, std = (np.array(values[key], np.float32) for key in ("mean", "std"))
        unit, sums = values.get("unit", 255.0), [values.get(key, "") for key in SUMS]  # not there in older files
        texts = all(isinstance(text, str) for text in (name, *classes, *sums))
        numbers = len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        if not texts or len(classes) < 2 or not numbers or mean.shape != shape[2:] or std.shape != shape[2:]:
            raise ValueError(f"'{name}' is not a description of images")
        if unit not in (1, 255) or not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"'{name}': mean and std of the images are not numbers that one can divide by")
        return cls(name, classes, shape, mean, std, float(unit), *sums)


def _checksum(*splits: Split | None) -> str:
    digest = hashlib.sha256()
    for split in filter(None, splits):
        some = np.unique(np.linspace(0, len(split) - 1, LOOKED_AT, dtype=int))
        add_to_digest(digest, split.index, split.labels, split.images[some])
    return digest.hexdigest()[:12]
