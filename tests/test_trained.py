"""Trained runs in use: `cupyep predict` and `cupyep export`, without the data set.

Oracles: the run's own learner on the images of the loader; onnxruntime; a PyTorch module.
"""

from __future__ import annotations

import json
import shutil
import sys

import h5py
import numpy as np
import pytest

import cupyep as ep
from cupyep.persistence import hdf5
from cupyep.training.trained import load_trained

TINY = ["--width", "0.02", "--free-steps", "4", "--nudged-steps", "3", "--batch-size", "7", "--device", "cpu"]
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def trained(cifar, invoke, tmp_path, monkeypatch):
    """Return a function that trains a run and then takes the data set away; and what its loader gave of 10 images."""

    def make(*options):
        path = tmp_path / "run"
        tiny = TINY[:2] + TINY[6:] if "bp" in options else TINY  # which takes no steps
        arguments = ["train", *tiny, "--epochs", 1, "--limit-train", 20, "--run-dir", path, "--quiet", *options]
        assert invoke(*arguments)[0] == 0
        data = ep.load_dataset("cifar10", cifar, image_size=16 if "--image-size" in options else None)
        shutil.rmtree(cifar)
        return path, data

    return make


def scores_of(path, data):
    run = load_trained(path)
    batch = next(iter(ep.Loader(data, "test", 10, "cpu", run.network.dtype)))
    return run, run.learner.scores(batch).copy()


def softmax(rows):
    powers = np.exp(rows.astype(float))
    return powers / powers.sum(axis=1, keepdims=True)


def save_pictures(folder, images):
    folder.mkdir()
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{n:02}.png")


@pytest.mark.parametrize(
    "options", [(), ("--image-size", "16"), ("--tolerance", "0.5"), ("--algorithm", "bp"), ("--algorithm", "bptt")]
)
def test_predictions_are_those_of_the_test_images(trained, invoke, tmp_path, options):
    whole = ep.load_dataset("cifar10").test.images
    path, data = trained(*options)
    run, scores = scores_of(path, data)
    save_pictures(tmp_path / "photos", whole)
    code, out, err = invoke("predict", path, tmp_path / "photos", "--json", "--top", 10)
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    if "bp" not in options:
        batch = next(iter(ep.Loader(data, "test", 10, "cpu", run.network.dtype)))
        residuals = run.learner.settled(batch).stats.per_sample.max(axis=0)
        found = [answer["residual"] for answer in answers]
        np.testing.assert_allclose(found, residuals, rtol=1e-4, atol=5e-7)  # a difference of states: their rounding
    assert [answer["file"] for answer in answers] == [str(tmp_path / "photos" / f"{n:02}.png") for n in range(10)]
    for answer, row, wanted in zip(answers, scores, softmax(scores), strict=True):
        names = [entry["class"] for entry in answer["classes"]]
        assert names == [data.classes[c] for c in np.argsort(-row, kind="stable")]
        places = [data.classes.index(name) for name in names]
        np.testing.assert_allclose([entry["score"] for entry in answer["classes"]], row[places], rtol=1e-5)
        np.testing.assert_allclose([entry["probability"] for entry in answer["classes"]], wanted[places], rtol=1e-5)
        assert (answer["residual"] is None) == ("bp" in options)
        assert answer["settled"] is (answer["residual"] <= 0.5 if "--tolerance" in options else None)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--feedback", "0.5", "--schedule", "evenodd"),
        ("--schedule", "synchronous"),
        ("--relaxation", "0.8"),
        ("--algorithm", "bptt"),
        ("--algorithm", "bp"),
        ("--tolerance", "0.05", "--free-steps", "40"),
        ("--algorithm", "bptt", "--tolerance", "0.2", "--nudged-steps", "3"),
        ("--algorithm", "bp", "--arch", "8+8 8p"),
    ],  # fmt: skip
)
def test_a_network_alone_predicts_what_its_run_did(trained, tmp_path, options):
    """Taken from the run, and saved and loaded on its own: as it was trained, with nothing said."""
    path, data = trained(*options)
    run, scores = scores_of(path, data)
    batch = next(iter(ep.Loader(data, "test", 10, "cpu", run.network.dtype)))
    run.network.save(tmp_path / "net.h5")
    for network in (run.network, ep.Network.load(tmp_path / "net.h5", device="cpu")):
        np.testing.assert_array_equal(network.scores(batch), scores)
        np.testing.assert_array_equal(network.predict(batch), np.argmax(scores, axis=1))
        correct = (network.predict(batch.images) == data.test.labels).sum()
        assert correct == run.learner.evaluate(batch)[1]


