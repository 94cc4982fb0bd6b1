"""What enters a network: images and labels of the wrong kind get one clear line, at every entry."""

import numpy as np
import pytest
import small

import cupyep as ep

X = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)
Y = np.array([0, 2])
NAN, INF = X.copy(), X.copy()
NAN[1, 2, 3, 0], INF[1, 0, 0, 0] = np.nan, -np.inf


@pytest.fixture(scope="module")
def net():
    edges = [ep.Conv2d((4, 5, 3), 4, pooling="max"), ep.Linear((2, 2, 4), 6)]
    return ep.Network(edges, 3, device="cpu", feedback=1.0)


def entries(net):
    """Everything that takes images and labels, by name."""
    steps = {"free_steps": 3, "nudged_steps": 2, "schedule": "synchronous"}
    learner = ep.EquilibriumPropagation(net, **steps)
    free = net.settle(X, steps=3, schedule="synchronous")
    return {
        "step": learner.step,
        "evaluate": learner.evaluate,
        "bptt": ep.BackpropagationThroughTime(net, free_steps=3, unrolled_steps=2, schedule="synchronous").step,
        "settle": lambda x, y: net.settle(x, free, targets=y, beta=0.5, steps=2, schedule="synchronous"),
        "check_gradients": lambda x, y: ep.check_gradients(net, x, y, **steps),
        "batch of the user": lambda x, y: learner.step(ep.Batch(x, y)),
    }


ENTRIES = ("step", "evaluate", "bptt", "settle", "check_gradients", "batch of the user")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.array([True, False]), "not bool"),
        (np.array([True, False, True]), "2 images need 2 labels"),
        (np.array([0.0, 1.0]), "not float64"),
        (np.array(["a", "b"]), "not <U1"),
        (np.eye(3)[:2], "2 images need 2 labels"),
        (np.array([0]), "2 images need 2 labels"),
        ([0, 1, 2], "2 images need 2 labels"),
        (np.array([0, -1]), "from 0 to 2, not -1"),
        (np.array([3, 0]), "from 0 to 2, not 3"),
        (np.array([0, None]), "not object"),
    ],
)
def test_wrong_labels(net, entry, labels, says):
    with pytest.raises(ep.ConfigurationError) as error:
        entries(net)[entry](X, labels)
    assert says in str(error.value)


WRONG_IMAGES = [
    (NAN, "image 1 has values that are NaN or infinite"),
    (INF, "image 1 has values that are NaN or infinite"),
    (np.full(X.shape, 200, np.uint8), "(x / 255 - mean) / std"),
    (X.transpose(0, 3, 1, 2), "x.transpose(0, 2, 3, 1)"),
    (X[:0], "images have shape (0, 4, 5, 3)"),
    (X[0], "images have shape (4, 5, 3)"),
    ("abc", "images have shape ()"),
    ([[1.0], [1.0, 2.0]], "array of numbers"),
    (None, "images have shape ()"),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("images", "says"), WRONG_IMAGES)
def test_wrong_images(net, entry, images, says):
    with pytest.raises(ep.ConfigurationError) as error:
        entries(net)[entry](images, Y)
    assert says in str(error.value)


@pytest.mark.parametrize("call", ["predict", "scores"])
@pytest.mark.parametrize(("images", "says"), WRONG_IMAGES)
def test_wrong_images_without_labels(net, call, images, says):
    with pytest.raises(ep.ConfigurationError) as error:
        getattr(net, call)(images, steps=2)
    assert says in str(error.value)


@pytest.mark.parametrize("labels", [[0, 2], (0, 2), Y.astype(np.uint8), Y.astype(np.int32)])
def test_integers_of_all_kinds_mean_the_same(net, labels):
    step = entries(net)["step"]
    first = {path: array.copy() for path, array in step(X, Y).gradients.items()}
    for path, array in step(X, labels).gradients.items():
        np.testing.assert_array_equal(array, first[path])


def test_labels_given_beside_a_batch_replace_its_own(net):
    assert net.batch(ep.Batch(X, np.array([1, 1])), Y).labels.tolist() == [0, 2]


def test_values_are_looked_at_once(net):
    """What the gate, a part of it or a loader gives is not looked at again: on a GPU a look waits."""
    batch = net.batch(X, Y)
    assert batch.checked
    assert batch.part(slice(0, 1)).checked
    unseen = ep.Batch(NAN, Y, checked=True)
    assert net.batch(unseen).images is NAN


@pytest.mark.parametrize("call", ["phi", "value", "force", "parameter_gradient"])
@pytest.mark.parametrize(("images", "says"), WRONG_IMAGES)
def test_the_energy_has_the_same_gate(net, call, images, says):
    states = [np.full((2, *shape), 0.5, np.float32) for shape in net.state_shapes]
    with pytest.raises(ep.ConfigurationError) as error:
        getattr(net.energy, call)(images, states)
    assert says in str(error.value)


@pytest.mark.parametrize(("precision", "largest"), [("float16", 65504.0), ("float32", 3.4028234e38)])
def test_images_stay_finite_as_they_are_stored(precision, largest):
    """The largest float16 is 65504, the largest float32 (2 - 2^-23) 2^127; beyond, conversion gives infinity."""
    net = ep.Network([ep.Linear((4, 5, 3), 6)], 3, device="cpu", precision=precision, feedback=1.0)
    x = X.astype(np.float64)
    x[1, 0, 0, 0] = largest
    assert np.isfinite(net.batch(x).images).all()
    x[1, 0, 0, 0] = 1.01 * largest
    with pytest.raises(ep.ConfigurationError, match=f"image 1 has values that are NaN or infinite, as {precision}"):
        net.batch(x)


def test_what_is_right_is_not_described(monkeypatch):
    """A message is made when something is wrong: the text of a batch would wait for a GPU at every step."""
    monkeypatch.setattr(ep.errors, "shown", lambda value: pytest.fail(f"described a {type(value).__name__}"))
    net = small.network("conv")
    learner, batch = (
        ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2, schedule="synchronous"),
        small.batch_of(net),
    )
    learner.step(batch)
    learner.evaluate(batch)
    free = net.settle(batch, steps=2, schedule="synchronous")
    net.settle(batch, free, steps=2, targets=batch, beta=0.5, schedule="synchronous")
