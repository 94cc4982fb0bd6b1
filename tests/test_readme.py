"""What README.md promises: its Python blocks run, in order; its markers feed the gate; its own layer is a true edge."""

import re
from pathlib import Path

import numpy as np
import pytest

import cupyep as ep

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """Everything that the Python blocks of the README define, run one after the other as a reader would."""
    pytest.importorskip("sklearn")
    space = {"__name__": "readme"}
    assert len(blocks("python")) == 3
    for number, block in enumerate(blocks("python")):
        exec(compile(block, "README.md", "exec"), space)
        if number == 0:
            space["learned"] = space["net"]
    return space


def test_class_api_learns(names):
    data, trained = names["data"], names["learned"]
    fresh = ep.vgg(7, classes=10, input_shape=data.image_shape, width=0.125, feedback=0.1, seed=0, device="cpu")
    test = next(iter(ep.Loader(data, "test", 360, fresh.device, fresh.dtype)))
    before, after = (
        (net.predict(test.images, steps=2, schedule="sweeps") == test.labels).mean() for net in (fresh, trained)
    )
    assert before < 0.3 < after


def test_own_signal_and_own_layer(names):
    net = names["net"]
    rng = np.random.default_rng(0)
    edge, s = net.layers[1], rng.standard_normal((2, 4, 4, 16)).astype(np.float32)
    out, back = np.empty((2, 20), np.float32), np.empty_like(s)
    ops = net.workspace(2).ops[1]
    edge.drive(s, out, None, ops)
    np.testing.assert_allclose(out, 0.5 * s.reshape(2, -1) @ edge.weight + edge.bias, rtol=1e-4, atol=1e-5)
    t = rng.standard_normal((2, 20)).astype(np.float32)
    edge.topdown(t, None, back, ops)
    np.testing.assert_allclose((back * s).sum(), (t * (out - edge.bias)).sum(), rtol=1e-4)
    x, y = rng.random((4, 8, 8, 1)), np.arange(4)
    rows = ep.check_gradients(net, x, y, beta=0.01, free_steps=60, nudged_steps=40)
    assert all(row["cosine"] > 0.99 for row in rows)
    result = ep.EquilibriumPropagation(
        net, signals=[names["Sparsity"](layers=[1, 2], kappa=0.1, annealing="constant")]
    ).step(x, y)
    plain = ep.EquilibriumPropagation(net).step(x, y)
    assert not np.allclose(result.gradients["layers.1.weight"], plain.gradients["layers.1.weight"], rtol=1e-3)


@pytest.mark.parametrize("marker", ["install", "tests", "first-run"])
def test_the_gate_finds_its_commands(marker):
    found = re.findall(rf"<!-- ci: {marker} -->\n```sh\n(.+)\n```", README)
    assert len(found) == 1
    assert found[0].startswith(("python3 -m venv", ".venv/bin/python -m pytest"))