def test_pictures_settle_together_as_the_images_of_an_evaluation_do(trained, invoke, tmp_path):
    """Three at a time: with a tolerance each such part stops by itself, and none waits for the other pictures."""
    path, data = trained("--micro-batch", "3", "--feedback", "0.5", "--schedule", "synchronous")
    network = load_trained(path).network
    batch = next(iter(ep.Loader(data, "test", 10, "cpu", network.dtype)))
    parts = [batch.images[rows] for rows in network.parts(10, 3)]
    after_ten = sorted(network.settle(part, steps=10).stats.per_sample.max() for part in parts)
    tolerance = float(after_ten[0] + after_ten[-1]) / 2  # at which some stop after ten steps, and others go on
    given = {"tolerance": tolerance, "free_steps": 200}
    scores = load_trained(path, given=given).learner.scores(batch)
    by_hand = [network.settle(part, steps=200, tolerance=tolerance) for part in parts]
    assert len({state.stats.steps for state in by_hand}) > 1, "else this says nothing"
    np.testing.assert_array_equal(np.concatenate([network.outputs(s.layers[-1]) for s in by_hand]), scores)
    save_pictures(tmp_path / "photos", data.test.images)
    options = ["--json", "--top", 10, "--tolerance", tolerance, "--free-steps", 200, "--batch-size", 10]
    code, out, err = invoke("predict", path, tmp_path / "photos", *options)
    assert (code, err) == (0, "")
    residuals = np.concatenate([state.stats.per_sample.max(axis=0) for state in by_hand])
    for line, row, residual in zip(out.splitlines(), scores, residuals, strict=True):
        answer = json.loads(line)
        places = [data.classes.index(entry["class"]) for entry in answer["classes"]]
        np.testing.assert_allclose([entry["score"] for entry in answer["classes"]], row[places], rtol=1e-5)
        np.testing.assert_allclose(answer["residual"], residual, rtol=1e-2, atol=1e-6)


def test_predictions_as_text(trained, invoke, tmp_path):
    path, data = trained("--loss", "squared_error")
    save_pictures(tmp_path / "photos", data.test.images[:2])
    first = tmp_path / "photos" / "00.png"
    code, out, err = invoke("predict", path, first, "--top", 2, "--tolerance", 1e-9, "--free-steps", 5)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith(f"{first}  ")
    assert out.rstrip().endswith(" (not settled)")
    assert "%" not in out, "states of an output layer are no probabilities"
    assert "settled" not in invoke("predict", path, first)[1]


def test_unreadable_pictures_are_named_and_the_others_answered(trained, invoke, tmp_path):
    path, data = trained()
    save_pictures(tmp_path / "photos", data.test.images)
    (tmp_path / "photos" / "03.png").write_bytes(b"no picture")
    code, out, err = invoke("predict", path, tmp_path / "photos", "--top", 1)
    assert (code, err) == (1, "Error: 1 of 10 pictures could not be classified; see above\n")
    assert out.count("\n") == 10
    assert f"{tmp_path / 'photos' / '03.png'}: is not a readable picture" in out.splitlines()[3]
    code, out, _ = invoke("predict", path, tmp_path / "photos", "--json")
    assert json.loads(out.splitlines()[3])["error"].startswith(str(tmp_path / "photos" / "03.png"))


