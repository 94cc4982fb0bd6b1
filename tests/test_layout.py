"""Phases share memory and keep only what they need. Oracle: every array on its own, all layers one after the other."""

import copy

import numpy as np
import pytest
from small import batch_of, network, signals_of

import cupyep as ep
from cupyep.memory.layout import Layout, PhaseShape, Stack, TermShape, rows_of_parts
from cupyep.memory.workspace import Memory
from cupyep.ops.update import UpdateOps

SCHEDULES = ("synchronous", "evenodd", "sweeps")
STEPS = 3


class Lavish:
    """Settles with an array for everything: all drives, then all feedback, then all updates, where that is the order.

    Only the products and the updates of whole layers are the package's: their bits are those of the lean systems.
    """

    def __init__(self, net, batch, betas=(0.0,), nudges=(), free=None):
        self.net, self.batch, self.free = net, batch, free
        self.betas = np.repeat(np.asarray(betas), len(batch))
        self.phases, rows = len(betas), len(self.betas)
        self.weights = net.graph.weights(net.feedback)
        self.updates = UpdateOps(np, net.activation)
        self.ops = Memory(net.graph, net.device, net.precision).workspace(rows).ops
        self.s, self.drive, self.topdown, self.g = (
            [np.zeros((rows, *shape), net.dtype) for shape in net.state_shapes] for _ in range(4)
        )
        pairs = zip(self.s, net.layers, strict=True)
        self.winners = [np.zeros(s.shape, np.uint8) if edge.has_winners else None for s, edge in pairs]
        self.residual = np.zeros((net.depth, rows), net.dtype)
        self.nudges = nudges
        if free is not None:
            self.winners = [None if w is None else np.concatenate([w] * self.phases) for w in free.winners]

    def scratch(self, s):
        return np.empty(self.updates.scratch_size(len(s), s[0].size), s.dtype)

    def forward(self, n):
        below = np.concatenate([self.batch.images] * self.phases) if n == 1 else self.s[n - 2]
        edge, out, ops = self.net.layers[n - 1], self.drive[n - 1], self.ops[n - 1]
        if self.free is None:
            edge.drive(below, out, self.winners[n - 1], ops)
        elif n > 1:
            edge.linear_drive(below, out, self.winners[n - 1], ops)

    def backward(self, n):
        if n < self.net.depth:
            self.net.layers[n].topdown(self.s[n], self.winners[n], self.topdown[n - 1], self.ops[n])

    def seen(self, n):
        if self.free is None:
            return self.s[n - 1]
        rest = np.concatenate([self.free.layers[n - 1]] * self.phases)
        return self.s[n - 1] * self.net.dtype.type(1 / self.weights[n - 1]) + rest

    def force(self, n):
        force, found = np.zeros_like(self.s[n - 1]), False
        for term, weight, target in self.nudges:
            if term.layer == n:
                divisor = self.weights[n - 1] if self.free is None else 1.0
                scale = np.array([-beta * weight / divisor for beta in self.betas], self.net.dtype)
                term.add_force(self.seen(n), np.concatenate([target] * self.phases), scale, force)
                found = True
        return force if found else None

    def update(self, n):
        s, topdown = self.s[n - 1], self.topdown[n - 1] if n < self.net.depth else None
        shared = self.net.feedback, self.force(n)
        if self.free is None:
            ends = self.g[n - 1], self.residual[n - 1], self.scratch(s)
            self.updates.states(s, self.drive[n - 1], topdown, *shared, *ends)
        else:
            ends = self.weights[n - 1], self.free.drives[n - 1], self.residual[n - 1], self.scratch(s)
            self.updates.deviations(s, self.drive[n - 1] if n > 1 else None, topdown, *shared, *ends)

    def settle(self, schedule, warm):
        layers = range(1, self.net.depth + 1)
        if self.free is None:
            for n in layers:
                self.forward(n)
                if not warm:
                    self.drive[n - 1][...] = 0
        for _ in range(STEPS):
            self.residual[...] = 0
            if schedule == "synchronous":
                for act in (self.forward, self.backward, self.update):
                    for n in layers:
                        act(n)
            elif schedule == "evenodd":
                for n in (*layers[1::2], *layers[::2]):
                    for act in (self.forward, self.backward, self.update):
                        act(n)
            else:
                for down in (warm, not warm):
                    for n in reversed(layers) if down else layers:
                        (self.backward if down else self.forward)(n)
                        self.update(n)
        return self.s


