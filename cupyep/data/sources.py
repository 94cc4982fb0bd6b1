"""The one table of data sets: class names, sizes, where the original files are, and which augmentation is sound."""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cupyep.errors import choose, require
from cupyep.files import expanded


@dataclass(frozen=True)
class Remote:
    """One original file: its address, its published MD5 sum, and its place below the data folder."""

    url: str
    md5: str
    place: str


@dataclass(frozen=True)
class Source:
    """What is known of a data set before any file is opened."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # (H, W, C) of one image
    train_count: int  # number of images; files that hold another number are refused
    test_count: int
    flip: bool  # whether a horizontally mirrored image still belongs to its class
    pad: int  # pixels by which a random crop may shift an image of this size
    per_class: tuple[tuple[int, ...], tuple[int, ...]]  # number of training and of test images of each class
    homepage: str  # where the data set is described, and on what terms it may be used, in words
    licence: str
    accepts: str = ""  # the files and folders looked for, in words, for the message when none is there
    remotes: tuple[Remote, ...] = ()  # the original files; empty for bundled data
    # further published MD5 sums by file name: of other archives, and of extracted files
    sums: Mapping[str, str] = field(default_factory=dict)
    # of the training and of the test part as they are read, whatever files they come from; see
    # `cupyep.data.verify.fingerprint`. Empty where they are not known
    fingerprints: tuple[str, ...] = ()


IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

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
_DIGITS = tuple("0123456789")
_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/"
_NETZER = "http://ufldl.stanford.edu/housenumbers/"
_SVHN_SUMS = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


def _remotes(base: str, folder: str, sums: Mapping[str, str]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{base}{name}", md5, f"{folder}{name}") for name, md5 in sums.items())


def _named(names: Iterable[str], sums: str) -> dict[str, str]:
    return dict(zip(names, sums.split(), strict=True))


def _cifar(
    name: str, classes: str, folders: str, binary: str, python: str, files: str, sums: str, prints: str
) -> Source:
    """Return CIFAR-10 or CIFAR-100, of which MD5 sums of the two archives and of the pickled `files` are known."""
    stem, count = f"cifar-{name[5:]}", len(classes.split())
    return Source(
        name,
        tuple(classes.split()),
        (32, 32, 3),
        50000,
        10000,
        flip=True,
        pad=4,
        per_class=((50000 // count,) * count, (10000 // count,) * count),
        homepage=f"{_KRIZHEVSKY}cifar.html",
        licence="none stated; cite A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        accepts=f"{stem}-binary.tar.gz, {stem}-python.tar.gz, or a folder {folders}",
        remotes=_remotes(_KRIZHEVSKY, "", {f"{stem}-binary.tar.gz": binary}),
        sums={f"{stem}-python.tar.gz": python, **_named(files.split(), sums)},
        fingerprints=tuple(prints.split()),
    )


def _idx(name: str, known_as: str, base: str, zipped: str, plain: str, prints: str, **more: Any) -> Source:
    """Return MNIST or Fashion-MNIST, of whose four files MD5 sums are known, compressed (`zipped`) and `plain`."""
    return Source(
        name,
        shape=(28, 28, 1),
        train_count=60000,
        test_count=10000,
        pad=2,
        accepts=f"a folder {name} or {known_as}/raw with the four idx files ({IDX_FILES[0]}, ...)",
        remotes=_remotes(base, f"{name}/", _named((f"{file}.gz" for file in IDX_FILES), zipped)),
        sums=_named(IDX_FILES, plain) if plain else {},
        fingerprints=tuple(prints.split()),
        **more,
    )


_CIFAR100_COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""
_EMNIST_ZIP = Remote("https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e",
                     "emnist/gzip.zip")  # fmt: skip
_SVHN_EXTRA = (45550, 90560, 74740, 60765, 50633, 53490, 41582, 43997, 35358, 34456)


def _emnist(part: str, classes: str, train: int, test: int) -> Source:
    """Return a part of EMNIST with so many images of each class."""
    count, files = len(classes), tuple(emnist_file(part, file) for file in IDX_FILES)
    return Source(
        f"emnist-{part}",
        tuple(classes),
        (28, 28, 1),
        train * count,
        test * count,
        flip=False,
        pad=2,
        per_class=((train,) * count, (test,) * count),
        homepage="https://www.nist.gov/itl/products-and-services/emnist-dataset",
        licence="none stated; cite Cohen, Afshar, Tapson, van Schaik, arXiv 1702.05373",
        accepts=f"gzip.zip of EMNIST, or its files {files[0]}, ..., there or in a folder emnist or EMNIST/raw",
        remotes=(_EMNIST_ZIP,),
    )


def emnist_file(part: str, file: str) -> str:
    """Return what EMNIST calls the file of a part that MNIST calls `file`."""
    return f"emnist-{part}-{file.replace('t10k', 'test')}"


_TABLE = (
    _cifar(
        "cifar10",
        "airplane automobile bird cat deer dog frog horse ship truck",
        "cifar-10-batches-bin or cifar-10-batches-py",
        binary="c32a1d4ab5d03f1284b67883e8d87530",
        python="c58f30108f718f92721af3b95e74349a",
        files="data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch",
        sums="c99cafc152244af753f735de768cd75f d4bba439e000b95fd0a9bffe97cbabec 54ebc095f3ab1f0389bbae665268c751 "
        "634d18415352ddfa80567beed471001a 482c414d41f54cd18b22e5b47cb7c3cb 40351d587109b95175f43aff81a1287e",
        prints="a6638aac02242e3a36040757919ecbcc fb5628be1942cbbd8b77ff1348265d01",
    ),
    _cifar(
        "cifar100",
        _CIFAR100_CLASSES,
        "cifar-100-binary or cifar-100-python",
        binary="03b5dce01913d631647c71ecec9e9cb8",
        python="eb9058c3a382ffc7106e4002c42a8d85",
        files="train test",
        sums="16019d7e3df5f24257cddd939b257f8d f0ef6b0ae62326f3e7ffdfab6717acfc",
        prints="7296d15b838a90cd8c4fdcc9adb7f696 0ebfce3aca2fe8062080d54e08d7d0a0",
    ),
    _idx(
        "mnist",
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
        "6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624 "
        "2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637",
        prints="5222f2ba145e3639bbebe913af99da02 80ebbbc52a45750c7014f75d0b38ffcd",
        classes=_DIGITS,
        flip=False,
        per_class=(
            (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
        ),
        homepage="http://yann.lecun.com/exdb/mnist/",
        licence="CC BY-SA 3.0 by common account; cite LeCun, Bottou, Bengio, Haffner 1998",
    ),
    _idx(
        "fashion-mnist",
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
        "f4a8712d7a061bf5bd6d2ca38dc4d50a 9018921c3c673c538a1fc5bad174d6f9 "
        "8181f5470baa50b63fa0f6fddb340f0a 15d484375f8d13e6eb1aabb0c3f46965",
        prints="451978ad4f181c64fc4b89686e4c8fbd 89448dbd034f35973240c5c918749027",
        classes=tuple(_FASHION_CLASSES.split(", ")),
        flip=True,
        per_class=((6000,) * 10, (1000,) * 10),
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT; cite Xiao, Rasul, Vollgraf, arXiv 1708.07747",
    ),
    _idx(
        "kmnist",
        "KMNIST",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "bdb82020997e1d708af4cf47b453dcf7 e144d726b3acfaa3e44228e80efcd344 "
        "5c965bf0a639b31b8f53240b1b52f4d7 7320c461ea6c1c855c0b718fb2a4b134",
        "",
        prints="",
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        flip=False,
        per_class=((6000,) * 10, (1000,) * 10),
        homepage="https://codh.rois.ac.jp/kmnist/",
        licence="CC BY-SA 4.0; cite Clanuwat et al., arXiv 1812.01718",
    ),
    _emnist("letters", string.ascii_lowercase, 4800, 800),
    _emnist("balanced", string.digits + string.ascii_uppercase + "abdefghnqrt", 2400, 400),
    _emnist("digits", string.digits, 24000, 4000),
    Source(
        "svhn",
        _DIGITS,
        (32, 32, 3),
        73257,
        26032,
        flip=False,
        pad=4,
        per_class=(
            (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
            (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        ),
        homepage=_NETZER,
        licence="non-commercial use only; cite Netzer et al., Reading Digits in Natural Images, 2011",
        accepts="train_32x32.mat and test_32x32.mat, there or in a folder svhn",
        remotes=_remotes(_NETZER, "svhn/", _SVHN_SUMS),
        sums=_SVHN_SUMS,
    ),
    Source(
        "digits",
        _DIGITS,
        (8, 8, 1),
        1437,
        360,
        flip=False,
        pad=1,
        per_class=((143, 146, 142, 146, 144, 145, 144, 143, 141, 143), (35, 36, 35, 37, 37, 37, 37, 36, 33, 37)),
        homepage="https://archive.ics.uci.edu/dataset/80",
        licence="CC BY 4.0; comes with scikit-learn, extra demo; cite E. Alpaydin, C. Kaynak 1998",
    ),
)


def _variants() -> Iterable[Source]:
    """Return the table, with what is made of the files of another data set behind that one."""
    for source in _TABLE:
        yield source
        if source.name == "cifar100":
            yield replace(
                source,
                name="cifar100-coarse",
                classes=tuple(_CIFAR100_COARSE.split()),
                per_class=((2500,) * 20, (500,) * 20),
                fingerprints=("668bb0c817e698f8357f5ddf68508b89", "22e38980b33dab19493cf40b391847b3"),
            )
        if source.name == "svhn":
            sums = {**_SVHN_SUMS, "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7"}
            train = tuple(a + b for a, b in zip(source.per_class[0], _SVHN_EXTRA, strict=True))
            yield replace(
                source,
                name="svhn-extra",
                train_count=source.train_count + sum(_SVHN_EXTRA),
                per_class=(train, source.per_class[1]),
                accepts="train_32x32.mat, extra_32x32.mat and test_32x32.mat, there or in a folder svhn",
                remotes=_remotes(_NETZER, "svhn/", sums),
                sums=sums,
            )


SOURCES = {source.name: source for source in _variants()}
DATASETS = tuple(SOURCES)

OWN = ("file", "folder")  # what the name of a user's own data set begins with, before a colon and a path


def is_own(name: str) -> bool:
    """Return whether a data set is a user's own: ``file:PATH`` or ``folder:PATH``."""
    return name.partition(":")[0] in OWN and ":" in name


def check_dataset(name: str, what: str) -> None:
    """Raise `ConfigurationError` unless `name` is that of a data set, or of a user's own with a path."""
    if not is_own(name):
        choose(what, name, (*DATASETS, *(f"{kind}:PATH" for kind in OWN)))
    require(not is_own(name) or name.partition(":")[2].strip() != "", f"{what} {name} lacks a path behind the colon")


def absolute_name(name: str) -> str:
    """Return the name of a data set, of a user's own with the whole path: a run goes on from any working folder."""
    kind, _, path = name.partition(":")
    return f"{kind}:{os.path.abspath(expanded(path))}" if is_own(name) else name


def short_name(name: str) -> str:
    """Return the name of a data set without the folders on the way to it."""
    kind, _, path = name.partition(":")
    return f"{kind}:{os.path.basename(os.path.normpath(path))}" if is_own(name) else name
