"""The teacher file: round trip, and every way to be wrong refused in one line that names the file."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest
from data_files import assert_one_line, edited

from cupyep.data import Dataset, Split, TeacherFile, TeacherWriter
from cupyep.data import teacher as reader
from cupyep.errors import ConfigurationError, TeacherError

COUNTS = {"train": 23, "test": 7}
CLASSES = ("cat", "dog", "owl")
FEATURES = {"layer2": (2, 3, 4), "layer1": (4, 1, 1)}


def make_dataset(name="animals", classes=CLASSES):
    rng = np.random.default_rng(0)

    def split(name, count):
        return Split(name, rng.integers(0, 256, (count, 2, 2, 1), dtype=np.uint8), rng.integers(0, 3, count))

    return Dataset.from_splits(name, classes, split("train", COUNTS["train"]), split("test", COUNTS["test"]))


def limited(dataset, train, test=COUNTS["test"]):
    return Dataset.from_splits(dataset.name, dataset.classes, dataset.train.take(train), dataset.test.take(test))


def make_values(dataset, views=2, features=FEATURES, seed=1):
    """Return {split: logits (V, N, C)} and {split: {layer: (V, N, H, W, C)}}."""
    rng = np.random.default_rng(seed)
    counts = {name: len(dataset.split(name)) for name in COUNTS}
    logits = {name: rng.normal(size=(views, n, 3)).astype(np.float32) for name, n in counts.items()}
    activations = {
        name: {layer: rng.normal(size=(views, n, *shape)).astype(np.float32) for layer, shape in features.items()}
        for name, n in counts.items()
    }
    return logits, activations


def write_all(writer, logits, activations, batch=5):
    for name in logits:
        for v, view in enumerate(writer.views):
            for start in range(0, logits[name].shape[1], batch):
                rows = slice(start, start + batch)
                chosen = {layer: values[v, rows] for layer, values in activations[name].items()}
                writer.write(name, view, start, logits[name][v, rows], chosen)


def write_file(path, dataset, features=FEATURES, views=("identity", "hflip"), **options):
    logits, activations = make_values(dataset, len(views), features)
    with TeacherWriter(path, dataset, "a teacher", views=views, features=features, **options) as writer:
        write_all(writer, logits, activations)
    return logits, activations


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def path(tmp_path, dataset):
    """A good file."""
    write_file(tmp_path / "teacher.h5", dataset)
    return tmp_path / "teacher.h5"


INDEX = np.array([3, 22, 0, 3, 7, 22])
VIEW = np.array([1, 0, 0, 1, 0, 1], np.uint8)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("views", [("identity", "hflip"), ("hflip", "identity")])
def test_round_trip(tmp_path, dataset, monkeypatch, memory, dtype, views):
    if not memory:
        monkeypatch.setattr(reader, "MEMORY_LIMIT", 0)
    path = tmp_path / "teacher.h5"
    logits, activations = write_file(path, dataset, views=views, dtype=dtype)
    with TeacherFile(path) as teacher:
        teacher.check(dataset)
        assert teacher.dataset == "animals"
        assert teacher.teacher == "a teacher"
        assert teacher.classes == CLASSES
        assert teacher.views == views
        assert teacher.feature_layers == FEATURES
        assert (teacher.count("train"), teacher.count("test")) == (23, 7)
        found = teacher.logits("train", INDEX, VIEW)
        assert (found.dtype, found.shape) == (np.float32, (6, 3))
        place = [views.index(("identity", "hflip")[v]) for v in VIEW]
        for row, n, v in zip(found, INDEX, place, strict=True):
            np.testing.assert_array_equal(row, logits["train"][v, n].astype(dtype))
        found = teacher.feature("layer2", "train", INDEX, VIEW)
        assert (found.dtype, found.shape) == (np.float32, (6, 2, 3, 4))
        for row, n, v in zip(found, INDEX, place, strict=True):
            np.testing.assert_array_equal(row, activations["train"]["layer2"][v, n].astype(dtype))
        identity = views.index("identity")
        np.testing.assert_array_equal(
            teacher.logits("test", np.arange(7), 0), logits["test"][identity].astype(dtype).astype(np.float32)
        )
    assert list(tmp_path.iterdir()) == [path]


def test_layout_on_disk(path, dataset):
    """The format of DESIGN, looked at with h5py alone."""
    with h5py.File(path) as file:
        assert file.attrs["format"] == "cupyep-teacher"
        assert file.attrs["version"] == 1
        assert file.attrs["dataset"] == "animals"
        assert list(file.attrs["classes"]) == list(CLASSES)
        assert list(file.attrs["views"]) == ["identity", "hflip"]
        assert file["train/logits"].shape == (2, 23, 3)
        assert file["train/logits"].dtype == np.float32
        assert file["test/features/layer2"].shape == (2, 7, 2, 3, 4)
        np.testing.assert_array_equal(file["train/labels"], dataset.train.labels)


def test_text_of_fixed_length(path, dataset):
    """As other HDF5 libraries store text."""
    with edited(path) as file:
        file.attrs["format"] = np.bytes_(b"cupyep-teacher")
        file.attrs["teacher"] = np.bytes_("Schüler".encode())
        file.attrs["classes"] = np.array([b"cat", b"dog", b"owl"])
    with TeacherFile(path) as teacher:
        teacher.check(dataset)
        assert teacher.teacher == "Schüler"


def test_every_damaged_byte_is_found(path):
    """Structures, texts, logits: whatever HDF5 itself would make of them."""
    content = path.read_bytes()
    for place in range(512, len(content), 61):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(TeacherError, match="its checksum is not that of its content") as error:
            TeacherFile(path)
        assert_one_line(error, path)


def test_other_programs_files_need_no_seal(path, dataset):
    """A damaged seal is no seal; and plain HDF5 is all that the format asks for."""
    content = path.read_bytes()
    plain = path.with_name("plain.h5")
    with h5py.File(path) as ours, h5py.File(plain, "w") as theirs:
        for name in ours:
            ours.copy(name, theirs)
        theirs.attrs.update(ours.attrs)
    path.write_bytes(b"x" + content[1:])
    for file in (path, plain):
        with TeacherFile(file) as teacher:
            teacher.check(dataset)


@pytest.mark.parametrize("views", [("identity", "hflip"), ("hflip", "identity")])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_accuracy_is_that_of_the_identity_view(tmp_path, dataset, monkeypatch, block, views):
    identity = views.index("identity")
    monkeypatch.setattr(reader, "BLOCK_BYTES", block)
    logits = {name: np.zeros((2, n, 3), np.float32) for name, n in COUNTS.items()}
    for name in COUNTS:
        labels = dataset.split(name).labels
        for n, label in enumerate(labels):
            right = n % 4 != 0
            logits[name][identity, n, label if right else (label + 1) % 3] = 1
            logits[name][1 - identity, n, label] = 1  # the other view is always right, and must not count
    with TeacherWriter(tmp_path / "t.h5", dataset, "", views=views) as writer:
        write_all(writer, logits, {"train": {}, "test": {}})
    assert writer.accuracy == {"train": pytest.approx(17 / 23), "test": pytest.approx(5 / 7)}
    with TeacherFile(tmp_path / "t.h5") as teacher:
        assert teacher.accuracy("train") == pytest.approx(17 / 23)
        assert teacher.accuracy("test") == pytest.approx(5 / 7)


def test_an_exception_leaves_nothing(tmp_path, dataset):
    def interrupted():
        with TeacherWriter(tmp_path / "t.h5", dataset, "") as writer:
            writer.write("train", "identity", 0, np.zeros((2, 3)))
            assert len(list(tmp_path.iterdir())) == 1  # the temporary file
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_file(path, dataset):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), TeacherWriter(path, dataset, ""):
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_missing_rows_are_found_at_the_end(tmp_path, dataset):
    logits, _ = make_values(dataset, 2, {})
    writer = TeacherWriter(tmp_path / "t.h5", dataset, "")
    write_all(writer, {"train": logits["train"], "test": logits["test"][:, :6]}, {"train": {}, "test": {}}, 1)
    writer.write("test", "identity", 6, logits["test"][0, 6:])
    with pytest.raises(TeacherError, match="1 rows of test were never written, the first: hflip 6") as error:
        writer.finish()
    assert_one_line(error, tmp_path / "t.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", "identity", 0, np.zeros((2, 3))), "unknown split 'valid'"),
        (("train", "rotated", 0, np.zeros((2, 3))), "unknown view 'rotated'"),
        (("train", "identity", 22, np.zeros((2, 3))), "train rows 22..23: outside 0..22"),
        (("train", "identity", -1, np.zeros((2, 3))), "outside 0..22"),
        (("train", "identity", 0, np.zeros((0, 3))), "outside 0..22"),
        (("train", "identity", 0, np.zeros((2, 4))), r"shape \(2, 4\), expected \(2, 3\)"),
        (("train", "identity", 4, np.full((2, 3), np.nan)), "train rows 4..5: logits are not all finite"),
        (("train", "identity", 0, np.full((2, 3), 1e5)), "not all finite as float16"),
        (("train", "identity", 0, np.zeros((2, 3)), {"layer1": np.zeros((2, 4, 1, 1))}), r"announced: \[\]"),
    ],
)
def test_wrong_writes(tmp_path, dataset, arguments, message):
    writer = TeacherWriter(tmp_path / "t.h5", dataset, "", dtype="float16")
    with pytest.raises(TeacherError, match=message) as error:
        writer.write(*arguments)
    assert_one_line(error, tmp_path / "t.h5")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_wrong_features_written(tmp_path, dataset):
    with TeacherWriter(tmp_path / "t.h5", dataset, "", features={"layer1": (4, 1, 1)}) as writer:
        with pytest.raises(TeacherError, match=r"features given: \[\], announced: \['layer1'\]"):
            writer.write("train", "identity", 0, np.zeros((2, 3)))
        with pytest.raises(TeacherError, match="features of layer1 have shape"):
            writer.write("train", "identity", 0, np.zeros((2, 3)), {"layer1": np.zeros((2, 4, 1, 2))})
        with pytest.raises(TeacherError, match="features of layer1 are not all finite"):
            writer.write("train", "identity", 0, np.zeros((2, 3)), {"layer1": np.full((2, 4, 1, 1), np.inf)})
        write_all(writer, *make_values(dataset, 2, {"layer1": (4, 1, 1)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": ("hflip",)}, "views are hflip: expected"),
        ({"views": ("identity", "identity")}, "views are identity, identity: expected"),
        ({"views": ("identity", "vflip")}, "views are identity, vflip: expected"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"features": {"a/b": (1, 1, 1)}}, "must not hold '/'"),
    ],
)
def test_wrong_writer_arguments(tmp_path, dataset, options, message):
    with pytest.raises(TeacherError, match=message) as error:
        TeacherWriter(tmp_path / "t.h5", dataset, "", **options)
    assert_one_line(error, tmp_path / "t.h5")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_does_not_exist(tmp_path, dataset):
    with pytest.raises(TeacherError, match="cannot write") as error:
        TeacherWriter(tmp_path / "nowhere" / "t.h5", dataset, "")
    assert_one_line(error, tmp_path / "nowhere" / "t.h5")


def test_missing_file(tmp_path):
    with pytest.raises(TeacherError, match="does not exist; make it with cupyep teacher"):
        TeacherFile(tmp_path / "t.h5")


def delete(name):
    return lambda file: file.__delitem__(name)


def attribute(name, value, group="/"):
    return lambda file: file[group].attrs.__setitem__(name, value)


def no_attribute(name, group="/"):
    return lambda file: file[group].attrs.__delitem__(name)


def replace(name, change):
    """Replace an array by what `change` makes of it."""

    def edit(file):
        values = file[name][...]
        del file[name]
        file[name] = change(values)

    return edit


def empty(name):
    """A split of no samples, whole in itself."""

    def edit(file):
        for array in ("labels", "logits", "features/layer1", "features/layer2"):
            values = file[f"{name}/{array}"][...]
            del file[f"{name}/{array}"]
            file[f"{name}/{array}"] = values[:0] if array == "labels" else values[:, :0]
        file[f"{name}/index"] = np.zeros(0, np.int64)

    return edit


def external_link(file):
    del file["train/logits"]
    file["train/logits"] = h5py.ExternalLink("elsewhere.h5", "/train/logits")
    shutil.copy(file.filename, f"{file.filename[: -len('teacher.h5')]}elsewhere.h5")


def external_storage(file):
    del file["train/logits"]
    file["train"].create_dataset("logits", (2, 23, 3), np.float32, external=[("/etc/passwd", 0, 2 * 23 * 3 * 4)])


def group_as_array(file):
    del file["test"]
    file["test"] = np.zeros(3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (attribute("format", "other"), "is not a cupyep teacher file"),
        (attribute("format", 3), "is not a cupyep teacher file"),
        (no_attribute("format"), "is not a cupyep teacher file"),
        (attribute("version", 2), "has version 2, this cupyep reads version 1; update cupyep"),
        (attribute("version", "1"), "has version 1, this"),
        (no_attribute("version"), "has version None"),
        (no_attribute("dataset"), "attribute 'dataset' is missing"),
        (attribute("teacher", np.arange(3)), "attribute 'teacher' is missing or not text"),
        (attribute("classes", "cat"), "attribute 'classes' is missing or not a list of names"),
        (attribute("classes", [1, 2, 3]), "attribute 'classes' is missing or not a list of names"),
        (attribute("classes", h5py.Empty("f")), "attribute 'classes' is missing or not a list of names"),
        (no_attribute("views"), "attribute 'views' is missing"),
        (attribute("views", ["identity", "rotated"]), "views are identity, rotated"),
        (attribute("views", ["hflip"]), "views are hflip: expected identity"),
        (attribute("views", ["identity"]), r"train/logits has shape \(2, 23, 3\), expected \(1, 23, 3\)"),
        (attribute("classes", ["cat", "dog"]), r"train/logits has shape \(2, 23, 3\), expected \(2, 23, 2\)"),
        (delete("train"), "has no group 'train'"),
        (group_as_array, "has no group 'test'"),
        (delete("train/logits"), "has no array 'train/logits'"),
        (delete("test/labels"), "has no array 'test/labels'"),
        (external_link, "has no array 'train/logits'"),
        (external_storage, "has no array 'train/logits'"),
        (replace("train/labels", lambda v: v[:-1]), r"expected \(2, 22, 3\)"),
        (replace("train/labels", lambda v: v.astype(float)), "train/labels is not a list of integers"),
        (replace("train/labels", lambda v: v[None]), "train/labels is not a list of integers"),
        (empty("train"), "train/labels holds 0 samples, expected 1 to 67108864; make the file again"),
        (empty("test"), "test/labels holds 0 samples, expected 1 to 67108864"),
        (replace("test/logits", lambda v: v.astype(np.float64)), "test/logits is float64, expected float32 or float16"),
        (replace("test/logits", lambda v: v.astype(np.int32)), "test/logits is int32"),
        (replace("test/logits", lambda v: v[0]), r"has shape \(7, 3\), expected \(2, 7, 3\)"),
        (no_attribute("accuracy", "train"), "train: attribute 'accuracy' is None"),
        (attribute("accuracy", 1.5, "test"), "test: attribute 'accuracy' is 1.5"),
        (attribute("accuracy", np.nan, "test"), "test: attribute 'accuracy' is nan"),
        (delete("test/features/layer2"), "features of train .* and test .* differ"),
        (replace("test/features/layer2", lambda v: v[:, :6]), "test/features/layer2 has shape"),
        (replace("test/features/layer2", lambda v: v[..., 0]), "test/features/layer2 has 4 axes, expected 5"),
        (replace("test/features/layer2", lambda v: v.astype(int)), "test/features/layer2 is int64"),
    ],
)
def test_malformed_files(path, edit, message):
    with edited(path) as file:
        edit(file)
    with pytest.raises(TeacherError, match=message) as error:
        TeacherFile(path)
    assert_one_line(error, path)


def set_value(name, place, value):
    return lambda file: file[name].__setitem__(place, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (attribute("dataset", "plants"), "is a teacher for data set plants, not animals; make one for animals with"),
        (attribute("classes", ["cat", "dog", "eel"]), "calls class 2 'eel', data set animals calls it 'owl'"),
        (set_value("train/labels", [4, 9, 11], 7), "3 of 23 train labels disagree .*sample 4 has 7, not "),
        (set_value("test/labels", 0, -1), "1 of 7 test labels disagree"),
        (
            set_value("train/logits", (1, slice(21, 23), 2), np.nan),
            "train/logits of sample 21, view hflip, are not finite",
        ),
        (set_value("test/logits", (0, 0, 0), np.inf), "test/logits of sample 0, view identity, are not finite"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_files_that_do_not_belong_to_the_data(path, dataset, monkeypatch, edit, message, block):
    monkeypatch.setattr(reader, "BLOCK_BYTES", block)
    with edited(path) as file:
        edit(file)
    with TeacherFile(path) as teacher, pytest.raises(TeacherError, match=message) as error:
        teacher.check(dataset)
    assert_one_line(error, path, "cupyep teacher")


def test_other_number_of_classes(path):
    with TeacherFile(path) as teacher, pytest.raises(TeacherError, match="has 3 classes, data set animals has 4"):
        teacher.check(make_dataset(classes=(*CLASSES, "eel")))


def test_limited_data_sets(tmp_path, dataset):
    """A file serves every beginning of the data it covers, and nothing more."""
    write_file(tmp_path / "full.h5", dataset)
    with TeacherFile(tmp_path / "full.h5") as teacher:
        teacher.check(limited(dataset, 5))
    write_file(tmp_path / "ten.h5", limited(dataset, 10))
    with TeacherFile(tmp_path / "ten.h5") as teacher:
        assert teacher.count("train") == 10
        teacher.check(limited(dataset, 10))
        teacher.check(limited(dataset, 4, 2))
        with pytest.raises(TeacherError, match="covers 10 train samples of data set animals, which has 23"):
            teacher.check(limited(dataset, 11))
        with pytest.raises(TeacherError, match="covers 10 train samples"):
            teacher.check(dataset)


def test_file_of_more_samples_than_there_are(tmp_path, dataset):
    write_file(tmp_path / "t.h5", dataset)
    first = Split("train", dataset.train.images[:20], dataset.train.labels[:20])  # all that this data set has
    smaller = Dataset.from_splits(dataset.name, dataset.classes, first, dataset.test)
    with TeacherFile(tmp_path / "t.h5") as teacher, pytest.raises(TeacherError, match="covers 23 train samples"):
        teacher.check(smaller)


def test_view_that_the_file_lacks(tmp_path, dataset):
    write_file(tmp_path / "t.h5", dataset, views=("identity",))
    with TeacherFile(tmp_path / "t.h5") as teacher:
        teacher.check(dataset)
        teacher.logits("train", INDEX, 0)
        with pytest.raises(
            TeacherError, match="no view 'hflip': export it again with both views, or train with --no-flip"
        ):
            teacher.logits("train", INDEX, VIEW)
        with pytest.raises(TeacherError, match="no view 'number 2'"):
            teacher.logits("train", INDEX, 2)


@pytest.mark.parametrize("index", [[23], [-1]])
def test_samples_that_the_file_lacks(path, index):
    with TeacherFile(path) as teacher:
        with pytest.raises(TeacherError, match=r"train/logits covers 23 of the samples 0..22, others are asked for"):
            teacher.logits("train", np.array(index), 0)
        with pytest.raises(ConfigurationError, match="unknown split 'valid'"):
            teacher.logits("valid", np.array(index), 0)


def test_features_that_the_file_lacks_or_that_are_not_finite(path):
    with edited(path) as file:
        file["train/features/layer2"][0, 3, 0, 0, 0] = np.nan
    with TeacherFile(path) as teacher:
        with pytest.raises(TeacherError, match="no features of layer 'layer3' \\(it has layer1, layer2\\)"):
            teacher.feature("layer3", "train", INDEX, VIEW)
        with pytest.raises(TeacherError, match="train/features/layer2 holds values that are not finite"):
            teacher.feature("layer2", "train", np.array([3]), 0)
        teacher.feature("layer2", "train", np.array([4]), 0)


def test_file_that_is_not_hdf5(tmp_path):
    path = tmp_path / "t.h5"
    for content in (b"", b"PK\x03\x04" * 100, bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(TeacherError, match="is not HDF5, truncated or damaged") as error:
            TeacherFile(path)
        assert_one_line(error, path)


@pytest.mark.parametrize("left", [1, 7, 8, 100, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, -100, -1])
def test_truncated_file(path, left):
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(TeacherError, match="is not HDF5, truncated or damaged") as error:
        TeacherFile(path)
    assert_one_line(error, path)