def case(kind="conv", **options):
    defaults = {"pooling": "max", "activation": "hard_sigmoid", "feedback": 0.5, "precision": "float32"}
    net = network(kind, **defaults | options)
    return net, batch_of(net, 4)


def assert_same_bits(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_lean_phases_have_the_bits_of_lavish_ones(loss, schedule, parts):
    """Free phases from zero and from a state, nudged ones in both forms, with signals at the first layer and others.

    With updates of a few rows at once, the products of heads have other rows, and BLAS may round them otherwise.
    """
    net, batch = case(loss=loss, precision="float64" if parts else "float32")
    if parts:
        net.memory.layout.part_bytes = 900
    assert_same_if_whole = assert_close if parts else assert_same_bits
    signals = [net.bind(signal) for signal in signals_of("le") + signals_of("kd")]
    how = {"steps": STEPS, "schedule": schedule, "relaxation": 1.0}
    free = net.settle(batch, **how)
    lavish = Lavish(net, batch)
    assert_same_bits(free.layers, lavish.settle(schedule, False))
    assert_same_bits(free.drives, lavish.g)
    assert_same_bits(free.stats.per_sample, np.sqrt(lavish.residual))
    start = net.settle(batch_of(net, 4, seed=1), steps=2, schedule="synchronous")
    lavish = Lavish(net, batch)
    for own, given in zip(lavish.s, start.layers, strict=True):
        own[...] = given
    assert_same_bits(net.settle(batch, start, **how).layers, lavish.settle(schedule, True))
    nudges = net.nudges(batch, signals)
    for form in ("classical", "deviation"):
        nudged = net.settle(batch, free, targets=batch, beta=[0.4, -0.3], nudge=form, signals=signals, **how)
        lavish = Lavish(net, batch, (0.4, -0.3), nudges, free if form == "deviation" else None)
        if form == "classical":
            for own, given in zip(lavish.s, free.layers, strict=True):
                own[...] = np.concatenate([given] * 2)
        assert_same_if_whole(nudged.deviations or nudged.layers, lavish.settle(schedule, True))
        assert_same_if_whole(nudged.stats.per_sample, np.sqrt(lavish.residual))
    phases = [found for found in net.memory._laid_out.values() if hasattr(found, "parts")]
    assert (max(len(layer) for phase in phases for layer in phase.parts) > 4) is parts


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_a_tangent_in_parts_is_that_of_all_rows(loss, schedule):
    """Its forces are made before the updates, in parts of their own. Two phases: the tangent to either side."""
    found = []
    for part_bytes in (1 << 20, 900):
        net, batch = case(loss=loss, precision="float64")
        net.memory.layout.part_bytes = part_bytes
        signals = [net.bind(signal) for signal in signals_of("le") + signals_of("kd")]
        how = {"steps": STEPS, "schedule": schedule, "relaxation": 1.0}
        free = net.settle(batch, **how)
        found.append(net.settle(batch, free, targets=batch, beta=[1.0, -1.0], nudge="tangent", signals=signals, **how))
        parts = next(b for shape, b in net.memory._laid_out.items() if getattr(shape, "form", "") == "tangent")
        assert (len(parts.parts[0]) > 1, len(parts.term_parts[1]) > 1) == (part_bytes == 900,) * 2
    whole, in_parts = found
    assert_close(in_parts.deviations, whole.deviations)
    assert all(np.abs(d[:4]).max() > 0 for d in whole.deviations)
    assert_close([d[:4] for d in whole.deviations], [-d[4:] for d in whole.deviations])


def test_parts_of_an_update_cover_all_rows_and_cross_no_phase():
    for samples in (1, 2, 5, 8):
        for phases in (1, 2):
            for most in (0, 1, 2, 3, 5, 7, 10, 16, 100):
                parts = rows_of_parts(samples, phases, most)
                assert [row for part in parts for row in range(part.start, part.stop)] == list(range(samples * phases))
                if len(parts) > 1:
                    assert max(part.stop - part.start for part in parts) <= max(most, 1)
                    assert all(part.start // samples == (part.stop - 1) // samples for part in parts)
    assert rows_of_parts(6, 2, 5) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)], "of equal length"
    assert rows_of_parts(6, 2, 12) == [slice(0, 12)], "one, if all rows fit"


