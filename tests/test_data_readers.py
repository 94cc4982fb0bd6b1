"""The file formats: right files are read exactly, wrong ones are refused in one line."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
from data_files import (
    assert_one_line,
    assert_same,
    cifar_binary_files,
    cifar_python_files,
    idx_bytes,
    idx_files,
    random_arrays,
    shrink_source,
    svhn_files,
    trust,
    write_archive,
    write_files,
)

from cupyep.data import formats, load_dataset
from cupyep.data.formats import layouts_found
from cupyep.data.idx import read_idx
from cupyep.errors import DataError

CIFAR = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", 10),
    "cifar100": ("cifar-100-binary", "cifar-100-python", "cifar-100-binary.tar.gz", "cifar-100-python.tar.gz", 100),
}


def load(name, folder):
    return load_dataset(name, folder, download=False)


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request, monkeypatch):
    shrink_source(monkeypatch, request.param)
    return request.param


@pytest.fixture
def arrays(name):
    return random_arrays((32, 32, 3), CIFAR[name][4])


@pytest.mark.parametrize("itself", [False, True])
def test_cifar_binary_folder(name, arrays, tmp_path, itself):
    folder = tmp_path if itself else tmp_path / CIFAR[name][0]
    write_files(folder, cifar_binary_files(name, arrays))
    assert_same(load(name, tmp_path), arrays)


def test_cifar_pixel_order_by_hand(name, tmp_path):
    """One red pixel at row 2, column 5 is byte 2 * 32 + 5 of the first plane; a blue one lies in the third."""
    record = np.zeros(3072, np.uint8)
    record[2 * 32 + 5] = 200
    record[2 * 1024 + 31 * 32] = 100
    head = b"\x00\x03" if name == "cifar100" else b"\x03"
    files = cifar_binary_files(name, random_arrays((32, 32, 3), 10))
    first = "train.bin" if name == "cifar100" else "data_batch_1.bin"
    files[first] = head + record.tobytes() + files[first][len(head) + 3072 :]
    write_files(tmp_path, files)
    split = load(name, tmp_path).train
    expected = np.zeros((32, 32, 3))
    expected[2, 5, 0], expected[31, 0, 2] = 200, 100
    np.testing.assert_array_equal(split.images[0], expected)
    assert split.labels[0] == 3


def written(monkeypatch, name, arrays, form):
    """Return {file name: bytes} of one of the two versions, which count as original ones."""
    return trust(monkeypatch, name, (cifar_binary_files, cifar_python_files)[form](name, arrays))


@pytest.mark.parametrize("itself", [False, True])
def test_cifar_python_folder(name, arrays, tmp_path, monkeypatch, itself):
    folder = tmp_path if itself else tmp_path / CIFAR[name][1]
    write_files(folder, written(monkeypatch, name, arrays, 1))
    assert_same(load(name, tmp_path), arrays)


def test_cifar_archives(name, arrays, tmp_path, monkeypatch):
    binary, python, binary_archive, python_archive, _ = CIFAR[name]
    write_archive(tmp_path / binary_archive, binary, cifar_binary_files(name, arrays))
    assert_same(load(name, tmp_path), arrays)
    (tmp_path / binary_archive).unlink()
    write_archive(tmp_path / python_archive, python, written(monkeypatch, name, arrays, 1))
    before = sorted(tmp_path.iterdir())
    assert_same(load(name, tmp_path), arrays)
    assert sorted(tmp_path.iterdir()) == before  # nothing was extracted


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_cifar_files(name, arrays, tmp_path, monkeypatch, form, part):
    files = written(monkeypatch, name, arrays, form)
    victim = sorted(files)[-1]
    files[victim] = files[victim][: int(part * len(files[victim]))]
    write_files(tmp_path / CIFAR[name][form], files)
    with pytest.raises(DataError) as error:
        load(name, tmp_path)
    assert_one_line(error, victim)


@pytest.mark.parametrize("cut", [0, 10, 1000, 0.5, 0.9, -9, -1])
def test_truncated_cifar_archive(name, arrays, tmp_path, monkeypatch, cut):
    path = tmp_path / CIFAR[name][3]
    write_archive(path, CIFAR[name][1], written(monkeypatch, name, arrays, 1))
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(DataError) as error:
        load(name, tmp_path)
    assert_one_line(error, path)


def test_damaged_cifar_archive(name, arrays, tmp_path):
    path = tmp_path / CIFAR[name][2]
    write_archive(path, CIFAR[name][0], cifar_binary_files(name, arrays))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load(name, tmp_path)
    assert_one_line(error, path)


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_archive_with_a_link_or_device_is_refused(name, arrays, tmp_path, kind):
    folder, path = CIFAR[name][0], tmp_path / CIFAR[name][2]
    members = [(tarfile.TarInfo(f"{folder}/{file}"), raw) for file, raw in cifar_binary_files(name, arrays).items()]
    make_tar(path, members)
    assert_same(load(name, tmp_path), arrays)  # without the odd member it is a good archive
    odd = tarfile.TarInfo(f"{folder}/odd")
    odd.type, odd.linkname = kind, "/etc/passwd"
    make_tar(path, [*members, (odd, b"")])
    with pytest.raises(DataError, match="links, devices") as error:
        load(name, tmp_path)
    assert_one_line(error, path)


def test_archive_without_a_member(name, arrays, tmp_path):
    files = cifar_binary_files(name, arrays)
    gone = sorted(files)[0]
    del files[gone]
    write_archive(tmp_path / CIFAR[name][2], CIFAR[name][0], files)
    with pytest.raises(DataError, match=f"has no member {CIFAR[name][0]}/{gone}"):
        load(name, tmp_path)


def test_archive_that_is_too_large_is_refused(name, arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "SLACK", 1 << 20)
    bomb = tmp_path / CIFAR[name][2]
    bomb.write_bytes(gzip.compress(bytes(8 << 20), 1))
    with pytest.raises(DataError, match="more than the") as error:
        load(name, tmp_path)
    assert_one_line(error, bomb)


def test_archive_that_is_no_tar(name, tmp_path):
    path = tmp_path / CIFAR[name][2]
    path.write_bytes(gzip.compress(b"no tar at all" * 100))
    with pytest.raises(DataError, match="not a readable tar"):
        load(name, tmp_path)


@pytest.mark.parametrize("form", [0, 1])
def test_cifar_label_out_of_range(name, arrays, tmp_path, monkeypatch, form):
    (train, (images, labels)), classes = arrays, CIFAR[name][4]
    labels = labels.copy()
    labels[4] = classes
    files = written(monkeypatch, name, (train, (images, labels)), form)
    write_files(tmp_path / CIFAR[name][form], files)
    with pytest.raises(
        DataError, match=rf"1 of 10 labels lie outside 0..{classes - 1} \(first: {classes} at sample 4\)"
    ):
        load(name, tmp_path)


def test_cifar_folder_with_a_missing_batch(name, arrays, tmp_path):
    files = cifar_binary_files(name, arrays)
    gone = sorted(files)[-1]
    del files[gone]
    write_files(tmp_path / CIFAR[name][0], files)
    with pytest.raises(DataError) as error:
        load(name, tmp_path)
    assert_one_line(error, f"{gone} is missing", "--data-dir", "CUPYEP_DATA", CIFAR[name][3])


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("which", "folder"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_folders(monkeypatch, tmp_path, which, folder, compress):
    shrink_source(monkeypatch, which)
    arrays = random_arrays((28, 28, 1), 10)
    write_files(tmp_path / folder, idx_files(arrays, compress))
    assert_same(load(which, tmp_path), arrays)


NAMES = {
    "dots": "{0}-{1}.idx{2}-ubyte",
    "a folder each": "{0}-{1}-idx{2}-ubyte/{0}-{1}-idx{2}-ubyte",
    "a folder each, dots inside": "{0}-{1}-idx{2}-ubyte/{0}-{1}.idx{2}-ubyte",
    "capitals": "{0}-{1}-IDX{2}-UBYTE.GZ",
    "fetched twice": "{0}-{1}-idx{2}-ubyte.gz.1",
    "fetched twice by a browser": "{0}-{1}-idx{2}-ubyte (1).gz",
}


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("which", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("form", NAMES)
def test_idx_files_under_their_other_names(form, which, compress, monkeypatch, tmp_path):
    """What is compressed is seen by the content: some programs unpack a file and leave its name."""
    shrink_source(monkeypatch, which)
    arrays = random_arrays((28, 28, 1), 10)
    for name, content in idx_files(arrays, compress).items():
        prefix, kind, rank = re.fullmatch(r"(\w+)-(\w+)-idx(\d)-ubyte(?:\.gz)?", name).groups()
        path = tmp_path / which / NAMES[form].format(prefix, kind, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert_same(load(which, tmp_path), arrays)
    (layout,) = layouts_found(which, tmp_path)[0]
    assert layout.place == tmp_path / which


def test_svhn_in_capitals(monkeypatch, tmp_path):
    shrink_source(monkeypatch, "svhn")
    arrays = random_arrays((32, 32, 3), 10)
    write_files(tmp_path, trust(monkeypatch, "svhn", svhn_files(arrays)))
    (tmp_path / "train_32x32.mat").rename(tmp_path / "TRAIN_32x32.MAT")
    (tmp_path / "test_32x32.mat").rename(tmp_path / "test_32x32.mat.1")
    assert_same(load("svhn", tmp_path), arrays)


@pytest.mark.parametrize("form", [0, 1])
def test_cifar_in_the_folders_of_an_unpacker(name, arrays, tmp_path, monkeypatch, form):
    files = written(monkeypatch, name, arrays, form)
    folder, archive = CIFAR[name][form], CIFAR[name][2 + form]
    for k, outer in enumerate((folder, archive.removesuffix(".tar.gz"))):
        write_files(tmp_path / str(k) / outer / folder, files)
        assert_same(load(name, tmp_path / str(k)), arrays)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("end", [".tar", ".tgz", ".tar.gz.1", ".tar (1).gz", ".TAR.GZ", "unpacked"])
def test_cifar_archives_under_their_other_names(name, arrays, tmp_path, monkeypatch, form, end):
    """One that has been decompressed already, too, whatever it is called."""
    files = written(monkeypatch, name, arrays, form)
    archive = tmp_path / CIFAR[name][2 + form]
    write_archive(archive, CIFAR[name][form], files)
    shutil.rmtree(tmp_path / "staging")
    content = archive.read_bytes()
    archive.unlink()
    if end in (".tar", "unpacked"):
        content = gzip.decompress(content)
    stem = archive.name.removesuffix(".tar.gz")
    (tmp_path / f"{stem}{end if end != 'unpacked' else '.tar.gz'}").write_bytes(content)
    assert_same(load(name, tmp_path), arrays)


def test_what_was_seen_instead_is_named(tmp_path):
    for k in range(9):
        (tmp_path / f"file{k}").touch()
    with pytest.raises(DataError, match="seen there: file0, file1, .*, file7 and 1 more\\): put there a folder mnist"):
        load("mnist", tmp_path)
    with pytest.raises(DataError, match="the folder cannot be read: No such file or directory"):
        load("mnist", tmp_path / "none")


def test_idx_data_dir_named_after_fashion_mnist(monkeypatch, tmp_path):
    """The files of both sets have the same names: each is only found where it cannot be the other."""
    for which in ("mnist", "fashion-mnist"):
        shrink_source(monkeypatch, which)
    arrays = random_arrays((28, 28, 1), 10)
    for folder in ("fashion-mnist", "FashionMNIST/raw"):
        write_files(tmp_path / "a" / folder, idx_files(arrays))
        assert_same(load("fashion-mnist", tmp_path / "a" / folder), arrays)
        with pytest.raises(DataError, match="data set mnist not found"):
            load("mnist", tmp_path / "a" / folder)
    write_files(tmp_path / "plain", idx_files(arrays))
    with pytest.raises(DataError, match="data set fashion-mnist not found"):
        load("fashion-mnist", tmp_path / "plain")


def test_idx_by_hand(tmp_path):
    path = tmp_path / "two"
    path.write_bytes(b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + b"abcdef")
    assert read_idx(path, (2, 3)).tolist() == [[97, 98, 99], [100, 101, 102]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends within its header"),
        (b"\0\0\x08\x02\0\0\0\x02", "ends within its header"),
        (b"\0\0\x0d\x02\0\0\0\x02\0\0\0\x03abcdef", "not an IDX file of uint8 with 2 dimensions"),
        (b"\0\0\x08\x03\0\0\0\x02\0\0\0\x03abcdef", "not an IDX file of uint8 with 2 dimensions"),
        (b"\0\0\x08\x02\0\0\0\x03\0\0\0\x02abcdef", "shape \\(3, 2\\), expected \\(2, 3\\)"),
        (b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03abcde", "holds 17 bytes, expected 18"),
        (b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03abcdefg", "more than the 18 bytes"),
    ],
)
@pytest.mark.parametrize("compress", [True, False])
def test_wrong_idx_files(tmp_path, raw, message, compress):
    path = tmp_path / ("file.gz" if compress else "file")
    path.write_bytes(gzip.compress(raw) if compress else raw)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, (2, 3))
    assert_one_line(error, path)


@pytest.mark.parametrize("cut", [0, 5, 100, 0.5, -8, -1])
def test_truncated_gz(tmp_path, cut):
    raw = gzip.compress(idx_bytes(np.arange(200).reshape(10, 20) % 251 * 7 % 256))
    path = tmp_path / "file.gz"
    path.write_bytes(raw[: int(cut * len(raw)) if isinstance(cut, float) else cut])
    with pytest.raises(DataError) as error:
        read_idx(path, (10, 20))
    assert_one_line(error, path)


def test_idx_label_out_of_range(monkeypatch, tmp_path):
    shrink_source(monkeypatch, "mnist")
    (images, labels), test = random_arrays((28, 28, 1), 10)
    labels[7] = 11
    write_files(tmp_path, idx_files(((images, labels), test)))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz: 1 of 50 labels lie outside 0..9"):
        load("mnist", tmp_path)


def test_digits():
    bundle = pytest.importorskip("sklearn.datasets").load_digits()
    dataset = load_dataset("digits")
    assert len(dataset.train) == 1437
    assert len(dataset.test) == 360
    assert dataset.image_shape == (8, 8, 1)
    assert (dataset.flip, dataset.pad) == (False, 1)
    first = [[int(np.floor(value * 255 / 16 + 0.5)) for value in row] for row in bundle.images[0]]
    assert dataset.train.images[0, ..., 0].tolist() == first
    assert dataset.test.labels.tolist() == bundle.target[1437:].tolist()
    assert dataset.test.images.max() == 255


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match='pip install "cupyep\\[demo\\]"') as error:
        load_dataset("digits")
    assert_one_line(error)