def test_predictions_are_written_to_a_file(trained, invoke, tmp_path):
    """As to the other commands' --json; what follows the option may be a picture, which is not written over."""
    path, data = trained()
    save_pictures(tmp_path / "photos", data.test.images[:3])
    pictures = sorted((tmp_path / "photos").iterdir())
    _, objects, _ = invoke("predict", path, tmp_path / "photos", "--json")
    _, lines, _ = invoke("predict", path, tmp_path / "photos")
    for name in ("p.json", "p.jsonl"):
        code, out, err = invoke("predict", path, *pictures, "--json", tmp_path / name)
        assert (code, out, err) == (0, f"{lines}written to {tmp_path / name}\n", "")
        assert (tmp_path / name).read_text() == objects
    content = pictures[0].read_bytes()
    for words, message in [
        (["--json", *pictures], f"--json: a file to write ends in .json or .jsonl (got '{pictures[0]}')"),
        (["photos", "--json", tmp_path / "none" / "p.json"], f"--json: there is no folder '{tmp_path / 'none'}'"),
    ]:
        code, out, err = invoke("predict", path, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert pictures[0].read_bytes() == content


def test_a_network_that_grows_without_bounds_gives_no_answer_and_valid_json(trained, invoke, tmp_path):
    path, data = trained("--activation", "relu", "--feedback", "1", "--gain", "3")
    save_pictures(tmp_path / "photos", data.test.images[:2])
    code, out, err = invoke("predict", path, tmp_path / "photos", "--free-steps", 1000, "--json")
    assert (code, err) == (1, "Error: 2 of 2 pictures could not be classified; see above\n")
    for line in out.splitlines():
        answer = json.loads(line, parse_constant=pytest.fail)
        assert answer["error"] == f"{answer['file']}: the network does not settle on it, its states grow without " + (
            "bounds; lower --free-steps"
        )


# --- export --------------------------------------------------------------------------------------------------------


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "options",
    [(), ("--feedback", "1", "--schedule", "evenodd"), ("--algorithm", "bp"), ("--loss", "squared_error"),
     ("--algorithm", "bptt", "--feedback", "0.5", "--free-steps", "1", "--nudged-steps", "3", "--pooling", "average"),
     ("--pooling", "average", "--schedule", "synchronous")],
)  # fmt: skip
def test_the_exported_graph_takes_pixels_and_gives_the_runs_scores(trained, invoke, tmp_path, options):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    path, data = trained(*options)
    _, scores = scores_of(path, data)
    code, out, err = invoke("export", path, "--format", "onnx", "--output", tmp_path / "net.onnx")
    assert (code, err) == (0, "")
    assert "pixels in [0, 1]; they are normalised in the graph" in out
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    pixels = planes(data.test.images).astype(np.float32) / 255
    np.testing.assert_allclose(session.run(None, {"images": pixels})[0], scores, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(data.classes)


def test_steps_of_the_graph_and_the_note_about_a_tolerance(trained, invoke, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    path, data = trained("--tolerance", "0.5")
    out = invoke("export", path, "--format", "onnx", "--output", tmp_path / "net.onnx", "--steps", 3)[1]
    assert "free phase of 3 steps" in out
    assert "note: the run ends its phases at the tolerance 0.5; the graph does all its steps" in out
    run = load_trained(path)
    batch = next(iter(ep.Loader(data, "test", 10, "cpu", np.float32)))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    scores = session.run(None, {"images": planes(data.test.images).astype(np.float32) / 255})[0]
    wanted = run.network.scores(batch.images, steps=3, schedule=run.config.schedule, relaxation=1.0)
    np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_arrays_and_state_dict(trained, invoke, tmp_path):
    path, data = trained()
    code, out, err = invoke("export", path, "--format", "npz", "--output", tmp_path / "net.npz")
    assert (code, err) == (0, "")
    assert "(pixel / 255 - mean) / std with mean " in out
    with np.load(tmp_path / "net.npz") as file:  # without pickles, as by default
        arrays = dict(file)
    np.testing.assert_array_equal(arrays["mean"], data.mean)
    np.testing.assert_array_equal(arrays["std"], data.std)
    assert arrays["classes"].tolist() == list(data.classes)
    settings = json.loads(str(arrays["settings"]))
    assert (settings["arch"], settings["schedule"], settings["steps"], settings["feedback"]) == (
        "vgg5",
        "sweeps",
        4,
        0.01,
    )
    weights = {name: array for name, array in arrays.items() if name.startswith(("layers.", "readout."))}
    network = load_trained(path).network
    np.testing.assert_array_equal(weights["layers.2.weight"], network.layers[2].weight.transpose(3, 2, 0, 1))
    assert len(weights) == len(network.parameters())
    torch = pytest.importorskip("torch")
    assert invoke("export", path, "--format", "torch", "--output", tmp_path / "net.pt")[0] == 0
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), weights[name])