@pytest.mark.parametrize("form", ["classical", "deviation", "tangent"])
def test_a_large_map_is_read_for_many_rows(form):
    """A row takes some four states of numbers; the map of 40 states is read for twice as many numbers, so for 20 rows.

    The forces of a tangent, which are made once, have parts of their own and room for all rows.
    """
    net, _ = case()
    layout, size = net.memory.layout, net.memory.layout.sizes[0]
    layout.part_bytes = 4 * 4 * (4 * size + 1)  # four rows with a force
    shapes = [
        PhaseShape(form, 40, "evenodd", terms=(TermShape(1, lambda samples: 0, lambda samples: 0, map_size=numbers),))
        for numbers in (0, 40 * size)
    ]
    without, large = (net.memory.phase(shape) for shape in shapes)
    most = {"classical": 26, "deviation": 19, "tangent": 19}[form]  # 80 s / (3 s + 1) or, seen apart, / (4 s + 1)
    assert large.term_parts == {1: rows_of_parts(40, 1, most)}
    assert without.term_parts == {1: rows_of_parts(40, 1, {"classical": 5}.get(form, 4))}
    assert len(large.force[1]) == (40 if form == "tangent" else large.term_parts[1][0].stop)
    assert large.parts[0] == (rows_of_parts(40, 1, 7) if form == "tangent" else large.term_parts[1])
    assert large.parts[1:] == without.parts[1:], "nodes without a term"


@pytest.mark.parametrize(
    ("schedule", "form", "expected"),
    [
        # 8 x 8 x 2, 4 x 4 x 4, 4 x 4 x 8, 2 x 2 x 8, 10: 128, 64, 128, 32, 10 units
        ("synchronous", "free", 128 + (64 + 128) + 128),  # first drive, one of layers 2 and 4, one of 3 and 5, feedback
        ("evenodd", "free", 128 + 128 + 128),
        ("sweeps", "free", 128 + 128 + (64 + 128 + 32)),  # first drive, the new one of any layer, the inner layers
        ("synchronous", "deviation", 2 * (64 + 128 + 128)),  # no drive of the input
        ("evenodd", "deviation", 2 * (128 + 128)),
        ("sweeps", "deviation", 2 * (128 + (64 + 128 + 32))),
    ],
)
def test_drives_and_feedback_take_what_a_schedule_needs(schedule, form, expected):
    """Of 64 samples in float32, so that every array takes whole units of 256 bytes; by hand."""
    edges = [
        ep.Conv2d((16, 16, 1), 2, pooling="max"),
        ep.Conv2d((8, 8, 2), 4, pooling="max"),
        ep.Conv2d((4, 4, 4), 8),
        ep.Conv2d((4, 4, 8), 8, pooling="max"),
        ep.Linear((2, 2, 8), 10),
    ]
    net = ep.Network(edges, 10, device="cpu", feedback=1.0)
    stack, phases = Stack(), 1 if form == "free" else 2
    found = Layout(net.graph, net.precision, False).lay_out(stack, PhaseShape(form, 64, schedule, phases))
    sizes = stack.at_peak
    assert stack.top == found.top, "what comes next is laid over all but what is still there"
    assert sizes["drives and feedback"] <= expected * 64 * 4
    units = 128 + 64 + 128 + 32 + 10
    retained = {"free states": units, "free drives": units} if form == "free" else {"deviations": 2 * units}
    assert {name: sizes[name] for name in retained} == {name: 64 * 4 * size for name, size in retained.items()}
    assert sizes["winners"] == phases * 64 * (128 + 64 + 32)


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
def test_a_free_state_outlasts_the_nudged_phases_that_start_at_it(nudge):
    """Also where it is in the network's own memory, and whichever form comes first."""
    net, batch = case()
    free = net.settle(batch, steps=4, copy=False, schedule="synchronous")
    kept = free.copy()
    how = {"targets": batch, "beta": [0.3, -0.3], "steps": 3, "schedule": "synchronous"}
    ends = {}
    for form in (nudge, "tangent", "deviation", "classical", nudge):
        beta = 1.0 if form == "tangent" else [0.3, -0.3]
        state = net.settle(batch, free, nudge=form, **how | {"beta": beta})
        expected = net.settle(batch, copy.deepcopy(kept), nudge=form, **how | {"beta": beta})
        assert_same_bits(state.layers, expected.layers)
        assert_same_bits(ends.setdefault(form, state.layers), state.layers)
        free = net.settle(batch, steps=4, copy=False, schedule="synchronous")
        assert_same_bits(free.layers + free.drives, kept.layers + kept.drives)


