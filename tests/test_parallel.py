"""Several ranks against one process: the same numbers to rounding; what one rank meets, all come to know.

The oracle of sums is NumPy's, of a training the same command in one process. Threads stand in for processes where no
program is trained; where one is, mpiexec starts them, if mpi4py is installed.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from quadrants import SILENT, TINY, assert_same_state, numbers, quadrant_data
from ranks import Aborted, in_ranks, launch, launched, mpiexec
from small import network

import cupyep as ep
from cupyep.backend import nccl, threads
from cupyep.data import Loader
from cupyep.diagnostics.checkup import Checkup
from cupyep.diagnostics.probe import probe_settling
from cupyep.errors import CheckpointError, ConfigurationError, DataError, DeviceError, Interrupted
from cupyep.parallel import Communicator, communicator
from cupyep.parallel import launch as launching
from cupyep.training import runs
from cupyep.training.config import TrainConfig, make_config
from cupyep.training.results import evaluate
from cupyep.training.run_directory import RunDirectory
from cupyep.training.sharing import SharedDirectory, check_same, share_parameters, step
from cupyep.training.statistics import means_of

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or mpiexec() is None, reason="mpi4py or mpiexec is not installed"
)


def message(error):
    return f"{type(error).__name__}: {error}"


# What ranks tell each other.


def test_arrays_are_summed_in_place_and_flags_are_those_of_any():
    def work(ranks):
        one, two = np.full((2, 3), ranks.rank + 1.0), np.arange(4.0) * ranks.rank
        ranks.sum(one, two)
        return one, two, ranks.any(ranks.rank == 1, False, True), ranks.gather(ranks.rank)

    for one, two, flags, gathered in in_ranks(3, work):
        np.testing.assert_array_equal(one, np.full((2, 3), 6.0))
        np.testing.assert_array_equal(two, np.arange(4.0) * 3)
        assert flags == (True, False, True)
        assert gathered == [0, 1, 2]


def test_the_first_does_it_and_all_get_the_answer_or_the_error():
    done = []

    def work(ranks):
        answer = ranks.first(lambda: done.append(ranks.rank) or "answer")
        with pytest.raises(CheckpointError, match="no room") as error:
            ranks.first(lambda: (_ for _ in ()).throw(CheckpointError("no room")))
        return answer, ranks.is_agreed(error.value)

    assert in_ranks(3, work) == [("answer", True)] * 3
    assert done == [0]


@pytest.mark.parametrize("fails", [0, 2])
def test_what_one_rank_raises_all_raise_with_its_number(fails):
    def work(ranks):
        with ranks.together():
            with ranks.together():  # an agreed error passes through, no second vote
                if ranks.rank == fails:
                    raise DataError("nothing is there")
            raise AssertionError("went on")

    expected = "DataError: rank 2: nothing is there" if fails else "DataError: nothing is there"
    assert [message(error) for error in in_ranks(3, work)] == [expected] * 3


def test_a_rank_that_fails_meets_the_others_at_their_next_question():
    """The others are elsewhere: they ask the first, while one has left its block."""

    def work(ranks):
        with ranks.together():
            if ranks.rank == 1:
                raise DataError("nothing is there")
            ranks.first(lambda: 1)
            raise AssertionError("went on")

    assert [message(error) for error in in_ranks(3, work)] == ["DataError: rank 1: nothing is there"] * 3


def test_an_interruption_of_one_rank_stops_all_at_the_same_place():
    def work(ranks):
        def check():
            if ranks.rank == 1 and done == 3:
                raise Interrupted(number=15)

        done = 0
        try:
            while True:
                done += 1
                ranks.check(check)
        except Interrupted as error:
            return done, error.number, ranks.is_agreed(error)

    assert in_ranks(3, work) == [(3, 15, True)] * 3


def test_all_end_with_the_code_of_the_one_that_failed_and_rank_0_says_why(monkeypatch):
    def work(ranks):
        return ranks.leave(*((1, "no memory") if ranks.rank == 2 else (0, "")))

    assert in_ranks(3, work) == [(1, "rank 2: no memory"), (1, ""), (1, "")]
    assert in_ranks(2, lambda ranks: ranks.leave(2, "the same")) == [(2, "the same"), (2, "")]
    assert in_ranks(2, lambda ranks: ranks.leave(0, "")) == [(0, "")] * 2


def test_a_rank_that_fails_alone_says_so_and_takes_the_others_along(monkeypatch, capsys):
    monkeypatch.setattr(communicator, "GRACE_S", 0.05)
    found = in_ranks(2, lambda ranks: ranks.leave(1, "no memory") if ranks.rank == 1 else None)
    assert isinstance(found[1], Aborted)
    assert found[1].args == (1,)
    assert capsys.readouterr().err == "Error: rank 1: no memory\n"


def test_alone_everything_is_as_if_nobody_had_asked():
    alone, array = Communicator(), np.ones(3)
    alone.sum(array)
    np.testing.assert_array_equal(array, 1)
    assert alone.any(True, 0) == (True, False)
    assert alone.first(lambda: 5) == 5
    assert alone.gather(3) == [3]
    assert alone.leave(1, "text") == (1, "text")
    with pytest.raises(DataError), alone.together():
        raise DataError


# Who is started by whom.


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, (4, 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, (2, 1)),
        ({"SLURM_STEP_NUM_TASKS": "8", "PMIX_RANK": "5", "SLURM_PROCID": "5"}, (8, 5)),
        # A batch script is the only process of its step, and tasks without PMI are not connected.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (1, 0)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"}, (1, 0)),
        ({"PMI_SIZE": "many", "PMI_RANK": "1"}, (1, 0)),
    ],
)
def test_the_launcher_is_found_by_its_variables(environment, expected):
    assert launching.launched(environment) == expected


@pytest.mark.parametrize(("asked", "loads"), [(None, False), ("0", False), ("1", True)])
def test_mpi_is_loaded_only_where_it_is_asked_for(asked, loads):
    code = "import sys; from cupyep.parallel import join; print(type(join()).__name__, 'mpi4py' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI"))}
    environment |= {} if asked is None else {"CUPYEP_MPI": asked}
    blocked = "import sys; sys.modules['mpi4py'] = None; " if loads else ""  # whether it is installed or not
    result = subprocess.run([sys.executable, "-c", blocked + code], env=environment, capture_output=True, text=True)
    if loads:
        assert "MPI cannot be used" in result.stderr
        assert "install cupyep[mpi]" in result.stderr
    else:
        assert result.stdout == "Communicator False\n"


def test_a_launcher_of_another_mpi_is_refused_by_rank_0(monkeypatch):
    from types import ModuleType, SimpleNamespace

    fake = ModuleType("mpi4py")
    world = SimpleNamespace(size=1)
    fake.MPI = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "MPICH Version:      5.0.2\nMPICH ...")
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    for rank, text in enumerate(["started 4 processes, but the MPI library of mpi4py (MPICH 5.0.2) sees 1", ""]):
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
        with pytest.raises(ConfigurationError) as error:
            launching.join.__wrapped__()
        assert text in str(error.value)
        assert bool(str(error.value)) == bool(text)


# Shares of a batch.


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_put_together_are_the_batches_of_one_process(size, shuffle):
    data = quadrant_data(33)  # the last of batches of 8 has 1 sample

    def batches(share):
        generator = np.random.default_rng(3) if shuffle else None
        how = {"augment": shuffle, "shuffle": shuffle, "generator": generator, "share": share}
        return list(Loader(data, "train", 8, "cpu", "float64", **how))

    whole, shares = batches((0, 1)), [batches((rank, size)) for rank in range(size)]
    assert [b.share for b in whole] == [None] * 5
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert sum(part.share[0] for part in parts) == len(batch)
        assert {part.share[1] for part in parts} == {len(batch)}
        assert max(p.share[0] for p in parts) - min(p.share[0] for p in parts) <= 1
        assert all(len(part) == max(part.share[0], 1) for part in parts), "one that has none has one to stand in"
        own = [part for part in parts if part.share[0]]
        for name in ("images", "labels", "index", "view"):
            joined = np.concatenate([getattr(part, name) for part in own])
            np.testing.assert_array_equal(joined, getattr(batch, name))
        if number + 1 < len(whole):
            for rank, part in enumerate(parts):
                np.testing.assert_array_equal(part.coming[0], shares[rank][number + 1].index)


NET = {"classes": 2, "width": 0.02, "precision": "float64", "input_shape": (16, 16, 3), "seed": 1, "feedback": 1.0}
LEARNERS = {
    "ep": lambda net: ep.EquilibriumPropagation(net, 0.4, 6, 4, signals=[ep.LocalError("all")], schedule="synchronous"),
    "ep, classical": lambda net: ep.EquilibriumPropagation(
        net, 0.4, 6, 4, nudge="classical", tolerance=0.002, schedule="synchronous"
    ),
    "bptt": lambda net: ep.BackpropagationThroughTime(net, 6, 4, schedule="synchronous"),
    "bp": ep.Backpropagation,
}


@pytest.mark.filterwarnings("ignore::cupyep.errors.ConvergenceWarning")
@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("samples", [7, 2])
def test_a_step_of_three_ranks_is_that_of_one_process(kind, samples):
    """With 2 samples a rank has none."""
    data = quadrant_data()

    def batch(share):
        return next(iter(Loader(data, "train", samples, "cpu", "float64", share=share)))

    learner = LEARNERS[kind](ep.vgg(5, **NET))
    whole = learner.step(batch((0, 1)))
    means = means_of(whole)

    def work(ranks):
        return step(LEARNERS[kind](ep.vgg(5, **NET)), batch((ranks.rank, ranks.size)), ranks)

    for result, found, count in in_ranks(3, work):
        assert count == samples
        np.testing.assert_allclose(result.gradients.packed, whole.gradients.packed, rtol=1e-10, atol=1e-15)
        assert set(found) == set(means)
        for name in set(means) - {"dead"}:  # which is counted by parts
            np.testing.assert_allclose(found[name], means[name], rtol=1e-10, atol=1e-18, err_msg=name)


def test_an_evaluation_of_three_ranks_is_that_of_one_process():
    """Of 7 test images in batches of 3 the last batch has one, and two ranks have none of it."""
    data = quadrant_data(test=7)

    def batches(share):
        return Loader(data, "test", 3, "cpu", "float64", share=share)

    whole = evaluate(ep.Backpropagation(ep.vgg(5, **NET)), batches((0, 1)))

    def work(ranks):
        return evaluate(ep.Backpropagation(ep.vgg(5, **NET)), batches((ranks.rank, ranks.size)), ranks)

    for found in in_ranks(3, work):
        assert found == pytest.approx(whole, rel=1e-12)


PROBED = {
    "ep": LEARNERS["ep"],
    "ep, sweeps": lambda net: ep.EquilibriumPropagation(net, 0.4, 3, 2, schedule="sweeps"),
    "ep, classical": lambda net: ep.EquilibriumPropagation(net, 0.4, 6, 4, nudge="classical", schedule="synchronous"),
    "bptt": LEARNERS["bptt"],
    "bp": LEARNERS["bp"],
}


@pytest.mark.parametrize("kind", PROBED)
@pytest.mark.parametrize("samples", [7, 2])
def test_a_checkup_of_three_ranks_is_that_of_one_process(kind, samples):
    """With 2 samples a rank has none."""
    data = quadrant_data()

    def look(ranks):
        share = (ranks.rank, ranks.size)
        batch = next(iter(Loader(data, "train", samples, "cpu", "float64", share=share)))
        learner = PROBED[kind](ep.vgg(5, **NET))
        checkup = Checkup(learner, batch, samples)
        return probe_settling(learner, batch, ranks), checkup, ranks

    whole, checkup, alone = look(Communicator())
    checkup.look({"epoch": 1}, [], alone)
    assert list(whole) == {"bp": [], "bptt": ["free"]}.get(kind, ["free", "nudged"])

    def work(ranks):
        probes, shared, _ = look(ranks)
        shared.look({"epoch": 1}, [], ranks)
        return probes, shared.trace

    for probes, trace in in_ranks(3, work):
        assert trace.keys() == checkup.trace.keys()
        for phase in whole:
            found, expected = (each.pop(phase) for each in (trace, dict(checkup.trace)))
            assert found["contraction"] == pytest.approx(expected["contraction"], rel=1e-9)
            np.testing.assert_allclose(found["residual"], expected["residual"], rtol=2e-3)  # of four digits
            assert found["steps"] == expected["steps"]
        assert trace == {name: value for name, value in checkup.trace.items() if name not in whole}
        assert probes.keys() == whole.keys()
        for phase, probe in probes.items():
            for name, value in vars(whole[phase]).items():
                if value is None:
                    assert getattr(probe, name) is None
                    continue
                np.testing.assert_allclose(getattr(probe, name), value, rtol=1e-9, atol=1e-15, err_msg=name)


# Mixtures that are refused.


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"options": {"seed": 3}}, "all ranks need the same --seed; rank 1 has 3, rank 0 0"),
        ({"train": 38}, "all ranks need the same images and labels; rank 1 has "),
        ({"batch": 2}, "--batch-size 2 is less than the 3 ranks"),
        ({"batch": 3}, None),
        ({}, None),
    ],
)
def test_ranks_that_do_not_belong_together_are_refused(other, expected):
    def work(ranks):
        odd = other if ranks.rank == 1 else {}
        config = TrainConfig(**({"batch_size": other.get("batch", 16)} | odd.get("options", {})))
        return check_same(config, quadrant_data(odd.get("train", 40)), ranks)

    for found in in_ranks(3, work):
        assert found is None if expected is None else expected in str(found)


def test_versions_must_be_the_same():
    found = in_ranks(2, lambda ranks: ranks.same(version_of_cupyep=f"0.{ranks.rank}"))
    assert {str(error) for error in found} == {"all ranks need the same version of cupyep; rank 1 has 0.1, rank 0 0.0"}


def test_what_must_be_the_same_and_what_is_each_ranks_own_affair():
    def work(ranks):
        asked, same = {}, ranks.same
        ranks.same = lambda **values: asked.update(values) or same(**values)
        check_same(TrainConfig(data_dir=f"of rank {ranks.rank}"), quadrant_data(40), ranks)
        return asked

    for asked in in_ranks(2, work):
        assert (asked["version_of_cupyep"], asked["version_of_numpy"]) == (ep.__version__, np.__version__)
        assert {"--seed", "--arch", "images_and_labels"} < asked.keys()
        assert not {"--device", "--scratch-mb", "--data-dir", "--teacher"} & asked.keys()


def test_all_ranks_begin_with_the_parameters_of_the_first():
    """Whatever they were drawn from. So does the average that all are judged by."""

    def work(ranks):
        learner = ep.Backpropagation(network(seed=ranks.rank))
        before = {path: array.copy() for path, array in learner.parameters().items()}
        optimizer = ep.SGD(learner.parameters(), ema=0.9)
        share_parameters(learner, optimizer, ranks)
        after = {path: array.copy() for path, array in learner.parameters().items()}
        with optimizer.averaged():
            return before, after, {path: array.copy() for path, array in learner.parameters().items()}

    (first, *_), *others = found = in_ranks(3, work)
    assert any((before["layers.1.weight"] != first["layers.1.weight"]).any() for before, *_ in others)
    for _, *parameters in found:
        for arrays in parameters:
            assert arrays.keys() == first.keys()
            for path, array in arrays.items():
                np.testing.assert_array_equal(array, first[path])


class FakeNccl:
    """Sums the arrays of all ranks when their group ends, as NCCL does on the stream."""

    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = 7, 8, 0

    def __init__(self):
        self.calls = []

    def get_unique_id(self):
        return b"identity"

    def NcclCommunicator(self, size, identity, rank):
        self.calls.append(("made", size, identity, rank))
        return self

    def groupStart(self):
        self.calls.append("start")

    def groupEnd(self):
        self.calls.append("end")

    def allReduce(self, source, target, count, kind, operation, stream):
        self.calls.append((source, target, count, kind, operation, stream))


class FakeCard:
    """As much of a device as ranks ask for."""

    is_gpu = True

    def __init__(self, index, bus):
        from types import SimpleNamespace

        runtime = SimpleNamespace(deviceGetPCIBusId=lambda index: bus)
        stream = SimpleNamespace(ptr=77)
        self.index, self.name, self.used = index, f"cuda:{index}", 0
        self.xp = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream))

    def use(self):
        self.used += 1


@pytest.fixture
def fake_nccl(monkeypatch):
    fake = FakeNccl()
    monkeypatch.setattr(nccl, "library", lambda: fake)
    return fake


def test_nccl_sums_the_arrays_in_place_on_the_stream_of_the_computation(fake_nccl):
    from types import SimpleNamespace

    card = FakeCard(1, "bus")
    add = nccl.NcclSum(card, 1, 4, nccl.new_id())
    assert fake_nccl.calls == [("made", 4, b"identity", 1)]
    assert card.used == 1
    arrays = [
        SimpleNamespace(data=SimpleNamespace(ptr=pointer), size=size, dtype=np.dtype(kind))
        for pointer, size, kind in ((1000, 48, "float32"), (2000, 9, "float64"))
    ]
    add(*arrays)
    expected = ["start", (1000, 1000, 48, 7, 0, 77), (2000, 2000, 9, 8, 0, 77), "end"]
    assert fake_nccl.calls[1:] == expected


@pytest.mark.parametrize(
    ("buses", "expected"),
    [
        (["a", "b", "c"], None),
        (["a", "b", "a"], "ranks 0 and 2 share cuda:0 of "),
        (["a", None, "c"], "rank 1 would compute on cpu of "),
    ],
)
def test_every_rank_has_a_gpu_of_its_own_or_none_has_one(fake_nccl, buses, expected):
    def work(ranks):
        bus = buses[ranks.rank]
        ranks.use(ep.get_device("cpu") if bus is None else FakeCard(0, bus))

    for found in in_ranks(3, work):
        assert found is None if expected is None else expected in str(found)
    assert sum(call[0] == "made" for call in fake_nccl.calls) == (0 if expected else 3)


def test_gpus_without_nccl_are_refused_by_one_line(monkeypatch):
    def missing():
        raise DeviceError("several GPUs need NCCL")

    monkeypatch.setattr(nccl, "library", missing)
    found = in_ranks(2, lambda ranks: ranks.use(FakeCard(ranks.rank, str(ranks.rank))))
    assert [message(error) for error in found] == ["DeviceError: several GPUs need NCCL"] * 2


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ([range(8), range(8, 16), range(16, 24), range(24, 32)], 8),  # as Slurm does with --cpus-per-task=8
        ([range(32)] * 4, 8),
        ([range(16), range(16), range(16, 32), range(16, 32)], 8),  # as Open MPI does with two sockets
    ],
)
def test_ranks_that_are_bound_to_cpus_of_their_own_share_them_with_nobody(bound, expected, monkeypatch):
    monkeypatch.delenv("CUPYEP_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    left = [set(cpus) for cpus in bound]
    monkeypatch.setattr(communicator, "own_cpus", left.pop)
    monkeypatch.setattr(threads, "available_cpus", lambda: len(bound[0]))
    monkeypatch.setattr(threads, "_chosen", None)

    def work(ranks):
        found = ranks.gather(threads.get_threads())
        return found[ranks.rank]

    assert in_ranks(4, work) == [expected] * 4


# The run directory.


def test_the_run_directory_is_written_by_rank_0_and_answers_all(tmp_path):
    config = make_config(TINY, {})

    def work(ranks):
        directory = SharedDirectory(lambda: RunDirectory.create(tmp_path / "run", config), ranks)
        with directory.locked():
            directory.config = make_config(TINY, {"epochs": 7})
            directory.write_config()
            directory.write_settling({"epoch": ranks.rank})
        return directory.path, directory.config.epochs, directory.metrics()

    assert in_ranks(3, work) == [(tmp_path / "run", 7, [])] * 3
    assert RunDirectory.open(tmp_path / "run").config.epochs == 7
    assert (tmp_path / "run" / "settling.json").read_text() == '{"epoch": 0}\n'
    found = in_ranks(2, lambda ranks: SharedDirectory(lambda: RunDirectory.create(tmp_path / "run", config), ranks))
    assert all("holds another run" in str(error) for error in found)


# Trainings.

COMMON = {"arch": "vgg5", "width": 0.02, "batch_size": 12, "epochs": 2, "device": "cpu", "quiet": None}
EXACT = {**COMMON, "precision": "float64", "aug": "le", "scheme": "random", "free_steps": 4, "validation": 10}
PLAIN = {**COMMON, "optimizer": "sgd", "learning_rate": 0.05}


def words(options):
    return [w for name, v in options.items() for w in (f"--{name.replace('_', '-')}", v) if w is not None]


def flat(record):
    """Return the numbers of a record by name, of lists each one."""
    found = {}
    for name, value in record.items():
        if isinstance(value, list):
            found |= {f"{name}.{n}": v for n, v in enumerate(value) if isinstance(v, (int, float))}
        elif isinstance(value, (int, float)):
            found[name] = value
    return {name: value for name, value in found.items() if not name.startswith("dead")}


def assert_near(one, two, tolerance):
    """Two runs have the same records and parameters, but for rounding; dead channels are counted by parts."""
    for first, second in zip(numbers(one), numbers(two), strict=True):
        first, second = flat(first), flat(second)
        assert first.keys() == second.keys()
        assert len(first) > 20
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    one, two = one.load(), two.load()
    assert (one.epoch, one.generators) == (two.epoch, two.generators)
    for path, array in one.parameters.items():
        np.testing.assert_allclose(two.parameters[path], array, rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.fixture
def straight(quadrants, tmp_path):
    """Train in this process; return the run directory."""

    def train(options):
        path = tmp_path / f"straight-{len(list(tmp_path.iterdir()))}"
        config = make_config({name: v for name, v in options.items() if v is not None})
        runs.start_run(config, path, SILENT).run()
        return RunDirectory.open(path)

    return train


@needs_mpi
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_process_does(straight, tmp_path, size):
    """40 images in batches of 12: the last one has 4, and with validation images 6."""
    commands = [["train", *words(options), "--run-dir", tmp_path / name] for name, options in CASES.items()]
    both = [word for command in commands for word in ("then", *command)][1:]
    code, out, err = launched(size, *both)
    assert (code, err) == (0, "")
    assert out.count("after the last epoch") == len(CASES), "one rank speaks"
    for name, options in CASES.items():
        assert_near(straight(options), RunDirectory.open(tmp_path / name), 1e-10 if name == "exact" else 1e-5)


CASES = {"exact": EXACT, "plain": PLAIN}


@needs_mpi
@pytest.mark.slow
def test_ranks_train_the_teacher_together(straight, tmp_path, monkeypatch):
    options = {**PLAIN, "aug": "kd", "teacher_epochs": 2}
    code, out, err = launched(3, "train", *words(options), "--run-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    assert not [p for p in (tmp_path / "cache" / "teachers").iterdir() if p.is_dir()], "its run is not left behind"
    monkeypatch.setenv("CUPYEP_CACHE", str(tmp_path / "another"))
    assert_near(straight(options), RunDirectory.open(tmp_path / "run"), 1e-3)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "halve-lr"])
def test_a_divergence_is_that_of_all_ranks(straight, tmp_path, how):
    options = {**PLAIN, "learning_rate": 1e30, "on_divergence": how}
    code, out, err = launched(3, "train", *words(options), "--run-dir", tmp_path / "run")
    lines = err.splitlines()
    assert code == 1
    assert [line.split(":")[0] for line in lines] == ["Warning"] * (5 if how == "halve-lr" else 0) + ["Error"]
    assert lines[-1].endswith("lower --learning-rate")


FAULTS = {
    "no memory on 1": (1, "Error: rank 1: out of memory (as planted); lower --batch-size or --width"),
    "no data on 1": (1, "Error: rank 1: nothing is there"),
    "other data on 2": (2, "Error: all ranks need the same images and labels; rank 2 has "),
    "full disk on 0": (1, "Error: cannot use 'checkpoint.h5': No space left on device"),
    "a defect on 1": (1, "Error: rank 1: TypeError"),
}
SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in list(FAULTS)[1:]]


@needs_mpi
@pytest.mark.parametrize("fault", [list(FAULTS)[0], *SLOW])
def test_what_goes_wrong_on_one_rank_ends_all_with_one_line(tmp_path, fault):
    code, expected = FAULTS[fault]
    found, out, err = launched(3, "train", *words(PLAIN), "--run-dir", tmp_path / "run", fault=fault)
    assert found == code
    lines = [line for line in err.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert lines[0].startswith(expected)
    assert ("Traceback" in err) == (fault == "a defect on 1")


@needs_mpi
def test_a_run_that_was_stopped_on_one_rank_goes_on_with_another_number_of_ranks(straight, quadrants, tmp_path):
    """The signal comes to rank 1 in the third batch, of four an epoch."""
    path = tmp_path / "run"
    code, out, err = launched(3, "train", *words(EXACT), "--run-dir", path, fault="a signal to 1")
    assert (code, err) == (143, f"Error: rank 1: interrupted; go on with: cupyep train --run-dir {path} --resume\n")
    saved = RunDirectory.open(path).load()
    assert (saved.epoch, saved.batch) == (0, 3)
    runs.resume_run(path, {}, SILENT).run()
    assert_near(straight(EXACT), RunDirectory.open(path), 1e-10)


@needs_mpi
@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(straight, quadrants, tmp_path, monkeypatch):
    path = tmp_path / "run"
    trainer = runs.start_run(make_config({n: v for n, v in EXACT.items() if v is not None}), path, SILENT)
    monkeypatch.setattr(trainer.interruptions, "check", Stop(2))
    with pytest.raises(Interrupted):
        trainer.run()
    code, out, err = launched(2, "train", "--run-dir", path, "--resume", "--quiet")
    assert (code, err) == (0, "")
    assert_near(straight(EXACT), RunDirectory.open(path), 1e-10)


class Stop:
    """Raises `Interrupted` when it is asked for the n-th time."""

    def __init__(self, times):
        self.times = times

    def __call__(self):
        self.times -= 1
        if self.times == 0:
            raise Interrupted


@needs_mpi
@pytest.mark.slow
def test_commands_under_mpi():
    code, out, err = launched(3, "info")
    assert (code, err) == (0, "")
    assert [line.split(" on ")[0] for line in out.splitlines()] == [f"rank {n} of 3" for n in range(3)]
    code, out, err = launched(2, "train", "--no-such-option")
    assert (code, out) == (2, "")
    assert err.count("Error: no such option") == 1
    code, out, err = launched(2, "evaluate", "runs/mine")
    assert (code, err.count("Error: cupyep evaluate is for one process")) == (2, 1)


LONG = {**EXACT, "epochs": 150, "checkpoint_minutes": 0}  # longer than all kills together
KILLS = {0: 10, 1: 20}  # by rank


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_rank_takes_the_others_along_and_the_run_goes_on_bit_for_bit(tmp_path, victim, number):
    """At random moments, again and again, until the run is done."""
    rng = np.random.default_rng(victim + number)
    code, _, err = launched(2, "train", *words(LONG), "--run-dir", tmp_path / "straight")
    assert (code, err) == (0, "")
    path, killed = tmp_path / "run", 0
    while True:
        started = (path / "config.toml").exists()
        how = ["--resume", "--quiet"] if started else words(LONG)
        process = launch(2, "train", "--run-dir", path, *how)
        if killed < KILLS[victim]:
            time.sleep(rng.uniform(0.3, 3.0))
            pid = next((pid for pid, rank in ranks_of(process.pid).items() if rank == victim), None)
            if pid is not None:
                os.kill(pid, number)
                killed += 1
        begin = time.monotonic()
        out, err = process.communicate(timeout=60)
        if process.returncode == 0 or "epochs are done" in err:
            break
        if number == signal.SIGKILL or "interrupted" not in err:
            assert time.monotonic() - begin < 30
    assert killed == KILLS[victim]
    assert not ranks_of(process.pid)
    one, two = RunDirectory.open(tmp_path / "straight"), RunDirectory.open(path)
    assert numbers(one) == numbers(two)
    assert_same_state(one.load(), two.load())


def ranks_of(launcher):
    """Return the processes that a launcher has started and that are alive: process id -> rank."""
    found = {}
    for folder in os.scandir("/proc"):
        if folder.name.isdecimal() and is_below(int(folder.name), launcher):
            try:
                with open(f"/proc/{folder.name}/environ") as file:
                    variables = dict(v.partition("=")[::2] for v in file.read().split("\0"))
            except OSError:
                continue
            size, rank = launching.launched(variables)
            if size > 1:
                found[int(folder.name)] = rank
    return found


def is_below(pid, ancestor):
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == ancestor:
            return True
    return False
