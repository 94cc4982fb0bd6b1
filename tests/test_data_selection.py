"""Class-balanced limits, the validation split, and that both keep the canonical index on which teacher files rest.

Oracle: the definition in words (round after round, one sample of each class), done naively.
"""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from data_files import cifar_binary_files, edited, random_arrays, shrink_source, write_files
from hypothesis import given
from hypothesis import strategies as st

from cupyep.data import Dataset, Loader, Split, TeacherFile, TeacherWriter, load_dataset
from cupyep.data.dataset import assembled
from cupyep.data.selection import balanced, held_out
from cupyep.errors import ConfigurationError, DataError, TeacherError


def round_by_round(labels, count):
    """Take the first sample of every class, then the second of every class, ..., until there are `count`."""
    left = {c: [n for n, label in enumerate(labels) if label == c] for c in set(labels)}
    taken = []
    while len(taken) < count:
        turn = sorted(samples.pop(0) for samples in left.values() if samples)
        taken += turn[: count - len(taken)]
    return sorted(taken)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_balanced_is_the_definition(labels, data):
    count = data.draw(st.integers(1, len(labels)))
    rows = balanced(np.array(labels), count)
    assert rows.tolist() == round_by_round(labels, count)


def test_equal_shares_and_nested_choices():
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    small, large = balanced(labels, 100), balanced(labels, 500)
    assert np.bincount(labels[small]).tolist() == [10] * 10
    assert np.bincount(labels[large]).tolist() == [50] * 10
    assert set(small) < set(large)


def test_a_class_with_too_few_gives_all_it_has():
    labels = np.array([0] * 3 + [1] * 50 + [2] * 50)
    assert np.bincount(labels[balanced(labels, 43)]).tolist() == [3, 20, 20]


