"""Learning itself, on real images (scikit-learn's digits, enlarged to 16 x 16): what the package exists for.

Each statement is a comparison of two short trainings from the same initial weights, on the same batches.
"""

import numpy as np
import pytest

import cupyep as ep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return ep.load_dataset("digits", image_size=16)


def last_loss(data, make_learner, epochs, rate, seed=0, **network):
    """Return the mean training loss of the last epoch of VGG-11 at one eighth width."""
    net = ep.vgg(11, input_shape=data.image_shape, width=0.125, seed=seed, device="cpu", **{"feedback": 1.0, **network})
    learner = make_learner(net)
    optimizer = ep.Adam(learner.parameters(), learning_rate=rate)
    loader = ep.Loader(data, "train", 32, net.device, net.dtype, shuffle=True, generator=np.random.default_rng(seed))
    for _ in range(epochs):
        losses = []
        for batch in loader:
            result = learner.step(batch)
            optimizer.step(result.gradients)
            losses.append(float(result.loss))
    return float(np.mean(losses))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weak_feedback_trains_eleven_layers_like_backpropagation(digits, seed):
    """No signals; BP is the same network's feed-forward limit."""

    def by_ep(net):
        return ep.EquilibriumPropagation(net, beta=0.5, free_steps=2, nudged_steps=2, schedule="sweeps")

    settings = {"epochs": 6, "rate": 1e-3, "seed": seed, "feedback": 0.1}
    loss, reference = last_loss(digits, by_ep, **settings), last_loss(digits, ep.Backpropagation, **settings)
    assert reference < 1.0, "backpropagation itself must have learned"
    assert loss < reference + 0.15
