"""Runs in a precision, on tiny CIFAR-10 files. Oracle: the undisturbed run, bit for bit; what float32 leaves behind."""

import json

import h5py
import numpy as np
import pytest

TINY = ["--width", "0.02", "--free-steps", "4", "--nudged-steps", "3", "--batch-size", "25", "--device", "cpu"]
NARROW = ["tf32", "float16", "bfloat16"]


@pytest.fixture(autouse=True)
def ml_dtypes():
    """Bfloat16 needs it."""
    return pytest.importorskip("ml_dtypes")


def arrays_of(path):
    """Return every array of an HDF5 file by its place."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", NARROW)
def test_resumed_as_undisturbed_with_masters_in_float32(cifar, invoke, tmp_path, precision):
    how = ["--feedback", 0.03, "--beta", 0.5, "--lr-schedule", "constant"]
    options = [*TINY, "--precision", precision, *how, "--quiet"]
    assert invoke("train", *options, "--epochs", 2, "--run-dir", tmp_path / "straight")[::2] == (0, "")
    assert f'precision = "{precision}"' in (tmp_path / "straight" / "config.toml").read_text()
    assert invoke("train", *options, "--epochs", 1, "--run-dir", tmp_path / "resumed")[0] == 0
    assert invoke("train", "--run-dir", tmp_path / "resumed", "--resume", "--epochs", 2, "--quiet")[0] == 0
    straight, resumed = (arrays_of(tmp_path / name / "checkpoint.h5") for name in ("straight", "resumed"))
    weights = [name for name in straight if name.endswith("weight")]
    assert len(weights) == 3 * 5, "parameters and the two memories of Adam"
    for name in weights:
        assert straight[name].dtype == np.float32
        np.testing.assert_array_equal(resumed[name], straight[name])
    parameters = np.concatenate([straight[name].ravel() for name in weights])
    assert (parameters.astype(np.float16).astype(np.float32) != parameters).mean() > 0.9, "not rounded to halves"
    last = metrics_of(tmp_path / "straight")[-1]
    code, out, _ = invoke("evaluate", tmp_path / "straight", "--checkpoint", "last")
    assert code == 0
    assert f"test accuracy {last['test_accuracy']:.2%}, loss {last['test_loss']:.4f}" in out
    code, _, err = invoke("train", "--run-dir", tmp_path / "straight", "--resume", "--precision", "float32")
    assert code == 2
    assert f"--precision float32 is not the run's {precision}" in err


def test_teacher_and_metrics_are_those_of_float32(cifar, cache, invoke, tmp_path):
    """The teacher of a run in halves is trained in float32, whoever asks first."""
    options = [*TINY, "--aug", "kd", "--teacher-epochs", 1, "--epochs", 1, "--limit-train", 25, "--quiet"]
    teachers, metrics = [], []
    for precision in ("float16", "float32"):
        run = tmp_path / precision
        assert invoke("train", *options, "--precision", precision, "--run-dir", run)[::2] == (0, "")
        (path,) = (cache / "teachers").iterdir()
        teachers.append(arrays_of(path))
        path.unlink()
        metrics.append(metrics_of(run)[0])
    assert len(teachers[0]) >= 4
    for name, array in teachers[0].items():
        np.testing.assert_array_equal(array, teachers[1][name], err_msg=name)
    assert metrics[0].keys() == metrics[1].keys()
    for name in ("train_loss", "activity", "nudge_response", "gradient_norm"):
        np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=0.05, err_msg=name)


@pytest.mark.filterwarnings("default::cupyep.errors.PrecisionWarning")
def test_check_tells_what_halves_cost_and_warns(cifar, invoke, tmp_path):
    path = tmp_path / "check.json"
    options = ["--width", 0.05, "--batch-size", 4, "--precision", "float16", "--feedback", 0.1, "--beta", "0.5,0.01"]
    code, out, err = invoke("check", *options, "--json", path)
    assert code == 0
    assert err.count("Warning: precision float16 with nudge 'classical'") == err.count("Warning") == 1
    assert out.count("to float32") == 4
    strong, weak = json.loads(path.read_text())["betas"]
    for part in (strong, weak):
        assert min(row["cosine_float32"] for row in part["forms"]["deviation"]) > 0.98
    assert min(row["cosine"] for row in weak["forms"]["deviation"]) > 0.98
    assert weak["forms"]["classical"][0]["cosine"] < 0.5
