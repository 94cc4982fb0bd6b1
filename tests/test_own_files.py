"""A user's own pictures and files by name. Oracle: pixels computed by hand, and the documented contract of errors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest

import cupyep as ep
from cupyep.commands.confusion import confusion_of
from cupyep.data import stored as storing
from cupyep.data.pictures import read_picture
from cupyep.data.sources import absolute_name, short_name
from cupyep.errors import ConfigurationError, DataError
from cupyep.training.config import make_config
from cupyep.training.run_directory import RunDirectory

pytest.importorskip("PIL")
from shapes import make_folder  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (20, 6, 8, 3), dtype=np.uint8), np.arange(20) % 2
TINY = ["--arch", "8p 8p", "--free-steps", 2, "--nudged-steps", 2, "--batch-size", 10, "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"file:{path}"


def save_h5(path, compression=None, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array.dtype.kind == "U":
                file.create_dataset(name, data=array.tolist(), dtype=h5py.string_dtype())
            else:
                file.create_dataset(name, data=array, compression=compression)
    return f"file:{path}"


def write(path, kind, **arrays):
    if kind == "npz":
        return save(path.with_suffix(".npz"), **arrays)
    if kind == "compressed":
        np.savez_compressed(path.with_suffix(".npz"), **arrays)
        return f"file:{path.with_suffix('.npz')}"
    return save_h5(path.with_suffix(".h5"), "gzip" if kind == "gzip" else None, **arrays)


@pytest.mark.parametrize("limit", [0, 1 << 28], ids=["streamed", "whole"])
@pytest.mark.parametrize("kind", ["npz", "compressed", "h5", "gzip"])
@pytest.mark.parametrize(
    "x", [X, X.astype(np.float64), X[..., 0], np.asfortranarray(X)], ids=["bytes", "f8", "grey", "order"]
)
def test_files_hold_what_was_put_there(tmp_path, monkeypatch, kind, limit, x):
    monkeypatch.setattr(storing, "RESIDENT_BYTES", limit)
    names = np.array(["owl", "newt"])
    name = write(tmp_path / "a", kind, x_train=x, y_train=names[Y], x_test=x[:5], y_test=names[Y[:5]], x_val=x[:3],
                 y_val=names[Y[:3]], classes=names)  # fmt: skip
    data = ep.load_dataset(name)
    wanted = x.reshape(20, 6, 8, -1).astype(np.uint8 if x.dtype == np.uint8 else np.float32)
    assert (data.classes, data.name, data.flip, data.pad) == (
        ("owl", "newt"),
        f"file:a{name[-4:].lstrip('a')}",
        True,
        1,
    )
    for part, rows in ((data.train, 20), (data.test, 5), (data.validation, 3)):
        np.testing.assert_array_equal(part.images[:], wanted[:rows])
        np.testing.assert_array_equal(part.labels, Y[:rows])
        shuffled = np.array([2, 0, 1])
        np.testing.assert_array_equal(part.images[shuffled], wanted[shuffled])
    both = np.concatenate([wanted, wanted[:3]]) / (255 if x.dtype == np.uint8 else 1)
    np.testing.assert_allclose(data.mean, both.mean((0, 1, 2), np.float64), rtol=1e-6)


def test_a_folder_of_classes(tmp_path):
    folder = make_folder(tmp_path / "shapes", 12, 8)
    (folder / "disc" / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    (folder / "disc" / "below").mkdir()
    os.rename(folder / "disc" / "004.jpg", folder / "disc" / "below" / "004.jpg")
    data = ep.load_dataset(f"folder:{folder}", image_size=16, test_fraction=0.25, validation=5, seed=1)
    assert (data.classes, data.image_shape, data.name) == (("bar", "disc"), (16, 16, 3), "folder:shapes")
    parts = (data.train, data.validation, data.test)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[4, 6], [2, 3], [2, 3]]
    files = sorted((folder / "bar").iterdir()) + sorted((folder / "disc").rglob("*.[jp][pn]g"))
    decoded = {read_picture(path, (16, 16, 3)).tobytes(): path.relative_to(folder).parts[0] for path in files}
    seen = [image for part in parts for image in zip(part.images, part.labels, strict=True)]
    assert {image.tobytes(): data.classes[label] for image, label in seen} == decoded
    again = ep.load_dataset(f"folder:{folder}", image_size=16, test_fraction=0.25, validation=5, seed=1)
    assert (again.fingerprint, len(list((tmp_path / "cache" / "pictures").iterdir()))) == (data.fingerprint, 1)
    os.utime(files[0], ns=(0, 0))  # touched: decoded anew, the same images
    touched = ep.load_dataset(f"folder:{folder}", image_size=16)
    assert (touched.fingerprint, len(list((tmp_path / "cache" / "pictures").iterdir()))) == (data.fingerprint, 2)
    assert ep.load_dataset(f"folder:{folder}").image_shape == (32, 32, 3)
    cache = tmp_path / "cache" / "pictures"
    for name, age in ((".a.npz.1.tmp", 2 * 86400), (".b.npz.1.tmp", 60)):  # of a process that was killed, one at work
        (cache / name).write_bytes(b"x")
        os.utime(cache / name, (time.time() - age,) * 2)
    ep.load_dataset(f"folder:{folder}", image_size=8)
    assert [path.name for path in cache.glob(".*")] == [".b.npz.1.tmp"]


def test_pictures_stand_upright(tmp_path):
    """Bars lie in upright pictures: rows in the middle are bright, columns are not."""
    data = ep.load_dataset(f"folder:{make_folder(tmp_path / 's', 6, 6)}", image_size=24)
    bars = np.concatenate([part.images[part.labels == 0] for part in (data.train, data.test)]).mean(axis=3)
    rows, columns = bars[:, 10:14].mean(axis=(1, 2)), bars[:, :, 10:14].mean(axis=(1, 2))
    assert (rows > 1.5 * columns).all()


def test_a_folder_with_parts_and_grey_pictures(tmp_path):
    from PIL import Image

    for part, count in (("train", 6), ("valid", 2), ("TEST", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for n in range(count):
                Image.fromarray(X[10 * label + n, ..., 0]).save(tmp_path / "pets" / part / name / f"{n}.png")
    data = ep.load_dataset(f"folder:{tmp_path / 'pets'}", image_size=6)
    assert (data.image_shape, len(data.train), len(data.validation), len(data.test)) == ((6, 6, 1), 12, 4, 6)
    middle = X[[0, 1, 2, 10, 11, 12], :, 1:7, 0]
    np.testing.assert_array_equal(data.test.images[..., 0], middle)
    with pytest.raises(ConfigurationError, match="has a validation part of its own; leave out --validation"):
        ep.load_dataset(f"folder:{tmp_path / 'pets'}", validation=2)


def test_tiny_imagenet(tmp_path):
    """Its own layout: pictures of a class below its folder; validation pictures in one folder, told by a table."""
    from PIL import Image

    root, lines = tmp_path / "tiny-imagenet-200", []
    for folder in ("val/images", "test/images", "train/n1/images", "train/n2/images", "train/n3/images"):
        (root / folder).mkdir(parents=True)
    for n in range(6):
        label = f"n{n % 3 + 1}"
        Image.fromarray(X[n, :, :6]).save(root / "train" / label / "images" / f"{label}_{n}.png")
        Image.fromarray(X[n + 6, :, :6]).save(root / "val" / "images" / f"val_{n}.png")
        lines.append(f"val_{n}.png\t{label}\t0\t0\t5\t5\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n1\tgoldfish, Carassius auratus\nn2\tcrane\nn3\tcrane, bird\nn4\tother\n")
    data = ep.load_dataset(f"folder:{root}", image_size=6)
    assert data.classes == ("goldfish", "n2", "n3")
    np.testing.assert_array_equal(data.train.images, X[[0, 3, 1, 4, 2, 5], :, :6])
    np.testing.assert_array_equal(data.test.images, X[6:12, :, :6])
    np.testing.assert_array_equal(data.test.labels, np.arange(6) % 3)
    os.remove(root / "val" / "images" / "val_2.png")
    with pytest.raises(DataError, match="val_2.png is missing"):
        ep.load_dataset(f"folder:{root}", image_size=6)


def test_names():
    assert short_name("folder:/a/b/shapes/") == "folder:shapes"
    assert absolute_name("file:x.npz") == f"file:{os.getcwd()}/x.npz"
    assert absolute_name("cifar10") == short_name("cifar10") == "cifar10"
    assert make_config({"data_dir": "data"}).data_dir == f"{os.getcwd()}/data"


def folder_of(tmp_path, *files):
    for name in files:
        path = tmp_path / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("text")
        elif "bad" in name:
            path.write_bytes(b"\x89PNG\r\n\x1a\n")
        else:
            read = np.zeros((4, 4, 3), np.uint8)
            from PIL import Image

            Image.fromarray(read).save(path)
    return "folder:p"


def pickled(tmp_path):
    np.savez("o.npz", x=X, y=np.array([{}] * 20), allow_pickle=True)
    return "file:o.npz"


def cut(tmp_path):
    save("c.npz", x=X, y=Y)
    content = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(content[: len(content) // 2])
    return "file:c.npz"


def external(tmp_path):
    with h5py.File("e.h5", "w") as file:
        file.create_dataset("x", X.shape, "u1", external=[("x.raw", 0, h5py.h5f.UNLIMITED)])
        file["y"] = Y
    return "file:e.h5"


def lying(tmp_path):
    """Return a file whose head promises more images than there are."""
    with zipfile.ZipFile("l.npz", "w") as archive:
        with archive.open("x.npy", "w") as file:
            head = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
            np.lib.format.write_array_header_1_0(file, head)
            file.write(bytes(100))
        with archive.open("y.npy", "w") as file:
            np.lib.format.write_array(file, Y)
    return "file:l.npz"


def note(name):
    def make(tmp_path):
        (tmp_path / name).write_text("x")
        return f"file:{name}"

    return make


WRONG = {
    "no path": (lambda _: "folder:", 2, "lacks a path behind the colon"),
    "another kind": (lambda _: "dir:shapes", 2, "unknown --dataset 'dir:shapes'"),
    "no folder": (lambda _: "folder:gone", 1, "there is no folder"),
    "no file": (lambda _: "file:gone.npz", 1, "there is no file"),
    "a file as folder": (lambda _: note("a.npz")(_).replace("file", "folder"), 1, "use --dataset file:"),
    "a folder as file": (lambda t: folder_of(t, "a/1.png").replace("folder", "file"), 2, "use --dataset folder:"),
    "empty folder": (lambda t: (t / "p").mkdir() or "folder:p", 1, "no pictures in it; expected a sub-folder a class"),
    "pictures of no class": (lambda t: folder_of(t, "1.png", "a/1.png"), 1, "1.png lies in the folder of no class"),
    "one class": (lambda t: folder_of(t, "a/1.png", "a/2.png"), 1, "only one class, 'a'"),
    "a class without pictures": (lambda t: folder_of(t, "a/1.png", "b/1.txt"), 1, "no pictures of class 'b' in it"),
    "a damaged picture": (lambda t: folder_of(t, "a/1.png", "b/bad.png"), 1, "bad.png: is not a readable picture"),
    "a strange class for testing": (
        lambda t: folder_of(t, "train/a/1.png", "train/b/1.png", "test/c/1.png"),
        1,
        "class 'c' is not among those in",
    ),
    "nothing for testing": (
        lambda t: folder_of(t, "train/a/1.png", "train/b/1.png", "test/readme.txt"),
        1,
        "test: no pictures in it",
    ),
    "no folder train": (lambda t: folder_of(t, "test/a/1.png", "val/a/1.png"), 1, "but no folder train beside it"),
    "another ending": (note("x.csv"), 2, "ends in '.csv': a file of images is one of .npz, .h5, .hdf5"),
    "no npz": (note("x.npz"), 1, "is not a readable .npz file"),
    "no HDF5": (note("x.h5"), 1, "is not a readable .h5 file"),
    "cut": (cut, 1, "is not a readable .npz file"),
    "lying": (lying, 1, "x.npy is truncated or damaged"),
    "pickled objects": (pickled, 1, "y.npy holds pickled objects, which could run code"),
    "of another file": (external, 1, "holds no x, but y"),
    "no labels": (lambda _: save("a.npz", x=X), 1, "holds no y, but x; make one by np.savez"),
    "no images": (lambda _: save("a.npz", y=Y, images=X), 1, "holds no x, but y"),
    "test without labels": (lambda _: save("a.npz", x=X, y=Y, x_test=X), 1, "holds no y_test"),
    "labels missing": (lambda _: save("a.npz", x=X, y=Y[:9]), 1, "20 images, but 9 labels"),
    "complex images": (lambda _: save("a.npz", x=X * 1j, y=Y), 1, "complex128"),
    "NaN": (lambda _: save("a.npz", x=X * np.nan, y=Y), 1, "image 0 has values that are NaN"),
    "names for numbers": (lambda _: save("a.npz", x=X, y=Y, classes=np.array(["a"])), 1, "there are 1 classes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_are_one_line_and_leave_nothing(case, tmp_path, invoke):
    make, code, message = WRONG[case]
    name = make(tmp_path)
    found, out, err = invoke("train", "--dataset", name, *TINY)
    assert (found, out) == (code, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "runs").exists()


OPTIONS = {
    "size of a file": (["--dataset", "file:a.npz", "--image-size", "8"], "--image-size needs a named data set or"),
    "share of CIFAR": (["--test-fraction", "0.1"], "--test-fraction needs --dataset file:PATH or folder:PATH"),
    "all for testing": (["--dataset", "file:a.npz", "--test-fraction", "1"], "--test-fraction must be below 1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_without_effect(case, invoke):
    arguments, message = OPTIONS[case]
    code, _, err = invoke("train", *arguments, *TINY)
    assert code == 2
    assert message in err


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch, invoke):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPYEP_CACHE", str(tmp_path / "file"))
    make_folder(tmp_path / "s", 2, 2)
    code, _, err = invoke("train", "--dataset", "folder:s", *TINY)
    assert code == 1
    assert "name another folder by CUPYEP_CACHE" in err


def test_from_pictures_to_predictions(tmp_path, invoke, monkeypatch):
    """Train with a teacher of its own, go on, validate, predict, look at it, export; then the data change."""
    make_folder(tmp_path / "shapes", 26, 14, low=12, high=30)
    data = ["--dataset", "folder:shapes", "--image-size", 16]
    options = [*data, *TINY, "--epochs", 1, "--aug", "kd", "--teacher-epochs", 1, "--no-crop", "--validation", 6]
    options.remove("--quiet")
    code, out, err = invoke("train", *options, "--run-dir", "run")
    assert code == 0, err
    assert "folder:" in out
    assert "26 training, 6 validation and 8 test images" in out
    assert "classes of unequal size: disc 17, bar 9 training images" in out
    config = RunDirectory.open("run").config
    assert config.dataset == f"folder:{tmp_path / 'shapes'}"
    monkeypatch.chdir(tmp_path / "shapes")  # a run goes on from anywhere
    monkeypatch.setattr("cupyep.cli.runs._draw", lambda *_: [])  # seconds, whatever the data
    run = tmp_path / "run"
    for command in (
        ["train", "--resume", "--run-dir", run, "--epochs", 2, "--stretch-schedule", "--dataset", "folder:."],
        ["evaluate", run, "--split", "validation"],
        ["predict", run, "disc", "bar/001.png"],
        ["diagnose", run],
        ["info", *data[:1], "folder:.", *data[2:], "--arch", "8p 8p"],
        ["export", run, "--format", "npz", "--output", tmp_path / "net.npz"],
    ):
        code, out, err = invoke(*command)
        assert code == 0, err
        if command[0] == "evaluate":
            assert "on the 6 validation images of folder:" in out
            assert "chosen by validation accuracy" in out
        if command[0] == "predict":
            assert len(out.splitlines()) == 27
            assert all("disc" in line and "bar" in line for line in out.splitlines())
    matrix, classes = confusion_of(RunDirectory.open(run))
    assert (matrix.sum(axis=1).tolist(), classes) == ([3, 5], ["bar", "disc"])
    os.remove(tmp_path / "shapes" / "disc" / "003.png")
    code, _, err = invoke("train", "--resume", "--run-dir", run, "--epochs", 3, "--stretch-schedule")
    assert code == 1
    assert err.count("\n") == 1


def test_a_run_goes_on_with_its_own_images_only(tmp_path, invoke):
    name = save(tmp_path / "a.npz", x=X, y=Y)
    short = ["--arch", "8", *TINY[2:]]
    code, _, err = invoke("train", "--dataset", name, *short, "--epochs", 1, "--run-dir", "run")
    assert code == 0, err
    more = ("train", "--resume", "--run-dir", "run", "--stretch-schedule", "--epochs")
    other = X.copy()
    other[19, 5, 7, 2] ^= 1  # one bit of one pixel
    save(tmp_path / "a.npz", x=other, y=Y)
    code, _, err = invoke(*more, 2)
    assert code == 1
    assert "belongs to a run on other images or labels: file:a.npz has changed since it began" in err
    for command in (("evaluate", "run"), ("diagnose", "run"), ("export", "run", "--format", "run", "--output", "out")):
        code, _, err = invoke(*command)
        assert (code, "file:a.npz has changed since it began" in err) == (1, True), command
    assert not (tmp_path / "out").exists()
    save(tmp_path / "a.npz", x=X, y=Y)
    code, _, err = invoke(*more, 2)
    assert code == 0, err


def test_predictions_of_arrays(tmp_path, invoke):
    x = RNG.normal(50, 9, (20, 8, 10, 13)).astype(np.float32)
    name = save(tmp_path / "a.npz", x=x, y=Y, classes=np.array(["wet", "dry"]))
    code, _, err = invoke("train", "--dataset", name, "--arch", "8p", *TINY[2:], "--epochs", 1, "--run-dir", "run")
    assert code == 0, err
    np.save("one.npy", x[0])
    np.save("two.npy", x[0, ..., :3])
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "p.png").write_bytes(b"")
    code, out, err = invoke("predict", "run", "one.npy", "two.npy", "objects.npy", "p.png")
    lines = out.splitlines()
    assert code == 1
    assert "wet" in lines[0]
    assert "should be one image, float32 (8, 10, 13) and finite, but is float32 (8, 10, 3)" in lines[1]
    assert "is not a readable .npy file" in lines[2]
    assert "of which a picture knows no unit; give a .npy file" in lines[3]
    code, out, err = invoke("export", "run", "--format", "npz", "--output", "net.npz")
    assert code == 0, err
    assert "(pixel - mean) / std" in out


MANY = 100_000
READ_ALL = """
import resource, sys
import numpy as np
from cupyep.data import Loader, load_dataset
import zipfile, h5py, PIL.Image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
begin = peak()
data = load_dataset(sys.argv[1], validation=1000)
batches = Loader(data, "train", 256, "cpu", "float32", augment=True, shuffle=True, generator=np.random.default_rng(0))
assert sum(len(batch) for batch in batches) == len(data.train)
print(peak() - begin)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_many_images_take_little_memory(tmp_path, kind):
    """100,000 images of 307 MB, read twice in order and once shuffled: at most a quarter of them is in memory."""
    pytest.importorskip("resource")
    block = RNG.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
    labels, path = np.arange(MANY) % 10, tmp_path / f"many.{kind}"
    if kind == "npz":
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("x.npy", "w", force_zip64=True) as file:
                head = {"descr": "|u1", "fortran_order": False, "shape": (MANY, 32, 32, 3)}
                np.lib.format.write_array_header_1_0(file, head)
                for _ in range(MANY // 1000):
                    file.write(block)
            with archive.open("y.npy", "w") as file:
                np.lib.format.write_array(file, labels)
    else:
        with h5py.File(path, "w") as file:
            x = file.create_dataset("x", (MANY, 32, 32, 3), "u1")
            for start in range(0, MANY, 1000):
                x[start : start + 1000] = block
            file["y"] = labels
    command = [sys.executable, "-c", READ_ALL, f"file:{path}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 77e6, found.stdout
