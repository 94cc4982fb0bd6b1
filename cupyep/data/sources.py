"""The one table of data sets: class names, sizes, where the original archives are, and which augmentation is sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]
"""Images (N, H, W, C) uint8 and labels (N,) int64."""


@dataclass(frozen=True)
class Remote:
    """One original file: its address, its published MD5 sum, and its place below the data folder."""

    url: str
    md5: str
    place: str


@dataclass(frozen=True)
class Source:
    """What is known of a data set before any file is opened.

    Attributes
    ----------
    shape : tuple of int
        (H, W, C) of one image.
    train_count, test_count : int
        Number of images; files that hold another number are refused.
    flip : bool
        Whether a horizontally mirrored image still belongs to its class.
    pad : int
        Pixels by which a random crop may shift an image of this size.
    accepts : str
        The files and folders looked for, in words, for the message when none is there.
    remotes : tuple of Remote
        The original files; empty for bundled data.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train_count: int
    test_count: int
    flip: bool
    pad: int
    accepts: str
    remotes: tuple[Remote, ...]


@dataclass(frozen=True)
class Layout:
    """One accepted arrangement of files: it is there when all of `files` are, and `read` returns (train, test)."""

    files: tuple[Path, ...]
    read: Callable[[], tuple[Arrays, Arrays]]


def _remotes(base: str, folder: str, sums: dict[str, str]) -> tuple[Remote, ...]:
    return tuple(Remote(base + name, md5, folder + name) for name, md5 in sums.items())


_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""
_FASHION_CLASSES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
_DIGIT_CLASSES = tuple("0123456789")
_CIFAR_PLACES = "{0}-binary.tar.gz, {0}-python.tar.gz, or a folder {1} or {2}"
_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/"

SOURCES = {
    source.name: source
    for source in (
        Source(
            name="cifar10",
            classes=tuple(_CIFAR10_CLASSES.split()),
            shape=(32, 32, 3),
            train_count=50000,
            test_count=10000,
            flip=True,
            pad=4,
            accepts=_CIFAR_PLACES.format("cifar-10", "cifar-10-batches-bin", "cifar-10-batches-py"),
            remotes=_remotes(_KRIZHEVSKY, "", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
        ),
        Source(
            name="cifar100",
            classes=tuple(_CIFAR100_CLASSES.split()),
            shape=(32, 32, 3),
            train_count=50000,
            test_count=10000,
            flip=True,
            pad=4,
            accepts=_CIFAR_PLACES.format("cifar-100", "cifar-100-binary", "cifar-100-python"),
            remotes=_remotes(_KRIZHEVSKY, "", {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}),
        ),
        Source(
            name="mnist",
            classes=_DIGIT_CLASSES,
            shape=(28, 28, 1),
            train_count=60000,
            test_count=10000,
            flip=False,
            pad=2,
            accepts="a folder mnist or MNIST/raw with the four idx files (.gz or not)",
            remotes=_remotes(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "mnist/",
                {
                    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
                },
            ),
        ),
        Source(
            name="fashion-mnist",
            classes=tuple(_FASHION_CLASSES.split(", ")),
            shape=(28, 28, 1),
            train_count=60000,
            test_count=10000,
            flip=True,
            pad=2,
            accepts="a folder fashion-mnist or FashionMNIST/raw with the four idx files (.gz or not)",
            remotes=_remotes(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "fashion-mnist/",
                {
                    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
                },
            ),
        ),
        Source(
            name="svhn",
            classes=_DIGIT_CLASSES,
            shape=(32, 32, 3),
            train_count=73257,
            test_count=26032,
            flip=False,
            pad=4,
            accepts="train_32x32.mat and test_32x32.mat, there or in a folder svhn",
            remotes=_remotes(
                "http://ufldl.stanford.edu/housenumbers/",
                "svhn/",
                {
                    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
                    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
                },
            ),
        ),
        Source(
            name="digits",
            classes=_DIGIT_CLASSES,
            shape=(8, 8, 1),
            train_count=1437,
            test_count=360,
            flip=False,
            pad=1,
            accepts="",
            remotes=(),
        ),
    )
}

DATASETS = tuple(SOURCES)
