"""Parts of a batch in threads: the same bits for any number of them. Oracle: one thread, and the whole batch."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from quadrants import SILENT, assert_same_state, numbers, quadrant_data
from small import batch_of, network, signals_of
from test_micro_batch import LEARNERS, every_signal, figures
from threadpoolctl import threadpool_info

import cupyep as ep
from cupyep.backend import threads
from cupyep.backend.threads import Turns, number_for, one_blas_thread, run_parts
from cupyep.ops.factors import Factors
from cupyep.persistence.checkpoint import load_checkpoint
from cupyep.training import build, runs
from cupyep.training.config import make_config
from cupyep.training.run_directory import RunDirectory

SAMPLES = 23


@pytest.fixture(autouse=True)
def parts_of_four(monkeypatch):
    monkeypatch.setattr("cupyep.backend.threads.PART", 4)
    yield
    ep.set_threads(None)


def content(net, result):
    arrays = [result.gradients.packed.copy(), *figures(net, result)]
    stats = [stats.per_sample for stats in (result.free, result.nudged) if stats is not None]
    return arrays + stats + [result.saturated.copy(), result.dead.copy()]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weights", ["plain", "standardized"])
@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.filterwarnings("ignore::cupyep.PrecisionWarning")
def test_a_step_gives_the_same_bits_for_any_number_of_threads(name, precision, weights):
    """Also the one after the weights have changed: they are made anew for all threads."""
    found = []
    for count in (1, 2, 3, 8):
        ep.set_threads(count)
        net = ep.Network(
            [ep.Conv2d((6, 6, 2), 3, pooling="max"), ep.Conv2d((3, 3, 3), 4), ep.Linear((3, 3, 4), 5)],
            classes=3,
            gain=0.5,
            weights=weights,
            precision=precision,
            activation="hard_sigmoid",
            feedback=1.0,
        )
        learner, batch = LEARNERS[name](net, signals=every_signal()), batch_of(net, SAMPLES)
        optimizer, contents = ep.SGD(learner.parameters(), learning_rate=0.5), []
        for _ in range(3):
            result = learner.step(batch)
            contents += content(net, result)
            optimizer.step(result.gradients)
        contents += [
            learner.scores(batch),
            net.scores(batch, steps=3, schedule="synchronous"),
            *map(np.asarray, learner.evaluate(batch)),
        ]
        found.append(contents)
    assert np.abs(found[0][0] - found[0][len(found[0]) // 3]).max() > 0, "the weights have changed"
    for contents in found[1:]:
        assert_same_bits(contents, found[0])


def test_parts_on_a_gpu_are_done_by_one_thread(fake_gpu, monkeypatch):
    """Another one would launch on GPU 0, take memory of its own, and capture on the stream of the first."""

    def no_others():
        raise AssertionError("another thread is asked for")

    monkeypatch.setattr(threads, "_pool", no_others)
    net = network("conv", fake_gpu, precision="float32")
    learner, inside, settle = ep.EquilibriumPropagation(net, 0.3, 3, 2, micro_batch=2), [], net.settle_free
    monkeypatch.setattr(net, "settle_free", lambda *a, **how: inside.append(threading.get_ident()) or settle(*a, **how))
    ep.set_threads(3)
    batch = batch_of(net, 12)
    for work in (learner.step, learner.evaluate, learner.scores):
        inside.clear()
        work(batch)
        assert inside == [threading.get_ident()] * 6
    assert list(net._memories) == [0]


def test_parts_are_the_whole_batch_to_rounding(monkeypatch):
    net = network("conv")
    learner, batch = ep.EquilibriumPropagation(net, 0.3, 6, 4, schedule="synchronous"), batch_of(net, SAMPLES)
    ep.set_threads(3)
    parts = content(net, learner.step(batch))
    monkeypatch.setattr("cupyep.backend.threads.PART", SAMPLES)
    for a, b in zip(parts[:-1], content(net, learner.step(batch))[:-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_every_thread_has_memory_of_its_own_and_weights_are_made_once(monkeypatch):
    made = []
    make = ep.Conv2d.make_weight
    monkeypatch.setattr(ep.Conv2d, "make_weight", lambda edge: made.append(threading.get_ident()) or make(edge))
    net = network("conv")
    learner, inside, all_in = ep.Backpropagation(net), [], threading.Barrier(3)
    judge = learner._judge

    def judge_together(*arguments):
        if number_for(net) not in inside:
            inside.append(number_for(net))
            all_in.wait(60)
        return judge(*arguments)

    monkeypatch.setattr(learner, "_judge", judge_together)
    ep.set_threads(3)
    learner.step(batch_of(net, 12))
    assert sorted(inside) == [0, 1, 2]
    assert len(made) == len(net.layers)
    blocks = [memory._block for memory in net._memories.values()]
    assert len({id(block) for block in blocks}) == 3
    assert net.memory is net._memories[0], "this thread's"


@pytest.mark.filterwarnings("ignore::cupyep.PrecisionWarning")
def test_what_is_derived_of_a_weight_is_made_once_a_step_for_all_threads(monkeypatch):
    """Another thread may be reading it when it is made a second time."""
    made, take_up = Counter(), Factors.take_up

    def counted(factors, weight, out):
        made[out.ctypes.data] += 1
        take_up(factors, weight, out)

    monkeypatch.setattr(Factors, "take_up", counted)
    net = network("conv", precision="float16")
    learner, batch = ep.EquilibriumPropagation(net, 0.3, 3, 2, signals=signals_of("le")), batch_of(net, SAMPLES)
    ep.set_threads(3)
    learner.step(batch)
    made.clear()
    learner.step(batch)
    assert len(made) >= len(net.layers)
    assert set(made.values()) == {1}


@pytest.mark.parametrize("tolerance", [None, 1e-6])
@pytest.mark.parametrize("nudge", ["free", "classical", "deviation", "tangent"])
def test_settling_gives_the_state_of_the_whole_batch(monkeypatch, nudge, tolerance):
    """Two phases in one batch, too: phase by phase, not part by part. With a tolerance parts end by themselves."""
    monkeypatch.setattr("cupyep.backend.threads.PART", SAMPLES)
    net = network("conv", pooling="max", activation="hard_sigmoid")
    batch, how = (
        batch_of(net, SAMPLES),
        {"steps": 200 if tolerance else 5, "schedule": "synchronous", "tolerance": tolerance},
    )
    free = net.settle(batch, **how)
    nudged = {"start": free, "targets": batch, "beta": (0.3, -0.3), "nudge": nudge, "signals": signals_of("le")}
    more = {"free": {}, "tangent": {**nudged, "beta": 1.0}}.get(nudge, nudged)
    whole = net.settle(batch, **how, **more)
    monkeypatch.setattr("cupyep.backend.threads.PART", 4)
    ep.set_threads(3)
    more = {**more, "start": net.settle(batch, **how)} if more else {}
    parts = net.settle(batch, **how, **more)
    assert (parts.stats.converged, parts.scales) == (whole.stats.converged, whole.scales)
    close = {"rtol": 1e-12, "atol": 1e-14} if tolerance is None else {"rtol": 1e-4, "atol": 1e-5}
    for name in ("layers", "drives", "winners", "deviations"):
        found, expected = getattr(parts, name), getattr(whole, name)
        assert (found is None) == (expected is None)
        for a, b in zip(found or (), expected or (), strict=True):
            assert (a is None) == (b is None)
            if a is not None and (name != "winners" or tolerance is None):
                np.testing.assert_allclose(a, b, **close)
    if tolerance is None:
        np.testing.assert_allclose(parts.stats.per_sample, whole.stats.per_sample, rtol=1e-9, atol=1e-14)
    assert parts.stats.per_sample.shape == whole.stats.per_sample.shape


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_have_their_turn_in_order(count):
    ep.set_threads(count)
    order = []

    def work(part, turns):
        time.sleep(0.002 * (part % 3))
        with turns.turn(part):
            order.append(part)
        return part * part

    assert run_parts(object(), 9, work) == [n * n for n in range(9)]
    assert order == list(range(9))


def test_a_part_may_be_a_stage_behind_the_one_before():
    """Each is where only both together can be: the first in stage 1 while the second is in stage 0."""
    ep.set_threads(2)
    together, order = threading.Barrier(2), []

    def work(part, turns):
        for stage in range(3):
            with turns.turn(part, stage):
                if part + stage == 1:
                    together.wait(60)
                order.append((part, stage))
        return part

    assert run_parts(object(), 2, work) == [0, 1]
    for stage in range(3):
        assert [part for part, at in order if at == stage] == [0, 1]


@pytest.mark.parametrize("piece", [1, 64, 10**6])
def test_gradients_that_are_added_in_pieces_are_the_same_bits(monkeypatch, piece):
    net = network("conv")
    learner, batch = ep.EquilibriumPropagation(net, 0.3, 3, 2), batch_of(net, SAMPLES)
    ep.set_threads(1)
    expected = learner.step(batch).gradients.packed.copy()
    monkeypatch.setattr("cupyep.learning.learner.ADDED_AT_ONCE", piece)
    for count in (1, 2, 3, 8):
        ep.set_threads(count)
        learner = ep.EquilibriumPropagation(net, 0.3, 3, 2)
        np.testing.assert_array_equal(learner.step(batch).gradients.packed, expected)
        assert len(learner._gradients) <= len(learner.parts(SAMPLES)), "the first part's are the batch's"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, ep.ConfigurationError])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_part_that_fails_ends_it_and_nothing_waits(count, error):
    ep.set_threads(count)

    def work(part, turns):
        if part in (3, 4):
            raise error(f"part {part}")
        with turns.turn(part):
            return part

    with pytest.raises(error, match="part 3"):
        run_parts(object(), 9, work)
    assert run_parts(object(), 3, lambda part, turns: part) == [0, 1, 2]


def test_who_waits_for_the_turn_of_a_part_that_fails_is_sent_away():
    ep.set_threads(2)
    second, seen = threading.Event(), []

    def work(part, turns):
        seen.append(turns)
        if part == 0:
            assert second.wait(60)
            time.sleep(0.05)  # the other has begun to wait
            raise ZeroDivisionError
        second.set()
        with turns.turn(part):
            raise AssertionError("it has no turn")

    found = []
    caller = threading.Thread(target=lambda: found.append(_error_of(lambda: run_parts(object(), 2, work))), daemon=True)
    caller.start()
    caller.join(60)
    seen[0].fail()  # or a defect would keep this process from ending
    assert found == [ZeroDivisionError]


def _error_of(call):
    try:
        call()
    except Exception as error:
        return type(error)


def test_ctrl_c_while_others_work_waits_for_them(monkeypatch):
    """They use the network's memory: it must not be free before they are done."""
    ep.set_threads(2)
    done, waited = threading.Event(), threading.Event()
    wait = threads.wait

    def interrupted(futures):
        if not waited.is_set():
            waited.set()
            raise KeyboardInterrupt
        return wait(futures)

    monkeypatch.setattr(threads, "wait", interrupted)
    both = threading.Barrier(2)

    def work(part, turns):
        both.wait(60)
        if threading.current_thread() is not threading.main_thread():
            waited.wait(60)  # whoever is done before is not waited for
            time.sleep(0.05)
            done.set()

    with pytest.raises(KeyboardInterrupt):
        run_parts(object(), 2, work)
    assert done.is_set()


