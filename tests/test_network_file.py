"""Networks saved and loaded. Oracle: the network that was saved; files damaged by hand are refused, in one line."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

import cupyep as ep
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.persistence import hdf5
from cupyep.persistence.network_file import difference


def make_network(**options):
    first = ep.Conv2d((9, 7, 3), 5, kernel=3, stride=2, padding=1, pooling="average")
    second = ep.Conv2d(first.out_shape, 4, kernel=2, padding=0, pooling="none")
    layers = [first, second, ep.Linear(second.out_shape, 6), ep.Linear((6,), 3)]
    net = ep.Network(layers, 3, **{"feedback": 0.3, "seed": 5, "device": "cpu", **options})
    for n, array in enumerate(net.parameters().values()):
        array += 0.01 * n  # biases that are not zero
    return net


IMAGES = np.random.default_rng(0).standard_normal((4, 9, 7, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "squared_error", "activation": "tanh"},
        {"precision": "float64"},
        {"activation": "half_hard_sigmoid"},
    ],
)
def test_a_loaded_network_is_the_saved_one(tmp_path, options):
    net = make_network(**options)
    net.save(tmp_path / "net.h5")
    loaded = ep.Network.load(tmp_path / "net.h5", device="cpu")
    assert repr(loaded) == repr(net)
    assert loaded.parameters().keys() == net.parameters().keys()
    for path, array in net.parameters().items():
        np.testing.assert_array_equal(loaded.parameters()[path], array, err_msg=path)
        assert loaded.parameters()[path].dtype == array.dtype
    np.testing.assert_array_equal(
        loaded.scores(IMAGES, steps=9, schedule="synchronous"), net.scores(IMAGES, steps=9, schedule="synchronous")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["net.h5"]


ARGUMENTS = {"classes": 3, "input_shape": (4, 4, 1), "width": 0.5, "feedback": 0.5, "seed": 2, "readout_pool": 2}


@pytest.mark.parametrize("gain", [0.5, (0.5, 0.75)])
def test_arguments_may_be_numbers_of_numpy(tmp_path, gain):
    """As `labels.max() + 1` is: the file is the one that the same numbers of Python make."""
    files = []
    for name, kind in {"own": lambda value: value, "numpy": lambda value: np.array(value)[()]}.items():
        net = ep.build("4p 4", **{key: kind(value) for key, value in ARGUMENTS.items()}, gain=kind(gain), device="cpu")
        net.save(tmp_path / name)
        with h5py.File(tmp_path / name) as file:
            files.append(json.loads(file.attrs["network"]))
        np.testing.assert_array_equal(
            ep.Network.load(tmp_path / name, "cpu").scores(np.ones((2, 4, 4, 1))), net.scores(np.ones((2, 4, 4, 1)))
        )
    assert files[0] == files[1]


@pytest.mark.parametrize("gain", [None, [0.4, 0.7]])
def test_fixed_gains_are_saved_with_it(tmp_path, gain):
    """They are no parameters, and scores depend on them."""
    net = ep.build("8p 8", input_shape=(8, 8, 1), weights="standardized-fixed", feedback=0.5, gain=gain, device="cpu")
    net.save(tmp_path / "net.h5")
    loaded = ep.Network.load(tmp_path / "net.h5", device="cpu")
    assert loaded.describe()["gains"] == net.describe()["gains"] == (gain or [0.6, 0.6])
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1))
    np.testing.assert_array_equal(loaded.scores(images), net.scores(images))


def test_how_a_network_settles_is_saved_with_it(tmp_path):
    net = make_network()
    net.settling = {"steps": 5, "schedule": "evenodd", "relaxation": 1.3}
    net.save(tmp_path / "net.h5")
    loaded = ep.Network.load(tmp_path / "net.h5", device="cpu")
    assert loaded.settling == net.settling
    same = {"steps": 5, "schedule": "evenodd", "relaxation": 1.3}
    np.testing.assert_array_equal(loaded.scores(IMAGES), net.scores(IMAGES, **same))


def test_built_networks_keep_their_configuration(tmp_path):
    net = ep.vgg(5, width=0.05, input_shape=(16, 16, 1), pooling="average", device="cpu", feedback=1.0)
    net.save(tmp_path / "net.h5")
    loaded = ep.Network.load(str(tmp_path / "net.h5"))
    assert json.loads(json.dumps(loaded.config)) == json.loads(json.dumps(net.config))
    with hdf5.open_file(tmp_path / "net.h5") as file:
        assert (file.attrs["format"], file.attrs["version"], file.attrs["cupyep"]) == (
            "cupyep-network",
            1,
            ep.__version__,
        )
        assert set(file["parameters"]) == set(net.parameters())


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    class Halved(ep.Linear):
        pass

    path = tmp_path / "net.h5"
    own = [
        ep.Network([Halved((4,), 3)], 2, device="cpu", feedback=1.0),
        "layer 1 is a Halved, which a file cannot hold; keep the",
    ]
    other = [
        ep.Network([ep.Linear((4,), 3)], 2, activation=ep.Clip("relu", 1, 0, 9), device="cpu", feedback=1.0),
        "activation 'relu'",
    ]
    for net, message in (own, other):
        with pytest.raises(ConfigurationError, match=message):
            net.save(path)
    with pytest.raises(CheckpointError, match="cannot write network '.*no/net.h5': No such file"):
        make_network().save(tmp_path / "no" / "net.h5")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    make_network().save(tmp_path / "net.h5")
    before = (tmp_path / "net.h5").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cupyep.files.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        make_network(seed=1).save(tmp_path / "net.h5")
    assert (tmp_path / "net.h5").read_bytes() == before


def edited(change):
    """Return a function that changes the JSON of a file."""

    def damage(file):
        structure = json.loads(file.attrs["network"])
        change(structure)
        file.attrs["network"] = json.dumps(structure)

    return damage


def set_attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def replace(name, value):
    def damage(file):
        del file[f"parameters/{name}"]
        file[f"parameters/{name}"] = value

    return damage


DAMAGE = {
    "version": (set_attribute("version", 99), "has version 99; this cupyep reads version 1"),
    "format": (
        set_attribute("format", "cupyep-checkpoint"),
        r"not a cupyep network \(it is cupyep-checkpoint\)",
    ),
    "no format": (lambda file: file.attrs.__delitem__("format"), "not a cupyep network"),
    "no JSON": (set_attribute("network", "{"), "not a readable network"),
    "a list": (set_attribute("network", "[]"), "not a readable network"),
    "no options": (edited(lambda s: s.pop("options")), "not a readable network"),
    "unknown layer": (edited(lambda s: s["layers"][0].update(type="Eval")), "not a readable network"),
    "text for a number": (edited(lambda s: s["layers"][0].update(channels="5")), "not a readable network"),
    "huge layer": (
        edited(lambda s: s["layers"][-1].update(units=10**12)),
        "should be numbers of shape",
    ),
    "huge readout": (edited(lambda s: s["options"].update(classes=10**12)), "should be numbers of shape"),
    "unknown activation": (edited(lambda s: s["options"].update(activation="swish")), "does not fit together: unknown"),
    "unknown loss": (edited(lambda s: s["options"].update(loss="hinge")), "does not fit together: unknown"),
    "feedback": (edited(lambda s: s["options"].update(feedback=2)), "does not fit together: feedback"),
    "feedback text": (edited(lambda s: s["options"].update(feedback="x")), "does not fit together: feedback"),
    "settling": (edited(lambda s: s["settling"].update(steps=0)), "does not fit together: steps"),
    "unknown settling": (edited(lambda s: s["settling"].update(beta=1)), "does not fit together: unknown settling"),
    "settling text": (edited(lambda s: s.update(settling="x")), "does not fit together: settling"),
    "layers that do not fit": (
        edited(lambda s: s["layers"][3].update(in_shape=[3, 2])),
        "does not fit together: layer 4",
    ),
    "no layers": (edited(lambda s: s["layers"].clear()), "does not fit together: a network needs at least one"),
    "missing array": (lambda file: file.__delitem__("parameters/layers.2.bias"), "parameter 'layers.2.bias' should be"),
    "wrong shape": (replace("layers.2.bias", np.zeros(5)), r"shape \(4,\), it is float64 \(5,\)"),
    "integers": (replace("layers.2.bias", np.zeros(4, int)), r"it is int64 \(4,\)"),
    "not finite": (replace("layers.2.bias", np.array([0, 1, np.nan, 2])), "not finite"),
    "elsewhere": (replace("layers.2.bias", h5py.ExternalLink("other.h5", "/x")), "it is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_in_one_line(case, tmp_path):
    damage, message = DAMAGE[case]
    path = tmp_path / "net.h5"
    make_network().save(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    hdf5.seal(path)
    with pytest.raises(CheckpointError, match=message) as error:
        ep.Network.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "net.h5"
    make_network().save(path)
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            ep.Network.load(path)
    np.savez(tmp_path / "net.npz", x=np.zeros(3))
    with pytest.raises(CheckpointError, match="not a readable network"):
        ep.Network.load(tmp_path / "net.npz")
    with pytest.raises(CheckpointError, match="no network at"):
        ep.Network.load(tmp_path / "gone.h5")
    make_network().save(path)
    with pytest.raises(ConfigurationError, match="unknown device 'gpu'"):
        ep.Network.load(path, device="gpu")


def test_descriptions_with_nothing_in_a_list():
    """As that of a layer of the user's own may have it."""
    assert difference({"layers": [{"tags": []}]}, {"layers": [{"tags": []}]}) == ""
    assert difference({"tags": ["a"]}, {"tags": []}) == "tags: saved ['a'], this network []"