@pytest.mark.parametrize("base", ["own", "nudged"])
def test_a_start_in_the_networks_memory_is_not_laid_over(base):
    """A free phase may start at any state, the network's own too."""
    net, batch = case()
    start = net.settle(batch, steps=2, copy=False, schedule="synchronous")
    if base == "nudged":
        start = net.settle(batch, start, targets=batch, beta=0.3, steps=2, copy=False, schedule="synchronous")
    expected = net.settle(batch, start.copy(), steps=3, schedule="synchronous").copy()
    start = net.settle(batch, steps=2, copy=False, schedule="synchronous")
    if base == "nudged":
        start = net.settle(batch, start, targets=batch, beta=0.3, steps=2, copy=False, schedule="synchronous")
    kept = start.copy()
    assert_same_bits(net.settle(batch, start, steps=3, schedule="synchronous").layers, expected.layers)
    if base == "nudged":  # a free state is settled on in its place
        assert_same_bits(start.layers, kept.layers)


def test_batch_sizes_and_phases_share_one_block():
    """A smaller batch, evaluation and other algorithms lie in what the largest step needs, and change nothing."""
    net, batch = case()
    learner = ep.EquilibriumPropagation(net, free_steps=3, nudged_steps=2, schedule="sweeps")
    first = {path: g.copy() for path, g in learner.step(batch).gradients.items()}
    block, arena, made = net.memory._block, net.memory._arena, dict(net.effective.derived)
    ragged = ep.Batch(batch.images[:3], batch.labels[:3])
    learner.step(ragged)
    learner.evaluate(ragged)
    learner.evaluate(batch)
    ep.Backpropagation(net).step(ragged)
    net.predict(batch.images[:1], schedule="synchronous")
    again = learner.step(batch).gradients
    for path, gradient in first.items():
        np.testing.assert_array_equal(again[path], gradient)
    assert (net.memory._block, net.memory._arena) == (block, arena)
    assert {key: id(arrays) for key, arrays in net.effective.derived.items()} == {k: id(a) for k, a in made.items()}


def test_steps_of_one_shape_are_laid_out_once(monkeypatch):
    net, batch = case()
    learner, laid_out, lay_out = ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2), [], Layout.lay_out
    monkeypatch.setattr(
        Layout, "lay_out", lambda own, stack, shape: laid_out.append(shape) or lay_out(own, stack, shape)
    )
    learner.step(batch)
    assert laid_out
    laid_out.clear()
    learner.step(batch)
    assert laid_out == []


def test_layouts_of_the_last_few_phases_are_kept(monkeypatch):
    """Of many shapes not all, and of the oldest none: it is laid out anew."""
    net, _ = case()
    monkeypatch.setattr(net.memory, "LAYOUTS_KEPT", 3)
    shapes = [PhaseShape("free", samples, "sweeps") for samples in range(5, 0, -1)]
    buffers = [net.memory.phase(shape) for shape in shapes]
    assert list(net.memory._laid_out) == shapes[2:]
    assert all(net.memory.phase(shape) is kept for shape, kept in list(zip(shapes, buffers, strict=True))[2:])
    assert net.memory.phase(shapes[0]) is not buffers[0]
    assert list(net.memory._laid_out) == [*shapes[3:], shapes[0]]


