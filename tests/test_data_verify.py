"""`cupyep data`: what is listed, found wrong, fetched. Oracle: files damaged by hand in known places."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import sys
import types

import numpy as np
import pytest
from data_files import (
    assert_same,
    cifar_binary_files,
    cifar_python_files,
    idx_files,
    random_arrays,
    random_split,
    shrink_source,
    trust,
    write_archive,
    write_files,
)

from cupyep.data import DATASETS, load_dataset, sources
from cupyep.data.verify import verify
from cupyep.errors import DataError


def believe(monkeypatch, name, arrays, **more):
    """Make the table of data sets say that `arrays` are the original ones."""
    small = shrink_source(monkeypatch, name)
    per_class = tuple(tuple(np.bincount(labels, minlength=len(small.classes)).tolist()) for _, labels in arrays)
    monkeypatch.setitem(sources.SOURCES, name, dataclasses.replace(small, per_class=per_class, **more))


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    """A folder with a small CIFAR-10 that counts as the original one."""
    arrays = random_arrays((32, 32, 3), 10)
    believe(monkeypatch, "cifar10", arrays)
    write_files(tmp_path / "cifar-10-batches-bin", cifar_binary_files("cifar10", arrays))
    return tmp_path, arrays


def test_table_of_class_counts():
    for source in sources.SOURCES.values():
        train, test = source.per_class
        assert len(train) == len(test) == len(source.classes)
        assert (sum(train), sum(test)) == (source.train_count, source.test_count)
        assert source.licence
        assert source.homepage.startswith("http")
        assert all(len(digest) == 32 for digest in source.sums.values())


def test_a_whole_folder(cifar10):
    (finding,) = verify("cifar10", cifar10[0])
    assert finding.good
    assert finding.place == str(cifar10[0] / "cifar-10-batches-bin")
    assert "50 + 10 images" in finding.text
    assert "no MD5 sums published" in finding.text


def test_a_truncated_file_is_named(cifar10):
    file = cifar10[0] / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    (finding,) = verify("cifar10", cifar10[0])
    assert not finding.good
    assert finding.text.startswith(f"{file}: holds 30729 bytes, expected 30730; truncated")


def test_wrong_counts_name_the_class(cifar10):
    folder, arrays = cifar10
    train, test = arrays
    first = int(train[1][0])
    arrays = (train[0], np.where(np.arange(50) == 0, (first + 1) % 10, train[1])), test
    write_files(folder / "cifar-10-batches-bin", cifar_binary_files("cifar10", arrays))
    (finding,) = verify("cifar10", folder)
    assert not finding.good
    assert "(2 classes differ); these are not the original data" in finding.text


def test_every_place_is_looked_at_and_archives_are_compared_with_the_published_sum(cifar10, monkeypatch):
    folder, arrays = cifar10
    archive = folder / "cifar-10-python.tar.gz"
    files = trust(monkeypatch, "cifar10", cifar_python_files("cifar10", arrays))
    write_archive(archive, "cifar-10-batches-py", files)
    first, second = verify("cifar10", folder)
    assert (first.good, second.good) == (True, False)
    published = sources.SOURCES["cifar10"].sums[archive.name]
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    assert second.text == f"{archive}: MD5 sum {digest}, the original has {published}; get the original file"
    trust(monkeypatch, "cifar10", {archive.name: archive.read_bytes()})
    _, second = verify("cifar10", folder)
    assert second.good
    assert "MD5 sums of 1 files as published" in second.text


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_compared_by_their_content(monkeypatch, tmp_path, compress):
    arrays = random_arrays((28, 28, 1), 10)
    raw = idx_files(arrays, compress=False)
    believe(monkeypatch, "mnist", arrays, sums={name: hashlib.md5(text).hexdigest() for name, text in raw.items()})
    write_files(tmp_path / "mnist", idx_files(arrays, compress))
    (finding,) = verify("mnist", tmp_path)
    assert finding.good
    assert "MD5 sums of 4 files as published" in finding.text
    name = "train-images-idx3-ubyte"
    wrong = raw[name][:-1] + bytes([raw[name][-1] ^ 1])
    path = tmp_path / "mnist" / (f"{name}.gz" if compress else name)
    path.write_bytes(gzip.compress(wrong) if compress else wrong)
    (finding,) = verify("mnist", tmp_path)
    assert finding.text.startswith(f"{path}: MD5 sum {hashlib.md5(wrong).hexdigest()}")


# --- is it what its name promises? ------------------------------------------------------------------------------


def print_of(images, labels):
    """The definition of a fingerprint, for fewer than 200 images."""
    return hashlib.md5(bytes(labels.tolist()) + images.tobytes()).hexdigest()


@pytest.fixture
def known(monkeypatch):
    """Small MNIST and Fashion-MNIST that count as the original ones."""
    arrays = {}
    for seed, name in enumerate(("mnist", "fashion-mnist")):
        arrays[name] = random_split(50, (28, 28, 1), 10, seed), random_split(10, (28, 28, 1), 10, seed + 7)
        believe(monkeypatch, name, arrays[name], fingerprints=tuple(print_of(*part) for part in arrays[name]), sums={})
    return arrays


def test_the_files_of_another_data_set_are_recognised(known, tmp_path):
    write_files(tmp_path / "mnist", idx_files(known["fashion-mnist"]))
    message = f"{tmp_path / 'mnist'}: holds fashion-mnist, not mnist; get the files of mnist, or use --dataset fashion-"
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", tmp_path, download=False)
    (finding,) = verify("mnist", tmp_path)
    assert not finding.good
    assert finding.text.startswith(message)
    write_files(tmp_path / "fashion-mnist", idx_files(known["fashion-mnist"]))
    assert load_dataset("fashion-mnist", tmp_path, download=False).classes[0] == "T-shirt/top"


def test_images_that_nobody_knows_are_not_taken_for_the_data_set(known, tmp_path):
    """Other counts (KMNIST has 6000 of each class, MNIST has not); the same counts of other images; another order."""
    (images, labels), test = known["mnist"]
    first = int(labels[0])
    cases = {
        "other counts": ((images, np.where(np.arange(50) == 0, (first + 1) % 10, labels)), "classes differ"),
        "other images": ((images ^ 1, labels), "the labels or images are not those of mnist"),
        "other order": ((images[::-1], labels[::-1]), "the labels or images are not those of mnist"),
        "labels shuffled": ((images, np.roll(labels, 1)), "the labels or images are not those of mnist"),
    }
    for case, (train, message) in cases.items():
        write_files(tmp_path / "mnist", idx_files((train, test)))
        with pytest.raises(DataError, match=message) as error:
            load_dataset("mnist", tmp_path, download=False)
        assert str(error.value).startswith(f"{tmp_path / 'mnist'}: "), case
        assert "--dataset file:PATH" in str(error.value), case
    write_files(tmp_path / "mnist", idx_files(known["mnist"]))
    assert_same(load_dataset("mnist", tmp_path, download=False), known["mnist"])


def test_table_of_fingerprints():
    prints = [source.fingerprints for source in sources.SOURCES.values() if source.fingerprints]
    assert len(prints) == len(set(prints)) == 5
    assert all(len(part) == 32 for pair in prints for part in pair)


def test_nothing_there(tmp_path):
    assert list(verify("svhn", tmp_path)) == []


# --- the commands --------------------------------------------------------------------------------------------------


def test_list_says_where_each_data_set_is(cifar10, invoke):
    folder = cifar10[0]
    code, out, err = invoke("data", "list", "--data-dir", folder)
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")] == list(DATASETS)
    assert f"found     {folder / 'cifar-10-batches-bin'}\n" in out
    assert f"found     not in {folder}\n" in out
    assert "apple, aquarium_fish" in out
    assert "and 90 more" in out
    assert "worm" in invoke("data", "list", "cifar100", "--data-dir", folder)[1]
    (folder / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    assert "test_batch.bin is missing)" in invoke("data", "list", "cifar10", "--data-dir", folder)[1]


def test_verify_reads_what_is_there_and_asks_for_what_is_named(cifar10, invoke, monkeypatch):
    folder = cifar10[0]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = invoke("data", "verify", "--data-dir", folder)
    assert (code, err) == (0, "")
    assert "cifar10  ok: " in out
    assert f"svhn  not in {folder}" in out
    code, out, err = invoke("data", "verify", "svhn", "--data-dir", folder)
    assert (code, err) == (1, "Error: 1 of the data sets looked at are wrong or missing; see above\n")
    (folder / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"")
    code, out, err = invoke("data", "verify", "cifar10", "--data-dir", folder)
    assert (code, err.count("\n")) == (1, 1)
    assert "cifar10  WRONG: " in out
    assert "test_batch.bin: holds 0 bytes" in out


def test_download(monkeypatch, tmp_path, invoke):
    arrays = random_arrays((32, 32, 3), 10)
    believe(monkeypatch, "cifar10", arrays)

    def retrieve(url, known_hash, fname, path, progressbar):
        write_archive(path / fname, "cifar-10-batches-bin", cifar_binary_files("cifar10", arrays))

    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    code, out, _ = invoke("data", "download", "cifar10", "--data-dir", tmp_path)
    assert code == 0
    assert out.startswith(f"cifar10: {tmp_path / 'cifar-10-binary.tar.gz'}, MD5 sums as published; none stated")
    code, out, _ = invoke("data", "download", "cifar10", "--data-dir", tmp_path)
    assert (code, out) == (0, f"cifar10 is there already: {tmp_path / 'cifar-10-binary.tar.gz'}\n")
    assert 'pip install "cupyep[demo]"' in invoke("data", "download", "digits")[1]


WRONG = {
    "no such command": (["data", "verfy"], 2, "unknown command 'verfy'; did you mean 'verify'?"),
    "no such data set": (["data", "verify", "mnits"], 2, "unknown data set 'mnits'; did you mean 'mnist'?"),
    "none to list": (["data", "list", "imagenet"], 2, "unknown data set 'imagenet'"),
    "nothing to download": (["data", "download"], 2, "Missing argument 'NAME'"),
    "two to download": (["data", "download", "mnist", "svhn"], 2, "unexpected extra argument (svhn)"),
    "no network": (["data", "download", "svhn"], 1, "cannot get svhn: the reason; or put into"),
    "missing": (["data", "verify", "svhn", "--data-dir", "gone"], 1, "are wrong or missing; see above"),
    "wrong option": (
        ["data", "list", "--data-dirs", "x"],
        2,
        "did you mean '--data-dir'?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_are_one_line(case, invoke, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cupyep.cli.data.fetch", lambda *_: "the reason")
    args, wanted, message = WRONG[case]
    code, _, err = invoke(*args)
    assert err.startswith("Error: ")
    assert (code, err.count("\n")) == (wanted, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []
