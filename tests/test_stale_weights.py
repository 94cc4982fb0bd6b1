"""What is made of the weights and kept must follow them. Oracle: a network that never had other weights."""

from collections import Counter

import numpy as np
import pytest
from small import batch_of, hosts, network, on_host

import cupyep as ep
from cupyep.memory.workspace import Workspace

STEPS = {"free_steps": 3, "nudged_steps": 2, "schedule": "synchronous"}


def nudged(net, batch, form, betas):
    free = net.settle(batch, steps=2, schedule="synchronous")
    return net.settle(batch, free, targets=batch, beta=betas, nudge=form, steps=2, schedule="synchronous")


def gradients(make):
    return lambda net, batch: make(net).step(batch).gradients.values()


USES = {
    "free": lambda net, batch: net.settle(batch, steps=3, schedule="synchronous").layers,
    "warm": lambda net, batch: (
        net.settle(
            batch, net.settle(batch, steps=1, schedule="synchronous"), steps=2, schedule="evenodd", relaxation=1.0
        ).layers
    ),
    "classical": lambda net, batch: nudged(net, batch, "classical", [0.3, -0.3]).layers,
    "deviation": lambda net, batch: nudged(net, batch, "deviation", [0.3, -0.3]).deviations,
    "tangent": lambda net, batch: nudged(net, batch, "tangent", 1.0).deviations,
    "EP": gradients(lambda net: ep.EquilibriumPropagation(net, 0.3, **STEPS)),
    "classical EP": gradients(lambda net: ep.EquilibriumPropagation(net, 0.3, **STEPS, nudge="classical")),
    "one-sided EP": gradients(
        lambda net: ep.EquilibriumPropagation(net, 0.3, **STEPS, nudge="classical", scheme="onesided")
    ),
    "BPTT": gradients(lambda net: ep.BackpropagationThroughTime(net, 2, 3, schedule="synchronous")),
    "BP": gradients(ep.Backpropagation),
    "scores": lambda net, batch: [net.scores(batch, steps=3, schedule="synchronous")],
    "energy": lambda net, batch: net.energy.force(batch.images, states(net)),
}


def states(net):
    generator = np.random.default_rng(5)
    return [net.device.asarray(generator.uniform(0, 1, (3, *shape)), net.dtype) for shape in net.state_shapes]


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("use", USES)
def test_changed_weights_are_taken_up_by_the_next_use(device, algorithm, use, pooling):
    """In place, as an optimizer changes them, and by exchanging the array, after every use has seen the old ones."""
    net = network("conv", device, pooling=pooling)
    batch, fresh = batch_of(net), network("conv", device, pooling=pooling, seed=7)
    for action in USES.values():
        action(net, batch)
    for path, array in net.parameters().items():
        array[...] = fresh.parameters()[path]
    net.layers[1].weight = net.layers[1].weight.copy()
    for found, expected in zip(hosts(net, USES[use](net, batch)), hosts(net, USES[use](fresh, batch)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("samples", [3, 6])
def test_what_a_kept_workspace_made_of_old_weights_is_renewed_when_it_is_handed_out(device, algorithm, samples):
    """Workspaces of several sizes share it: whichever was there first."""
    net = network("conv", device, pooling="max")
    net.memory.workspace(6)
    net.memory.workspace(3)
    for array in net.parameters().values():
        array *= -1.5
    workspace, new = net.memory.workspace(samples), network("conv", device, pooling="max")
    new.load_parameters(on_host(net, net.parameters()))
    expected = new.memory.workspace(samples)
    pairs = list(zip(net.layers, zip(workspace.ops, expected.ops, strict=True), strict=True))
    for edge, ops in pairs[1:]:  # the edge of the image has no top-down product
        s = np.random.default_rng(1).standard_normal((samples, *edge.out_shape))
        winners = np.zeros(s.shape, np.uint8) if edge.has_winners else None
        outs = []
        for each in ops:
            out = net.device.xp.empty((samples, *edge.in_shape))
            arrays = net.device.asarray(s), None if winners is None else net.device.asarray(winners)
            edge.topdown(*arrays, out, each)
            outs.append(net.device.to_numpy(out))
        np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("kind", ["EP", "BPTT", "BP"])
def test_a_step_takes_weights_up_once_a_size(kind, micro_batch, monkeypatch):
    """The next one takes up those of its own time, also after a step that failed."""
    net = network("conv", "cpu")
    make, *how = {
        "EP": (ep.EquilibriumPropagation, 0.3, 3, 2),
        "BPTT": (ep.BackpropagationThroughTime, 2, 3),
        "BP": (ep.Backpropagation,),
    }[kind]
    learner, batch = make(net, *how, micro_batch=micro_batch), batch_of(net)
    with monkeypatch.context() as patch:
        patch.setattr(learner, "_judge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.step(batch)
    taken_up, refresh = Counter(), Workspace.refresh
    monkeypatch.setattr(Workspace, "refresh", lambda space, *how: taken_up.update([space]) or refresh(space, *how))
    for work in (learner.step, learner.step, learner.evaluate):
        taken_up.clear()
        work(batch)
        assert set(taken_up.values()) == {1}
    taken_up.clear()
    for _ in range(2):
        net.settle(batch, steps=1, schedule="synchronous")
    assert min(taken_up.values()) >= 2, "outside of a step weights may change between two calls"