@pytest.mark.parametrize(
    ("form", "package"), [("npz", "numpy"), *[(name, name) for name in ("onnx", "safetensors", "torch")]]
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files")
def test_an_export_that_cannot_be_written_is_one_line(form, package, trained, invoke):
    pytest.importorskip(package)
    code, _, err = invoke("export", trained()[0], "--format", form, "--output", "/proc/net.file")
    assert (code, err.count("\n")) == (1, 1)
    assert "cannot write '/proc/net.file'" in err


def test_a_free_phase_in_pytorch_needs_nothing_but_the_export(trained, invoke, tmp_path):
    """Sweeps: the layers upwards with fresh drives, then downwards with fresh feedback, all from zeros."""
    torch = pytest.importorskip("torch")
    path, data = trained()
    _, scores = scores_of(path, data)
    assert invoke("export", path, "--format", "npz", "--output", tmp_path / "net.npz")[0] == 0
    file, functional = np.load(tmp_path / "net.npz"), torch.nn.functional
    p, settings = {name: torch.tensor(file[name]) for name in file if "." in name}, json.loads(str(file["settings"]))
    assert (settings["schedule"], settings["pooling"], settings["activation"]) == ("sweeps", "max", "hard_sigmoid")
    edges = settings["layers"]
    assert [edge["kind"] for edge in edges] == ["conv"] * 4
    shift, scale = (torch.tensor(file[name])[:, None, None] for name in ("mean", "std"))
    states = [(torch.tensor(planes(data.test.images)) / 255 - shift) / scale] + [None] * len(edges)
    drives, winners, sizes, feedback = {}, {}, {}, dict.fromkeys(range(1, len(edges) + 1), 0.0)
    for _ in range(settings["steps"]):
        for n, edge in enumerate(edges, 1):
            weight, bias = p[f"layers.{n - 1}.weight"], p[f"layers.{n - 1}.bias"]
            before = functional.conv2d(states[n - 1], weight, bias, edge["stride"], edge["padding"])
            sizes[n] = before.shape[2:]
            drives[n], winners[n] = functional.max_pool2d(before, edge["pool"], return_indices=True)
            states[n] = (drives[n] + settings["feedback"] * feedback[n]).clamp(0, 1)
        for n in range(len(edges), 0, -1):
            if n < len(edges):
                above, edge = n + 1, edges[n]
                spread = functional.max_unpool2d(states[above], winners[above], edge["pool"], output_size=sizes[above])
                feedback[n] = functional.conv_transpose2d(
                    spread, p[f"layers.{n}.weight"], None, edge["stride"], edge["padding"]
                )
            states[n] = (drives[n] + settings["feedback"] * feedback[n]).clamp(0, 1)
    found = states[-1].flatten(1) @ p["readout.weight"].T + p["readout.bias"]
    np.testing.assert_allclose(found.numpy(), scores, atol=1e-5)


def test_the_last_checkpoint_and_replaced_files(trained, invoke, tmp_path):
    path, _ = trained()
    (tmp_path / "net.npz").write_text("old")
    code, out, _ = invoke("export", path, "--format", "npz", "--output", tmp_path / "net.npz", "--checkpoint", "last")
    assert code == 0
    assert "epoch 1 (last)" in out
    assert np.load(tmp_path / "net.npz")["classes"].shape == (10,)


# --- wrong uses ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_describe_its_images_uses_the_data_set(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--epochs", 1, "--run-dir", path, "--quiet")[0] == 0
    with h5py.File(path / "best.h5", "r+") as file:
        file.attrs["images"] = "{}"  # as of a trainer that was given none
    hdf5.seal(path / "best.h5")
    data = ep.load_dataset("cifar10", cifar)
    run = load_trained(path)
    assert run.images.classes == data.classes
    np.testing.assert_array_equal(run.images.mean, data.mean)


@pytest.mark.parametrize(
    ("images", "message"),
    [({"classes": 10}, "does not describe its images"), ({"std": [0, 1, 1]}, "does not describe its images"),
     ({"image_shape": [32, 32]}, "does not describe"), ({"mean": [[1]]}, "does not describe")],
)  # fmt: skip
def test_damaged_descriptions_of_images(cifar, invoke, tmp_path, images, message):
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--epochs", 1, "--run-dir", path, "--quiet")[0] == 0
    with h5py.File(path / "best.h5", "r+") as file:
        whole = json.loads(file.attrs["images"])
        file.attrs["images"] = json.dumps(whole | images)
    hdf5.seal(path / "best.h5")
    code, _, err = invoke("export", path, "--format", "npz", "--output", tmp_path / "net.npz")
    assert (code, err.count("\n")) == (1, 1)
    assert message in err


WRONG = {
    "no run to export": (
        ["export", "none", "--format", "npz", "--output", "o.npz"],
        1,
        "'none' is not a run directory",
    ),
    "format misspelt": (["export", "run", "--format", "onx", "--output", "o"], 2, "did you mean 'onnx'?"),
    "no format": (["export", "run", "--output", "o"], 2, "Missing option '--format'"),
    "no output": (["export", "run", "--format", "npz"], 2, "Missing option '--output'"),
    "output nowhere": (["export", "run", "--format", "npz", "--output", "no/o.npz"], 2, "there is no folder 'no'"),
    "output a folder": (["export", "run", "--format", "npz", "--output", "."], 2, "'.' is a folder"),
    "steps of arrays": (
        ["export", "run", "--format", "npz", "--output", "o", "--steps", "2"],
        2,
        "--steps is for --format",
    ),
    "no steps": (["export", "run", "--format", "onnx", "--output", "o", "--steps", "0"], 2, "at least 1 (got 0)"),
    "checkpoint": (["export", "run", "--format", "npz", "--output", "o", "--checkpoint", "bst"], 2, "'best'?"),
    "no run to ask": (["predict", "none", "run/p.png"], 1, "'none' is not a run directory"),
    "no picture named": (["predict", "run"], 2, "Missing argument"),
    "no such picture": (["predict", "run", "gone.png"], 1, "there is no file or folder gone.png"),
    "empty folder": (["predict", "run", "."], 1, "no pictures in folder ."),
    "top 0": (["predict", "run", "run/p.png", "--top", "0"], 2, "--top must be from 1 to 10"),
    "top 11": (["predict", "run", "run/p.png", "--top", "11"], 2, "--top must be from 1 to 10"),
    "too many steps": (
        ["export", "run", "--format", "onnx", "--output", "x.onnx", "--steps", "100000000"],
        2,
        "a graph writes every step out: --steps must be from 1 to 5000 (got 100000000)",
    ),
    "no picture": (["predict", "run", "run/config.toml"], 1, "1 of 1 pictures could not be classified"),
    "free steps": (["predict", "run", "run/p.png", "--free-steps", "0"], 2, "--free-steps must be at least 1"),
}


def test_wrong_uses_are_one_line(trained, invoke, tmp_path, monkeypatch):
    path, data = trained()
    Image.fromarray(data.test.images[0]).save(path / "p.png")
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "run").symlink_to(path)
    monkeypatch.chdir(place)
    for case, (args, wanted, message) in WRONG.items():
        code, _, err = invoke(*args)
        assert (code, err.count("\n")) == (wanted, 1), case
        assert err.startswith("Error: "), case
        assert message in err, case
        assert [p.name for p in place.iterdir()] == ["run"], case


