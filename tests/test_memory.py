"""`cupyep memory` and `cupyep info --arch`. Oracle: sums by hand, and measurements of the same command."""

from __future__ import annotations

import json
import pickle

import pytest

import cupyep as ep
from cupyep.commands.memory import memory_report, planned_step
from cupyep.memory.plan import BlankDevice
from cupyep.training.config import make_config

SMALL = ("--arch", "vgg5", "--width", 0.2, "--image-size", 16, "--batch-size", 24, "--device", "cpu")


def test_memory_plans_and_measures(invoke, tmp_path):
    path = tmp_path / "memory.json"
    code, out, err = invoke("memory", *SMALL, "--steps", "2,5", "--measure", "--json", path)
    assert (code, err) == (0, "")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["device_kind"] == "cpu"
    assert content["options"]["width"] == 0.2
    steps = content["steps"]
    expected = [("ep", 2), ("ep", 5), ("bptt", 2), ("bptt", 5), ("bp", None)]
    assert [(step["algorithm"], step["steps"]) for step in steps] == expected
    for step in steps:
        assert step["planned_bytes"] == sum(step["planned"].values())
        assert step["measured_bytes"] == pytest.approx(step["planned_bytes"], rel=0.05)
        assert f"{step['measured_bytes'] / 1e6:.1f}" in out
    ep2, ep5, bptt2, bptt5, _ = (step["planned_bytes"] for step in steps)
    assert ep2 == ep5
    units = 8 * 8 * 26 + 4 * 4 * 51 + 2 * 2 * 102 + 102
    assert bptt5 - bptt2 == pytest.approx(3 * 24 * units * 9, abs=5000), "a state, a drive and a winner a unit and step"
    lines = out.splitlines()
    (total,) = (line.split()[1:] for line in lines if line.startswith("total"))
    assert total == [f"{n / 1e6:.1f}" for n in (ep2, bptt2, bptt5, steps[-1]["planned_bytes"])]
    (last,) = (line.split() for line in lines if line.startswith("BPTT, T = 5"))
    assert last[4:6] == [f"{bptt5 / 1e6:.1f}", f"{bptt5 / ep2:.2f}"]


def test_what_is_planned_needs_no_such_device(invoke):
    code, out, err = invoke("memory", "--arch", "vgg12", "--steps", 250, "--device-kind", "gpu", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "vgg12, width 1, batch 128, float32, sweeps, adam, GPU" in out
    assert "measured" not in out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("EP, T = 250"))
    assert float(row[4]) <= 1431
    (row,) = (line.split() for line in out.splitlines() if line.startswith("BPTT, T = 250"))
    assert float(row[5]) >= 18.1


def test_options_count(invoke):
    """Signals, optimizer, micro-batches and precision are part of the plan."""
    blank = BlankDevice("gpu")

    def total(**options):
        parts = planned_step(make_config({"batch_size": 64, "width": 0.25, "device": "cpu", **options}), blank)
        return parts, sum(parts.values())

    parts, plain = total()
    for kind, more in (("le", "maps of signals"), ("kd", "parameters")):
        with_signals, _ = total(aug=kind)
        units = 32 * 16 * 16 + 64 * 8 * 8 + 128 * 4 * 4 + 128
        assert with_signals[more] - parts.get(more, 0) == 4 * 10 * units
    momentum, none = (total(optimizer="sgd", momentum=m)[0].get("optimizer", 0) for m in (0.9, 0.0))
    assert momentum - none == parts["parameters"]
    assert parts["optimizer"] - momentum == parts["parameters"]
    assert total(micro_batch=16)[1] < plain
    assert total(precision="float16")[0]["deviations"] == parts["deviations"] / 2


def test_info_of_a_network(invoke):
    code, out, err = invoke("info", *SMALL, "--device-kind", "gpu")
    assert (code, err) == (0, "")
    weights = 9 * (3 * 26 + 26 * 51 + 51 * 102 + 102 * 102) + 102 * 10 + 26 + 51 + 102 + 102 + 10
    assert f"parameters     {weights}\n" in out
    assert "2: Conv2d((8, 8, 26) -> (4, 4, 51), kernel 3, stride 1, padding 1, max pool 2)" in out
    products = 24 * 2 * 9 * 2 * (8 * 8 * 26 * 51 + 4 * 4 * 51 * 102 + 2 * 2 * 102 * 102)
    assert f"{products / 1e9:.2f} GFLOP an iteration for 24 images" in out
    assert "a step of EP, batch 24, adam, planned for a GPU" in out
    bptt = invoke("info", *SMALL, "--algorithm", "bptt", "--micro-batch", 8)[1]
    assert "a step of BPTT, batch 24 in parts of 8, adam, planned for a CPU" in bptt
    assert "history" in bptt


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("memory", "--steps", "0"), "--steps must be up to 20 integers from 1 to 10000"),
        (("memory", "--steps", "2.5"), "--steps must be up to 20 integers from 1 to 10000"),
        (("memory", "--steps", "10,x"), "Invalid value for '--steps'"),
        (("memory", "--steps", "inf"), "--steps must be up to 20 integers from 1 to 10000"),
        (("memory", "--steps", "10,nan"), "--steps must be up to 20 integers from 1 to 10000"),
        (("memory", "--device-kind", "tpu"), "unknown --device-kind 'tpu'; did you mean 'gpu'? (choose from cpu, gpu)"),
        (("memory", "--device-kind", "gpu", "--measure", "--device", "cpu"), "--measure needs the device itself"),
        (("memory", "--json", "none/there.json"), "--json: there is no folder 'none'"),
        (("memory", "--batch-size", "70000"), "a plan is of at most 65536 images, not 70000"),
        (("memory", "--width", "1e300"), "width must be above 0 and below 1e+06"),
        (("memory", "--image-size", "33"), "image-size is 33"),
        (("memory", "--signal-layers", "2"), "--signal-layers needs --aug le or kd"),
        (("info", "--arch", "vgg5", "--data-dir", "."), "--data-dir says nothing of a network"),
        (("info", "--arch", "vgg8"), "unknown --arch 'vgg8'"),
    ],
)
def test_wrong_usage_is_one_line(invoke, words, message):
    code, out, err = invoke(*words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_scratch_is_a_setting_of_the_machine():
    """It is planned for, kept by a device that is pickled, and refused where it is none."""
    device = ep.get_device("cpu", 2.5)
    assert device.scratch_bytes == pickle.loads(pickle.dumps(device)).scratch_bytes == 2_500_000
    assert ep.get_device("cpu").scratch_bytes == 8 << 20
    options = {"arch": "vgg5", "width": 0.2, "device": "cpu"}
    found = []
    for mb in (None, 5):
        report = memory_report(make_config({**options, "scratch_mb": mb}), [2], "gpu")
        found.append(report.rows[0].planned["scratch of products"])
    assert found[1] <= 5.1e6 < found[0]
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ep.ConfigurationError, match="scratch_mb must be above 0"):
            ep.get_device("cpu", wrong)
    with pytest.raises(ep.ConfigurationError, match="a Device has its own"):
        ep.get_device(device, 5)