def test_threads_that_cannot_be_started_leave_none_at_work(monkeypatch):
    ep.set_threads(4)
    pool, begun, ended = threads._pool(), threading.Event(), []

    class Exhausted:
        def submit(self, *arguments):
            if begun.is_set():
                raise RuntimeError("can't start new thread")
            begun.set()
            return pool.submit(*arguments)

    def work(part, turns):
        time.sleep(0.05)
        ended.append(part)

    monkeypatch.setattr(threads, "_pool", Exhausted)
    with pytest.raises(RuntimeError, match="can't start"):
        run_parts(object(), 8, work)
    seen = len(ended)
    time.sleep(0.15)
    assert len(ended) == seen, "nobody works on"


def test_a_network_works_on_after_a_part_has_failed(monkeypatch):
    net = network("conv")
    learner, batch = ep.EquilibriumPropagation(net, 0.3, 3, 2, schedule="synchronous"), batch_of(net, SAMPLES)
    ep.set_threads(3)
    expected = content(net, learner.step(batch))
    with monkeypatch.context() as patch:
        patch.setattr(learner, "_judge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.step(batch)
    assert_same_bits(content(net, learner.step(batch)), expected)
    assert_same_bits(content(pickle.loads(pickle.dumps(net)), learner.step(batch)), expected)


class Watcher(ep.Augmenter):
    """Pulls states to what another network predicts, within the step."""

    def __init__(self, other):
        super().__init__([2], kappa=0.3, annealing="constant")
        self.other = other

    def target(self, layer, batch):
        return self.other.scores(batch.images, steps=2, schedule="synchronous").sum(axis=1)

    def loss(self, layer, state, target):
        return 0.5 * ((state - target[:, None, None, None]) ** 2).reshape(len(state), -1).sum(axis=1)

    def gradient(self, layer, state, target):
        return state - target[:, None, None, None]


def test_a_signal_may_ask_another_network():
    found = []
    for count in (1, 3):
        ep.set_threads(count)
        net = network("conv")
        learner = ep.EquilibriumPropagation(
            net, 0.3, 3, 2, signals=[Watcher(network("conv", seed=1))], schedule="synchronous"
        )
        found.append(content(net, learner.step(batch_of(net, SAMPLES))))
    assert_same_bits(*found)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_signal_may_ask_its_own_network_for_targets_alone(name, count):
    """While it settles its memory is in use: gradients were others without a word. As targets, what is known before."""

    def step(net, signal):
        return LEARNERS[name](net, signals=[signal]).step(batch).gradients.packed.copy()

    class Asking(Watcher):
        def gradient(self, layer, state, target):
            self.network.predict(batch.images[:2])
            return super().gradient(layer, state, target)

    class Knowing(Watcher):
        def target(self, layer, batch):
            return known[batch.index - 5]

    ep.set_threads(count)
    net, other = network("conv"), network("conv")
    batch = batch_of(net, SAMPLES)
    known = net.scores(batch.images, steps=2, schedule="synchronous").sum(axis=1)
    np.testing.assert_allclose(step(net, Watcher(net)), step(other, Knowing(other)), rtol=1e-12)
    with pytest.raises(ep.ConfigurationError, match="must not settle it; ask it in `target`, or another network"):
        step(net, Asking(other))
    np.testing.assert_array_equal(step(net, Watcher(other)), step(network("conv"), Watcher(other)), "it works on")


def test_warnings_as_errors_and_error_states_of_numpy_hold_in_every_thread():
    net = network("conv")
    learner = ep.EquilibriumPropagation(net, 0.3, 2, 2, tolerance=1e-15, schedule="synchronous")
    ep.set_threads(3)
    with pytest.warns(ep.ConvergenceWarning):
        learner.step(batch_of(net, SAMPLES))

    def divide(part, turns):
        return np.ones(3) / np.zeros(3)

    with np.errstate(divide="ignore"):
        run_parts(object(), 6, divide)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        run_parts(object(), 6, divide)


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_has_one_thread_within_our_work_and_as_many_as_before_after_it(monkeypatch):
    """Whichever of two threads ends first."""
    with threads._blas().limit(limits=2):
        before = blas_threads()
        first, second = threading.Event(), threading.Event()

        def other():
            with one_blas_thread():
                first.set()
                second.wait(60)

        for wait_for in ("the other", "this"):
            first.clear(), second.clear()
            worker = threading.Thread(target=other)
            with one_blas_thread():
                worker.start()
                first.wait(60)
                assert blas_threads() == {1}
                if wait_for == "this":
                    second.set(), worker.join()
                    assert blas_threads() == {1}
            second.set(), worker.join()
            assert blas_threads() == before
        net, inside = network("conv"), []
        learner = ep.Backpropagation(net)
        judge = learner._judge
        monkeypatch.setattr(learner, "_judge", lambda *given: inside.append(blas_threads()) or judge(*given))
        learner.step(batch_of(net, 6))
        assert inside == [{1}] * 2, "of two parts"
        assert blas_threads() == before


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({}, None),
        ({"cpu.max": "what\n"}, None),
    ],
)
def test_the_quota_of_a_control_group_counts(tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._quota(tmp_path) == cpus


def test_where_the_number_comes_from(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUPYEP_THREADS", raising=False)
    assert ep.get_threads() == threads.available_cpus() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert ep.get_threads() == 3
    monkeypatch.setenv("CUPYEP_THREADS", "5")
    assert ep.get_threads() == 5
    ep.set_threads(7)
    assert ep.get_threads() == 7
    ep.set_threads(None)
    for wrong in ("0", "-1", "two", "1.5", "²"):
        monkeypatch.setenv("CUPYEP_THREADS", wrong)
        with pytest.raises(ep.ConfigurationError, match="CUPYEP_THREADS must be a positive integer"):
            ep.get_threads()
    for wrong in (0, -2, 1.5, "2", True):
        with pytest.raises(ep.ConfigurationError, match="threads"):
            ep.set_threads(wrong)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_forks_works_on():
    """Its threads stay behind: a pool of them would wait for ever, for those that were idle when it forked."""
    code = """if True:
        import os, signal, threading, time, cupyep as ep
        from cupyep.backend.threads import run_parts
        ep.set_threads(3)
        all_in = threading.Barrier(3)
        run_parts(object(), 3, lambda part, turns: all_in.wait())
        time.sleep(0.3)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(run_parts(object(), 6, lambda part, turns: part) != list(range(6)))
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120).returncode == 0


def test_turns_without_threads_are_in_order():
    turns = Turns()
    for part in range(3):
        with turns.turn(part):
            pass


def test_signals_by_name_in_threads():
    ep.set_threads(2)
    net = network("conv")
    learner = ep.Backpropagation(net, signals=signals_of("le"))
    assert learner.step(batch_of(net, 8)).count == 8


@pytest.mark.parametrize(
    "options", [{}, {"aug": "le", "kappa_annealing": "constant"}, {"algorithm": "bp"}, {"weights": "standardized"}]
)
def test_a_run_is_the_same_with_any_number_of_threads_and_taken_up_with_another(monkeypatch, tmp_path, options):
    dataset = quadrant_data(train=24)
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)
    shared = {"arch": "vgg5", "batch_size": 16, "gain": 0.5, "lr_schedule": "constant", "data_dir": str(tmp_path)}

    def train(count, name, epochs):
        ep.set_threads(count)
        if (tmp_path / name).exists():
            runs.resume_run(tmp_path / name, {"epochs": epochs}, SILENT).run()
        else:
            config = make_config(shared, {"width": 0.125, "device": "cpu", "epochs": epochs}, options)
            runs.start_run(config, tmp_path / name, SILENT).run()

    train(1, "straight", 2)
    train(3, "other", 1)
    train(8, "other", 2)
    one, other = (tmp_path / name for name in ("straight", "other"))
    assert numbers(RunDirectory.open(one)) == numbers(RunDirectory.open(other))
    assert_same_state(*(load_checkpoint(path / "checkpoint.h5") for path in (one, other)))
