"""Training from weights in a file. Oracle: the scores of the network that the file was written of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quadrants import SILENT, TINY, quadrant_data, run

import cupyep as ep
from cupyep.commands.export import export_run
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.export import load_torch_layout, torch_layout
from cupyep.persistence import load_checkpoint
from cupyep.training import runs
from cupyep.training.build import build_network
from cupyep.training.config import TrainConfig, make_config, require_used
from cupyep.training.initial import load_initial
from cupyep.training.trained import as_settled, load_trained

KINDS = {
    "chain": {"arch": "vgg5"},
    "dense": {"arch": "mlp:7,6"},
    "squared error": {"arch": "vgg5", "loss": "squared_error"},
    "residual, standardized": {"arch": "resnet9", "width": 0.06},
    "pooled readout": {"arch": "8 8p", "readout_pool": 2},
    "fixed gains": {"arch": "vgg5", "weights": "standardized-fixed"},
}


def make(values, seed=0, shape=(16, 16, 3)):
    how = {"width": 0.05, "classes": 3, "input_shape": shape, "device": "cpu", "feedback": 1.0} | values
    net = ep.build(**how, seed=seed)
    rng = np.random.default_rng([seed, 1])
    for path, p in net.parameters().items():
        if path.endswith((".bias", ".gain")):
            p += 0.1 * rng.standard_normal(p.shape).astype(p.dtype)
    return net


def scores(net):
    images = np.random.default_rng(4).standard_normal((5, *net.input_shape))
    return net.scores(images, steps=3, schedule="sweeps")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["npz", "safetensors", "h5"])
def test_the_way_there_and_back(kind, form, tmp_path):
    """Into a network that was drawn otherwise; through PyTorch's layout weights become those of any parametrisation."""
    one, other = make(KINDS[kind]), make(KINDS[kind], seed=7)
    path = tmp_path / f"net.{form}"
    if form == "h5":
        one.save(path)
    elif form == "npz":
        np.savez(path, **torch_layout(one), mean=np.zeros(3), settings=np.array("{}"))
    else:
        pytest.importorskip("safetensors.numpy").save_file(torch_layout(one), path)
    assert np.abs(scores(other) - scores(one)).max() > 0.01
    load_initial(other, path)
    np.testing.assert_allclose(scores(other), scores(one), rtol=1e-4, atol=1e-5)
    for edge, wanted in zip(other.layers, one.layers, strict=True):
        if edge.parameters():
            np.testing.assert_allclose(edge.weight, wanted.weight, rtol=1e-4, atol=1e-6)


def test_standardized_weights_become_plain_and_plain_ones_not_standardized(tmp_path):
    plain, standardized = make({"arch": "vgg5"}), make({"arch": "vgg5", "weights": "standardized"}, seed=3)
    standardized.make_weights()
    weights = [edge.weight.copy() for edge in standardized.layers]
    with pytest.raises(ConfigurationError, match="layers.0.weight: filters of standardized weights have mean 0"):
        load_torch_layout(standardized, torch_layout(plain))
    load_torch_layout(plain, torch_layout(standardized))
    for edge, weight in zip(plain.layers, weights, strict=True):
        np.testing.assert_array_equal(edge.weight, weight)
    with pytest.raises(ConfigurationError, match="use weights standardized"):
        load_torch_layout(make({"arch": "vgg5", "weights": "standardized-fixed"}), torch_layout(standardized))


def test_a_standardized_filter_is_as_long_as_a_drawn_one():
    """v would train at another speed else: its gradient goes with 1 / std(v)."""
    one, other = (make({"arch": "vgg5", "weights": "standardized"}, seed=seed) for seed in (1, 2))
    load_torch_layout(other, torch_layout(one))
    v = other.parameters()["layers.2.weight"]
    np.testing.assert_allclose(v.reshape(-1, v.shape[-1]).std(axis=0), np.prod(v.shape[:-1]) ** -0.5, rtol=1e-5)


@pytest.mark.parametrize("form", ["npz", "safetensors", "checkpoint", "averaged"])
def test_a_run_begins_where_another_ended(form, quadrants, tmp_path):
    if form == "safetensors":
        pytest.importorskip("safetensors")
    first = run({"epochs": 1, "ema": 0.5 if form == "averaged" else None}, tmp_path / "first")
    first.run()
    path = tmp_path / "first" / "best.h5"
    if form in ("npz", "safetensors"):
        path = tmp_path / f"net.{form}"
        export_run(tmp_path / "first", form, path)
    used = load_trained(tmp_path / "first", "best").network
    second = run({"epochs": 1, "init_from": str(path), "feedback": 0.2}, tmp_path / "second")
    for name, p in used.parameters().items():
        np.testing.assert_allclose(second.network.parameters()[name], p, rtol=1e-6, atol=1e-9, err_msg=name)
    path.unlink()  # a run that has begun needs it no more
    second.run()
    longer = runs.resume_run(tmp_path / "second", {"epochs": 2}, display=SILENT, stretch=True)
    assert longer.run().epoch == 2