def test_held_out_samples_follow_the_seed():
    labels = np.arange(600) % 3
    first, again, other = (held_out(labels, 60, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(np.intersect1d(first, other)) < 30
    assert np.bincount(labels[first]).tolist() == [20, 20, 20]
    assert (np.diff(first) > 0).all()
    assert abs(first.mean() - 299.5) < 75, "drawn from everywhere, not the first ones"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    shrink_source(monkeypatch, "cifar10")
    write_files(tmp_path / "cifar-10-batches-bin", cifar_binary_files("cifar10", random_arrays((32, 32, 3), 10)))
    return tmp_path


def test_train_and_validation_share_no_sample_and_miss_none(folder):
    whole = load_dataset("cifar10", folder)
    data = load_dataset("cifar10", folder, validation=15, seed=3)
    parts = np.concatenate([data.train.index, data.validation.index])
    assert sorted(parts) == list(range(50))
    for split in (data.train, data.validation):
        assert split.total == 50
        np.testing.assert_array_equal(split.images, whole.train.images[split.index])
        np.testing.assert_array_equal(split.labels, whole.train.labels[split.index])
    np.testing.assert_array_equal(data.mean, whole.mean)
    limited = load_dataset("cifar10", folder, validation=15, seed=3, limit_train=20)
    np.testing.assert_array_equal(limited.validation.index, data.validation.index)
    assert set(limited.train.index) < set(data.train.index)


def test_impossible_validation(folder):
    for wrong in (0, -1, 50):
        with pytest.raises(ConfigurationError, match=f"validation is {wrong}: cifar10 has 50 train images, choose"):
            load_dataset("cifar10", folder, validation=wrong)
    with pytest.raises(ConfigurationError, match="limit-train is 41: .*, 10 of them held out, choose from 1 to 40"):
        load_dataset("cifar10", folder, validation=10, limit_train=41)
    with pytest.raises(ConfigurationError, match="no validation split was held out; ask for one by --validation"):
        load_dataset("cifar10", folder).split("validation")


def test_batches_carry_the_canonical_index(folder):
    whole = load_dataset("cifar10", folder)
    data = load_dataset("cifar10", folder, validation=15, limit_train=17)
    draw = {"shuffle": True, "generator": np.random.default_rng(0)}
    for name, options in (("train", draw), ("train", {**draw, "augment": True, "pad": 0}), ("validation", {})):
        seen = []
        for batch in Loader(data, name, 4, "cpu", np.float64, **options):
            seen += batch.index.tolist()
            stored = (batch.images * whole.std + whole.mean) * 255
            for image, n, view, label in zip(stored, batch.index, batch.view, batch.labels, strict=True):
                np.testing.assert_allclose(image[:, ::-1] if view else image, whole.train.images[n], atol=1e-3)
                assert label == whole.train.labels[n]
        assert sorted(seen) == data.split(name).index.tolist()


@pytest.mark.parametrize("index", [[0, 2, 1], [-1, 0, 1], [0, 1], [1, 1, 2]])
def test_an_index_must_increase(index):
    with pytest.raises(DataError, match="the index should be 3 increasing numbers"):
        Split("train", np.zeros((3, 1, 1, 1), np.uint8), np.arange(3), np.array(index))


def animals():
    """Three classes; logits of sample n are (n, 0, 0) in the identity view and (-n, 0, 0) in the mirrored one."""
    labels = np.arange(24) % 3
    train, test = (Split(s, np.full((24, 2, 2, 1), 9, np.uint8), labels) for s in ("train", "test"))
    return Dataset.from_splits("animals", ("cat", "dog", "owl"), train, test)


def limited(train=None, validation=None):
    whole = animals()
    held = held_out(whole.train.labels, validation, 5) if validation else None
    return assembled("animals", whole.classes, whole.train, whole.test, held, (train, 6), False, 0)


def write_teacher(path, dataset):
    with TeacherWriter(path, dataset, "counting") as writer:
        for split in ("train", "test"):
            index = dataset.split(split).index.astype(np.float32)
            for view, sign in (("identity", 1), ("hflip", -1)):
                writer.write(split, view, 0, sign * index[:, None] * np.eye(1, 3))


def test_a_whole_teacher_serves_limits_and_validation(tmp_path):
    write_teacher(tmp_path / "t.h5", animals())
    with h5py.File(tmp_path / "t.h5") as file:
        assert "index" not in file["train"], "the plain format where row n is sample n"
    dataset = limited(train=7, validation=9)
    with TeacherFile(tmp_path / "t.h5") as teacher:
        teacher.check(dataset)
        wanted = dataset.train.index.astype(np.float32)
        np.testing.assert_array_equal(teacher.logits("train", dataset.train.index, 0)[:, 0], wanted)


def test_a_teacher_of_some_samples_knows_which(tmp_path):
    dataset = limited(train=9, validation=12)
    write_teacher(tmp_path / "t.h5", dataset)
    with TeacherFile(tmp_path / "t.h5") as teacher:
        teacher.check(dataset)
        index = dataset.train.index[[4, 1, 1, 8]]
        view = np.array([0, 1, 0, 1])
        np.testing.assert_array_equal(teacher.logits("train", index, view)[:, 0], np.where(view, -index, index))
        held = dataset.validation.index[:1]
        with pytest.raises(TeacherError, match=r"train/logits covers 9 of the samples \d+..\d+, others are asked for"):
            teacher.logits("train", held, 0)
        with pytest.raises(TeacherError, match="covers 9 train samples .* 15 of these not in the file; make one"):
            teacher.check(animals())


def test_labels_are_compared_sample_by_sample(tmp_path):
    dataset = limited(train=9, validation=12)
    write_teacher(tmp_path / "t.h5", dataset)
    last = dataset.train.index[-1]
    wrong = dataset.train.labels.copy()
    wrong[-1] = (wrong[-1] + 1) % 3
    train = Split("train", dataset.train.images, wrong, dataset.train.index, 24)
    other = Dataset("animals", dataset.classes, train, dataset.test, dataset.mean, dataset.std)
    with TeacherFile(tmp_path / "t.h5") as teacher, pytest.raises(TeacherError, match=rf"\(first: sample {last} has"):
        teacher.check(other)


@pytest.mark.parametrize("index", [[3, 1, 2], [0, 1], [-1, 0, 1], [0.0, 1.0, 2.0], [1, 1, 2]])
def test_damaged_index(tmp_path, index):
    write_teacher(tmp_path / "t.h5", limited(train=3, validation=12))
    with edited(tmp_path / "t.h5") as file:
        del file["train/index"]
        file["train/index"] = np.array(index)
    with pytest.raises(TeacherError, match="train/index is not 3 increasing numbers from 0 on; make the file again"):
        TeacherFile(tmp_path / "t.h5")


def test_a_teacher_that_does_not_fit_the_disk_is_one_line(tmp_path):
    """RLIMIT_FSIZE as a disk that takes only so many bytes of a file; HDF5 would crash on it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 2000, 10_000, 90_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(TeacherError, match=r"cannot write teacher file .*t\.h5: .*File too large") as error:
                write_teacher(tmp_path / "t.h5", animals())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
