"""Teacher files that are too large for memory: their rows are read before the step that wants them, by a thread.

Oracle: h5py, and the arrays that were written.
"""

import os
import threading
from dataclasses import replace

import h5py
import numpy as np
import pytest
from test_teacher import CLASSES, make_dataset, write_file

import cupyep as ep
from cupyep.data import TeacherFile
from cupyep.data import teacher as reader
from cupyep.errors import TeacherError
from cupyep.persistence import hdf5

LAYER = "layer2"


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    monkeypatch.setattr(reader, "MEMORY_LIMIT", 0)


@pytest.fixture
def read(monkeypatch):
    """(thread, numbers of rows) of every reading."""
    calls, inner = [], hdf5.Rows._read

    def looked_at(self, numbers):
        calls.append((threading.current_thread() is threading.main_thread(), numbers.tolist()))
        return inner(self, numbers)

    monkeypatch.setattr(hdf5.Rows, "_read", looked_at)
    return calls


def batches(size=5, seed=0):
    """Two epochs of a shuffled, mirrored split."""
    data = make_dataset()
    loader = ep.Loader(data, "train", size, "cpu", np.float32, True, True, np.random.default_rng(seed))
    return [*loader, *loader]


def test_a_batch_tells_what_comes():
    """Index and view of the next one; after the last of an epoch the next is not drawn yet."""
    found = batches()
    assert [len(batch) for batch in found] == [5, 5, 5, 5, 3] * 2
    for number, batch in enumerate(found):
        if number % 5 == 4:
            assert batch.coming is None
        else:
            np.testing.assert_array_equal(batch.coming[0], found[number + 1].index)
            np.testing.assert_array_equal(batch.coming[1], found[number + 1].view)
    assert batch.part(slice(1, 2)).coming is batch.coming
    network = ep.Network([ep.Conv2d((2, 2, 1), 4)], len(CLASSES), device="cpu", feedback=1.0)
    plain = replace(found[0], index=None, view=None, coming=None)
    assert network.batch(plain, found[0]).coming is found[0].coming


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("kind", ["logits", "features"])
def test_only_the_first_batch_of_an_epoch_is_waited_for(tmp_path, read, kind, micro_batch):
    """All others are read by another thread, once each, however many signals and parts ask for them."""
    logits, features = write_file(tmp_path / "t.h5", make_dataset())
    teacher = TeacherFile(tmp_path / "t.h5")
    net = ep.Network([ep.Conv2d((2, 3, 1), 4)], len(CLASSES), device="cpu", feedback=1.0)
    made = {
        "logits": lambda: ep.Distillation(teacher, [1], loss="squared_error"),
        "features": lambda: ep.FeatureDistillation(teacher, {1: LAYER}),
    }
    signals = [net.bind(made[kind]()) for _ in range(2)]
    stored = logits["train"] if kind == "logits" else features["train"][LAYER]
    found = batches()
    for batch in found:
        for start in range(0, len(batch), micro_batch or len(batch)):
            part = batch.part(slice(start, start + (micro_batch or len(batch))))
            for signal in signals:
                (nudge,) = signal.nudges(part)
                np.testing.assert_array_equal(nudge.target, stored[part.view, part.index])
        assert all(len(some._ahead) <= 2 for some in teacher._rows.values())
    teacher.close()
    ahead = [numbers for main, numbers in read if not main]
    expected = [np.unique(batch.view * 23 + batch.index).tolist() for batch in found]
    assert ahead == [numbers for at, numbers in enumerate(expected) if at % 5]
    first = [numbers for main, numbers in read if main]
    assert sorted(set(sum(first, []))) == sorted(set(expected[0] + expected[5]))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("teacher")] == []


@pytest.mark.parametrize("how", [{}, {"chunks": (1, 4, 3)}, {"chunks": (2, 3, 2), "compression": "gzip"}])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2"])
def test_rows_of_every_layout_and_type(tmp_path, how, dtype):
    values = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("before", data=np.arange(5))
        file.create_dataset("a", data=values, **how)
    with h5py.File(tmp_path / "a.h5") as file:
        some, numbers = hdf5.Rows(file["a"]), np.array([13, 0, 7, 0, 6])
        assert (some._offset is None) == bool(how)
        np.testing.assert_array_equal(some.take(numbers), values.reshape(14, 3)[numbers])
        some.expect(numbers)
        np.testing.assert_array_equal(some.take(numbers[1:3]), values.reshape(14, 3)[numbers[1:3]])
        np.testing.assert_array_equal(some.take(np.array([5, 13])), values.reshape(14, 3)[[5, 13]])
        some.close()


def test_a_type_that_numpy_has_not_is_left_to_hdf5(tmp_path):
    """Here with another bias of the exponent: the bytes mean other numbers."""
    odd = h5py.h5t.IEEE_F32LE.copy()
    odd.set_ebias(126)
    values = np.array([[[1.0, 2.0, 3.0]]], np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple((1, 1, 3))
        h5py.h5d.create(file.id, b"a", odd, space).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(hdf5.Rows(file["a"]).take(np.array([0])), values[0])


def test_a_file_that_becomes_short_is_told_by_the_step_that_wants_its_rows(tmp_path):
    write_file(tmp_path / "t.h5", make_dataset())
    teacher = TeacherFile(tmp_path / "t.h5")
    index, view = np.array([22]), np.array([1])
    os.truncate(tmp_path / "t.h5", 600)
    teacher.expect("train", index, view)
    with pytest.raises(TeacherError, match="t.h5: is not HDF5, truncated or damaged"):
        teacher.logits("train", index, view)
    teacher.close()


def test_what_is_in_memory_is_not_read_ahead(tmp_path, monkeypatch, read):
    monkeypatch.setattr(reader, "MEMORY_LIMIT", 1 << 20)
    logits, _ = write_file(tmp_path / "t.h5", make_dataset())
    with TeacherFile(tmp_path / "t.h5") as teacher:
        teacher.expect("train", np.array([3]), 1)
        np.testing.assert_array_equal(teacher.logits("train", np.array([3]), 1), logits["train"][1, [3]])
        with pytest.raises(TeacherError, match="no features of layer 'other'"):
            teacher.expect("train", np.array([3]), 1, "other")
    assert read == []