@pytest.mark.parametrize(
    ("of", "into", "message"),
    [
        ({}, {"weights": "standardized-fixed"}, "its weights are plain, those of this network standardized-fixed"),
        ({"weights": "standardized-fixed"}, {}, "its weights are standardized-fixed, those of this network plain"),
        (
            {"weights": "standardized-fixed", "gain": 0.5},
            {"weights": "standardized-fixed"},
            r"its gains are fixed at \[0.5, .*those of this network at \[0.6, ",
        ),
    ],
)
def test_parameters_of_other_weights_are_refused(of, into, message, tmp_path):
    """They have the same names and shapes, and would make another network."""
    make({"arch": "8 8p"} | of).save(tmp_path / "net.h5")
    with pytest.raises(ConfigurationError, match=f"{message}.*export --format npz"):
        load_initial(make({"arch": "8 8p"} | into), tmp_path / "net.h5")


def test_a_fixed_gain_is_that_of_the_feedback_that_a_run_began_with(quadrants, tmp_path):
    """A run may lower its feedback, and the default gain goes by it."""
    first = run({"epochs": 1, "weights": "standardized-fixed", "feedback": 0.55}, tmp_path / "run")
    first.run()
    saved = replace(load_checkpoint(tmp_path / "run" / "best.h5"), settling={"feedback": 0.2})
    lowered = build_network(as_settled(make_config(saved.config), saved, {}), quadrant_data(), "cpu")
    assert lowered.feedback == 0.2
    assert lowered.describe()["gains"] == first.network.describe()["gains"]


def test_what_is_refused(tmp_path):
    net = make({"arch": "vgg5"})
    for name in ("net.pt", "net.pth"):
        with pytest.raises(ConfigurationError, match="can run code; write it anew, by safetensors.torch.save_file"):
            load_initial(net, tmp_path / name)
    with pytest.raises(ConfigurationError, match=r"is none of \.h5, \.npz, \.safetensors$"):
        load_initial(net, tmp_path / "net.txt")
    for name in ("net.h5", "net.npz"):
        with pytest.raises(CheckpointError, match="cannot read '.*net.*: No such file"):
            load_initial(net, tmp_path / name)
        (tmp_path / name).write_bytes(b"PK\x03\x04 not what it says")
        with pytest.raises(CheckpointError, match="is not (a )?readable"):
            load_initial(net, tmp_path / name)
    arrays = torch_layout(net)
    before = {path: p.copy() for path, p in net.parameters().items()}
    cases = {
        r"missing \['readout.bias'\], unknown \[\]": {k: a for k, a in arrays.items() if k != "readout.bias"},
        r"readout.weight has shape \(4, .*that of this network \(3,": {**arrays, "readout.weight": np.zeros((4, 26))},
        "is no array of finite numbers": {**arrays, "readout.bias": np.full(3, np.inf)},
    }
    for message, wrong in cases.items():
        np.savez(tmp_path / "net.npz", **wrong)
        with pytest.raises((CheckpointError, ConfigurationError), match=message):
            load_initial(net, tmp_path / "net.npz")
    np.savez(tmp_path / "net.npz", **arrays | {"readout.bias": np.array([None] * 3)})  # a pickle
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load_initial(net, tmp_path / "net.npz")
    for path, p in net.parameters().items():
        np.testing.assert_array_equal(p, before[path])


def test_what_draws_weights_needs_drawn_ones():
    values = {**TINY, "init_from": "net.npz"}
    for given in ({"gain": 0.5}, {"lsuv": True}):
        with pytest.raises(ConfigurationError, match="needs no --init-from"):
            require_used(given, vars(make_config(values, given)))
    assert TrainConfig(init_from="net.npz").to_toml().count('init_from = "net.npz"') == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_npz_is_one_line(tmp_path, compressed):
    """Whatever byte is another one."""
    net, path = make({"arch": "8 8p"}), tmp_path / "net.npz"
    (np.savez_compressed if compressed else np.savez)(path, **torch_layout(net))
    content, generator = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        wrong = bytearray(content)
        wrong[generator.integers(len(wrong))] ^= int(generator.integers(1, 256))
        path.write_bytes(wrong)
        try:
            load_initial(net, path)
        except (CheckpointError, ConfigurationError):
            refused += 1
    assert refused > 30
