"""Optimizers and schedules. Oracle: scalar recurrences in plain Python floats, closed forms and hand values."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from cupyep import optim
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.ops import optimizer as ops
from cupyep.optim import LR_SCHEDULES, OPTIMIZERS, SGD, Adam, AdamW

START = {"layers.1.weight": [[1.0, -2.0], [0.5, 3.0]], "layers.1.bias": [0.25, -0.75]}
FALL = 0.8  # of the learning rate, each step
GRADIENTS = [0.3, -0.7, 1.1, 0.2, -0.4]  # times (1 + index of the element): every element has its own sequence


def make_parameters(dtype=np.float64):
    return {path: np.array(value, dtype=dtype) for path, value in START.items()}


def gradient_sequence(parameters):
    for scale in GRADIENTS:
        yield {
            path: (scale * (1 + np.arange(p.size, dtype=np.float64).reshape(p.shape))).astype(p.dtype)
            for path, p in parameters.items()
        }


def run(optimizer):
    """Under a schedule: its factor changes from step to step."""
    for n, gradients in enumerate(gradient_sequence(optimizer.parameters)):
        optimizer.step(gradients, FALL**n)


def scalar_sgd(p, scale, rate, momentum, nesterov, decay):
    v = 0.0
    for g0 in GRADIENTS:
        g = g0 * scale + decay * p
        v = momentum * v + g
        p = p - rate * ((g + momentum * v) if nesterov else v)
        rate *= FALL
    return p


def scalar_adam(p, scale, rate, b1, b2, epsilon, decay):
    m = v = 0.0
    for t, g0 in enumerate(GRADIENTS, start=1):
        g = g0 * scale + decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + epsilon)
        rate *= FALL
    return p


def scalar_adamw(p, scale, rate, b1, b2, epsilon, decay):
    m = v = 0.0
    for t, g0 in enumerate(GRADIENTS, start=1):
        g = g0 * scale
        p = p - rate * decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + epsilon)
        rate *= FALL
    return p


def expected(scalar, *arguments):
    result = {}
    for path, value in START.items():
        array = np.array(value)
        flat = [scalar(p, 1 + i, *arguments) for i, p in enumerate(array.ravel().tolist())]
        result[path] = np.array(flat).reshape(array.shape)
    return result


@pytest.mark.parametrize(
    ("momentum", "nesterov", "decay"),
    [(0.0, False, 0.0), (0.0, False, 0.1), (0.9, False, 0.0), (0.5, False, 0.2), (0.9, True, 0.0), (0.6, True, 0.05)],
)
def test_sgd_follows_the_scalar_recurrence(momentum, nesterov, decay):
    parameters = make_parameters()
    run(SGD(parameters, 0.07, momentum=momentum, nesterov=nesterov, weight_decay=decay))
    for path, value in expected(scalar_sgd, 0.07, momentum, nesterov, decay).items():
        np.testing.assert_allclose(parameters[path], value, rtol=1e-13, err_msg=path)


@pytest.mark.parametrize(("b1", "b2", "epsilon", "decay"), [(0.9, 0.999, 1e-8, 0.0), (0.5, 0.8, 0.1, 0.3)])
def test_adam_follows_the_scalar_recurrence(b1, b2, epsilon, decay):
    parameters = make_parameters()
    run(Adam(parameters, 0.02, betas=(b1, b2), epsilon=epsilon, weight_decay=decay))
    for path, value in expected(scalar_adam, 0.02, b1, b2, epsilon, decay).items():
        np.testing.assert_allclose(parameters[path], value, rtol=1e-13, err_msg=path)


@pytest.mark.parametrize(("b1", "b2", "epsilon", "decay"), [(0.9, 0.999, 1e-8, 0.0), (0.5, 0.8, 1e-3, 0.3)])
def test_adamw_follows_the_scalar_recurrence(b1, b2, epsilon, decay):
    optimizer = AdamW(make_parameters(), 0.1, (b1, b2), epsilon, decay)
    run(optimizer)
    for path, wanted in expected(scalar_adamw, 0.1, b1, b2, epsilon, decay).items():
        np.testing.assert_allclose(optimizer.parameters[path], wanted, rtol=1e-12)


def test_adamw_is_that_of_pytorch():
    """The defaults too; with a schedule, which scales the decay as it does the step."""
    torch = pytest.importorskip("torch")
    parameters = make_parameters()
    theirs = {path: torch.nn.Parameter(torch.tensor(p)) for path, p in parameters.items()}
    one, other = AdamW(parameters), torch.optim.AdamW(theirs.values())
    for n, gradients in enumerate(gradient_sequence(parameters)):
        one.step(gradients, 0.8**n)
        for path, p in theirs.items():
            p.grad = torch.tensor(gradients[path])
        for group in other.param_groups:
            group["lr"] = 1e-3 * 0.8**n
        other.step()
    for path, p in parameters.items():
        np.testing.assert_allclose(p, theirs[path].detach().numpy(), rtol=1e-13)


def clipped_by_a_loop(gradient, weight, limit):
    out = gradient.copy()
    for k in range(weight.shape[-1]):
        length = math.sqrt(sum(float(x) ** 2 for x in weight[..., k].ravel()))
        norm = math.sqrt(sum(float(x) ** 2 for x in gradient[..., k].ravel()))
        most = limit * max(length, 1e-3)
        if norm > most:
            out[..., k] = gradient[..., k] * most / norm
    return out


@pytest.mark.parametrize("at_once", [1 << 19, 50, 4])
def test_clip_by_unit_norm_against_a_plain_loop(rng, at_once, monkeypatch):
    """Convolutions, dense maps; a unit that is zero; not the readout, not signals, no biases and gains; in pieces."""
    monkeypatch.setattr("cupyep.ops.optimizer.UPDATED_AT_ONCE", at_once)
    shapes = {"layers.1.weight": (3, 3, 4, 6), "layers.2.weight": (20, 5), "layers.2.bias": (5,), "layers.1.gain": (6,)}
    shapes |= {"readout.weight": (5, 3), "signals.0.layer1.weight": (6, 3), "layers.stem.image.weight": (2, 2, 1, 3)}
    parameters = {path: rng.standard_normal(shape) for path, shape in shapes.items()}
    parameters["layers.1.weight"][..., 2] = 0
    gradients = {path: rng.standard_normal(shape) * np.linspace(0.05, 0.5, shape[-1]) for path, shape in shapes.items()}
    wanted = {path: p - 0.5 * gradients[path] for path, p in parameters.items()}
    for path in ("layers.1.weight", "layers.2.weight", "layers.stem.image.weight"):
        clipped = clipped_by_a_loop(gradients[path], parameters[path], 0.2)
        changed = (clipped != gradients[path]).any(axis=tuple(range(clipped.ndim - 1)))
        assert changed.any()
        assert not changed.all(), "some units are clipped and some are not"
        wanted[path] = parameters[path] - 0.5 * clipped
    SGD(parameters, 0.5, momentum=0.0, clip_unit_norm=0.2).step(gradients)
    for path, p in parameters.items():
        np.testing.assert_allclose(p, wanted[path], rtol=1e-12, atol=1e-15, err_msg=path)


def test_a_step_allocates_nothing_of_a_weights_size():
    """A weight of 6 MB: what a clip squares lies in the scratch of the update, a piece at a time."""
    parameters = {"layers.1.weight": np.ones((500, 3000), np.float32)}
    optimizer = Adam(parameters, 0.1, clip_unit_norm=0.1)
    gradients = {"layers.1.weight": np.ones((500, 3000), np.float32)}
    tracemalloc.start()
    try:
        optimizer.step(gradients)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_clip_hides_no_divergence():
    parameters = {"layers.1.weight": np.ones((2, 3))}
    gradient = np.array([[1.0, np.nan, 1.0], [1.0, 1.0, np.inf]])
    with np.errstate(invalid="ignore"):
        SGD(parameters, 0.1, momentum=0.0, clip_unit_norm=0.1).step({"layers.1.weight": gradient})
    assert np.isfinite(parameters["layers.1.weight"]).tolist() == [[True, False, True], [True, False, False]]


def test_sgd_by_hand():
    """Gradient 1, rate 0.1, momentum 0.9: velocities 1, 1.9, 2.71; p = -0.1 * 5.61, Nesterov -0.1 * (1.9 + 2.71)."""
    for nesterov, steps, value in [(False, 3, -0.561), (True, 2, -0.461)]:
        p = np.zeros(1)
        optimizer = SGD({"w": p}, 0.1, momentum=0.9, nesterov=nesterov)
        for _ in range(steps):
            optimizer.step({"w": np.ones(1)})
        np.testing.assert_allclose(p, [value], rtol=1e-14)


def test_adam_moves_by_the_rate_under_a_constant_gradient():
    """Closed form: both corrected means equal g and g^2 at every step, so each step is -lr * g / (|g| + epsilon)."""
    p = np.zeros(2)
    optimizer = Adam({"w": p}, 0.01, epsilon=1e-3)
    for _ in range(4):
        optimizer.step({"w": np.array([2.0, -0.5])})
    np.testing.assert_allclose(p, [-0.04 * 2 / 2.001, 0.04 * 0.5 / 0.501], rtol=1e-12)


def test_layerwise_rates_and_the_schedule_factor():
    parameters = {"a": np.zeros(2), "b": np.zeros(3)}
    optimizer = SGD(parameters, {"a": 0.5, "b": 0.02}, momentum=0.0)
    optimizer.step({"a": np.ones(2), "b": np.ones(3)}, factor=0.25)
    np.testing.assert_allclose(parameters["a"], -0.125)
    np.testing.assert_allclose(parameters["b"], -0.005)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_float32_parameters_change_in_place_and_gradients_do_not(name):
    parameters = make_parameters(np.float32)
    before = dict(parameters)
    optimizer = OPTIMIZERS[name](parameters, 0.1, weight_decay=0.1)
    gradients = next(gradient_sequence(parameters))
    copies = {path: g.copy() for path, g in gradients.items()}
    optimizer.step(gradients)
    for path, p in parameters.items():
        assert p is before[path]
        assert p.dtype == np.float32
        assert not np.array_equal(p, np.float32(START[path]))
        np.testing.assert_array_equal(gradients[path], copies[path])
    assert all(array.dtype == np.float32 for key, array in optimizer.state_dict().items() if key != "steps")


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, nesterov=True, weight_decay=0.1, ema=0.9), Adam])
def test_a_step_allocates_no_array(make):
    parameters = {"w": np.zeros((400, 400)), "b": np.zeros(400)}
    gradients = {path: np.ones_like(p) for path, p in parameters.items()}
    optimizer = make(parameters)
    optimizer.step(gradients)
    tracemalloc.start()
    for _ in range(3):
        optimizer.step(gradients)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3200, f"a step allocated {peak} bytes; the smallest parameter has 3200"


@pytest.mark.parametrize("most", [1, 7, 24])
@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, nesterov=True, weight_decay=0.1), lambda p: Adam(p, 0.1)])
def test_pieces_change_no_bit(make, most, monkeypatch, rng):
    """Whatever the shapes and strides; the scratch is no longer than a piece."""
    shapes = {"a": (3, 2, 5), "b": (20,), "c": (), "d": (4, 9), "e": (0, 3)}
    start = {path: rng.standard_normal(shape) for path, shape in shapes.items()}
    start["d"] = start["d"].T
    steps = [{path: rng.standard_normal(p.shape) for path, p in start.items()} for _ in range(3)]
    results = []
    for numbers in (10**6, most):
        monkeypatch.setattr(ops, "UPDATED_AT_ONCE", numbers)
        optimizer = make({path: p.copy(order="K") for path, p in start.items()})
        for gradients in steps:
            optimizer.step(gradients)
        results.append(optimizer)
    for path, p in results[0].parameters.items():
        np.testing.assert_array_equal(results[1].parameters[path], p)
        assert p.size == 0 or not np.array_equal(p, start[path])
    slots = {"SGD": ("velocity",), "Adam": ("mean", "square")}[type(optimizer).__name__]
    buffers = [*optimizer._buffers.values(), *optimizer._scratch.values()]
    assert optim.optimizer_bytes(start, slots) == sum(b.nbytes for b in buffers)
    assert sum(b.size for b in optimizer._scratch.values()) <= most


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, 0.1, nesterov=True, ema=0.9), lambda p: Adam(p, 0.1, weight_decay=0.1)]
)
def test_a_restored_state_continues_bit_for_bit(make):
    straight = make(make_parameters())
    run(straight)
    run(straight)
    first = make(make_parameters())
    run(first)
    parameters = {path: p.copy() for path, p in first.parameters.items()}
    state = {name: array.copy() for name, array in first.state_dict().items()}
    second = make(parameters)
    second.load_state_dict(state)
    run(second)
    for path, p in straight.parameters.items():
        np.testing.assert_array_equal(parameters[path], p)
    for name, array in straight.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], array, err_msg=name)


def averaging(parameters, **how):
    return SGD(parameters, 0.1, **how) if "momentum" in how else Adam(parameters, 0.1, **how)


@pytest.mark.parametrize("how", [{"momentum": 0.0}, {"momentum": 0.9}, {}])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_follows_its_recurrence(how, decay, monkeypatch):
    """Against a plain loop over what an optimizer without an average does; in whole parameters and in pieces."""
    for at_once in (1 << 19, 1):
        monkeypatch.setattr(ops, "UPDATED_AT_ONCE", at_once)
        plain, other = averaging(make_parameters(), **how), averaging(make_parameters(), **how, ema=decay)
        wanted = make_parameters()
        for t, gradients in enumerate(gradient_sequence(plain.parameters), start=1):
            plain.step(gradients)
            other.step(gradients)
            d = min(decay, (1 + t) / (10 + t))
            wanted = {path: d * a + (1 - d) * plain.parameters[path] for path, a in wanted.items()}
        trained = {path: p.copy() for path, p in other.parameters.items()}
        for path, p in plain.parameters.items():
            np.testing.assert_array_equal(trained[path], p)
        with other.averaged():
            for path, p in other.parameters.items():
                np.testing.assert_allclose(p, wanted[path], rtol=1e-13)
        for path, p in other.parameters.items():
            np.testing.assert_array_equal(p, trained[path], err_msg="the parameters come back, bit for bit")


def test_parameters_come_back_after_an_error():
    optimizer = SGD(make_parameters(), ema=0.5)
    run(optimizer)
    before = {path: p.copy() for path, p in optimizer.parameters.items()}
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    for path, p in optimizer.parameters.items():
        np.testing.assert_array_equal(p, before[path])


def test_without_an_average_nothing_is_put_in_place():
    optimizer = SGD(make_parameters())
    run(optimizer)
    before = {path: p.copy() for path, p in optimizer.parameters.items()}
    with optimizer.averaged():
        for path, p in optimizer.parameters.items():
            np.testing.assert_array_equal(p, before[path])


def test_state_names_are_flat_paths():
    parameters = make_parameters()
    assert set(SGD(parameters).state_dict()) == {"steps", "velocity.layers.1.weight", "velocity.layers.1.bias"}
    assert set(SGD(parameters, momentum=0.0).state_dict()) == {"steps"}
    assert "square.layers.1.bias" in Adam(parameters).state_dict()
    assert set(SGD(parameters, momentum=0.0, ema=0.9).state_dict()) == {
        "steps",
        "average.layers.1.weight",
        "average.layers.1.bias",
    }


def test_foreign_states_are_refused():
    optimizer = SGD(make_parameters())
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match="'velocity.layers.1.wieght' belongs to no parameter.*layers.1.weight"):
        optimizer.load_state_dict({**state, "velocity.layers.1.wieght": np.zeros(2)})
    with pytest.raises(CheckpointError, match="'steps' is missing"):
        optimizer.load_state_dict({name: a for name, a in state.items() if name != "steps"})
    with pytest.raises(CheckpointError, match=r"shape \(3,\) where \(2,\)"):
        optimizer.load_state_dict({**state, "velocity.layers.1.bias": np.zeros(3)})


def test_foreign_gradients_are_refused_before_anything_changes():
    parameters = make_parameters()
    optimizer = SGD(parameters)
    good = next(gradient_sequence(parameters))
    bad = [
        ({**good, "layers.2.weight": np.zeros(1)}, "belongs to no parameter"),
        ({"layers.1.weight": good["layers.1.weight"]}, "'layers.1.bias' is missing"),
        ({**good, "layers.1.bias": np.zeros(1)}, "has shape"),
    ]
    for gradients, message in bad:
        with pytest.raises(ConfigurationError, match=message):
            optimizer.step(gradients)
    for path, p in parameters.items():
        np.testing.assert_array_equal(p, START[path])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD(p, 0.0), r"learning_rate must be above 0, not 0.0"),
        (lambda p: SGD(p, math.nan), "learning_rate must be above 0"),
        (lambda p: SGD(p, momentum=1.0), "momentum must be at least 0 and below 1"),
        (lambda p: SGD(p, momentum=-0.1), "momentum must be"),
        (lambda p: SGD(p, momentum=0.0, nesterov=True), "nesterov needs a momentum above 0"),
        (lambda p: SGD(p, weight_decay=-1e-4), "weight_decay must be at least 0"),
        (lambda p: SGD({}), "at least one of parameters"),
        (lambda p: SGD(p, {"layers.1.weight": 0.1}), "no entry for 'layers.1.bias'"),
        (lambda p: SGD(p, {**dict.fromkeys(p, 0.1), "layers.1.bais": 1.0}), "did you mean 'layers.1.bias'"),
        (lambda p: SGD(p, {**dict.fromkeys(p, 0.1), "layers.1.bias": -1.0}), "of 'layers.1.bias' must be above 0"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), "each of betas must be at least 0 and below 1"),
        (lambda p: Adam(p, betas=(0.9,)), "betas must be two numbers"),
        (lambda p: Adam(p, epsilon=0.0), "epsilon must be above 0"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make(make_parameters())


def test_schedules_closed_forms():
    assert [LR_SCHEDULES["constant"](x) for x in (0, 0.3, 1)] == [1, 1, 1]
    np.testing.assert_allclose([LR_SCHEDULES["cosine"](x) for x in (0, 1 / 3, 0.5, 1)], [1, 0.75, 0.5, 0], atol=1e-15)
    assert [LR_SCHEDULES["step"](x) for x in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    for schedule in LR_SCHEDULES.values():
        with pytest.raises(ConfigurationError, match="progress must be at least 0 and at most 1"):
            schedule(1.01)