def test_missing_packages_are_named(trained, invoke, tmp_path, monkeypatch):
    path, data = trained()
    Image.fromarray(data.test.images[0]).save(tmp_path / "p.png")
    commands = {
        "torch": (["export", path, "--format", "torch", "--output", tmp_path / "o"], "or use --format npz"),
        "onnx": (["export", path, "--format", "onnx", "--output", tmp_path / "o"], 'pip install "cupyep[onnx]"'),
        "PIL": (["predict", path, tmp_path / "p.png"], 'pip install "cupyep[images]"'),
    }
    for package, (command, message) in commands.items():
        monkeypatch.setitem(sys.modules, package, None)
        code, _, err = invoke(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert not (tmp_path / "o").exists()


def test_files_of_a_folder_that_are_no_pictures_are_reported(trained, invoke, tmp_path):
    """As ``predict --help`` has it: the others are classified, the exit code is 1; hidden files are none of its own."""
    path, data = trained()
    save_pictures(tmp_path / "photos", data.test.images[:2])
    (tmp_path / "photos" / "notes.txt").write_text("a cat")
    (tmp_path / "photos" / ".hidden").write_text("a cat")
    code, out, err = invoke("predict", path, tmp_path / "photos", "--json")
    assert (code, err) == (1, "Error: 1 of 3 pictures could not be classified; see above\n")
    answers = {json.loads(line)["file"].rpartition("/")[2]: json.loads(line) for line in out.splitlines()}
    assert {name for name, answer in answers.items() if answer.get("error")} == {"notes.txt"}
    assert set(answers) == {"00.png", "01.png", "notes.txt"}