def test_arrays_handed_out_before_the_block_grew_keep_their_values():
    net, batch = case()
    small = net.settle(ep.Batch(batch.images[:1], batch.labels[:1]), steps=3, copy=False, schedule="synchronous")
    kept = small.copy()
    net.settle(batch, steps=3, schedule="synchronous")
    assert_same_bits(small.layers, kept.layers)


STEPS_OF = {
    **{
        f"{form}, {schedule}": (form, {"schedule": schedule})
        for form in ("classical", "deviation", "onesided", "tangent")
        for schedule in SCHEDULES
    },
    "relaxed": ("deviation", {"schedule": "evenodd", "relaxation": 1.5}),
    "relaxed sweeps": ("deviation", {"schedule": "sweeps", "relaxation": 1.5}),
    "one iteration": ("deviation", {"schedule": "sweeps", "free_steps": 1, "nudged_steps": 1}),
    "never zero": ("deviation", {"schedule": "evenodd"}),
    "BPTT": ("BPTT", {}),
    "BP": ("BP", {}),
}


def learner_of(net, form, how):
    signals = signals_of("le")
    if form in ("BPTT", "BP"):
        made = {"BPTT": ep.BackpropagationThroughTime, "BP": ep.Backpropagation}[form]
        return made(net, signals=signals, **({"schedule": "synchronous"} if form == "BPTT" else {}) | how)
    scheme = form if form in ("onesided", "tangent") else "centered"
    nudge = "classical" if form == "classical" else "deviation"
    return ep.EquilibriumPropagation(
        net,
        scheme=scheme,
        nudge=nudge,
        signals=signals,
        **{"free_steps": 4, "nudged_steps": 3, "schedule": "synchronous", "relaxation": 1.0} | how,
    )


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("name", STEPS_OF)
def test_a_step_reads_nothing_that_it_has_not_written(request, name, where):
    """All memory of network and learner is NaN before a step (and winners are of no window): the same bits come out."""
    device = request.getfixturevalue("fake_gpu") if where == "gpu" else "cpu"
    activation = ep.Clip("never zero", 1.0, 0.2, 1.0) if name == "never zero" else "sigmoid"
    net = network("conv", device, pooling="max", precision="float32", feedback=0.5, activation=activation)
    learner, batch, found = learner_of(net, *STEPS_OF[name]), batch_of(net, 4), []
    for _ in range(4):  # on a GPU replayed from the third on
        result = learner.step(batch)
        arrays = [*result.gradients.values(), result.loss, result.activity, result.gradients.norms()]
        if result.nudge_response is not None:
            arrays.append(result.nudge_response)
        found.append([np.array(net.device.to_numpy(array)) for array in arrays])
        net.memory._block[...] = 255
        net.memory._arena.block[...] = 255
        result.gradients.packed.view(np.uint8)[...] = 255
    assert all(np.isfinite(array).all() for array in found[0])
    for again in found[1:]:
        assert_same_bits(again, found[0])


@pytest.mark.parametrize(
    "how", [{"record": True}, {"steps": 1}, {"tolerance": 1e-9, "check_every": 1}, {"relaxation": 0.5}], ids=str
)
@pytest.mark.filterwarnings("ignore::cupyep.errors.ConvergenceWarning")
def test_what_a_measured_first_sweep_compares_with_is_the_start(how):
    """A plain sweep overwrites its start unread, so that nobody writes it; one that measures or relaxes reads it."""
    net = network("conv", "cpu", precision="float64", feedback=0.5)
    batch, how, found = batch_of(net, 4), {"steps": 3, "schedule": "sweeps"} | how, []
    for _ in range(2):
        free = net.settle(batch.images, **how)
        nudged = net.settle(batch.images, free, targets=batch.labels, beta=0.1, nudge="deviation", **how)
        found.append([*(np.array(s) for s in nudged.layers), free.stats.per_sample, nudged.stats.per_sample])
        net.memory._block[...] = 255
    assert all(np.isfinite(array).all() for array in found[0])
    assert_same_bits(*found)
