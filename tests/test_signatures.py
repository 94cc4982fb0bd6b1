"""Every argument of everything public, replaced by values of all wrong kinds: the package's own error, or a meaning.

The cases come from the signatures. `VALID` holds one call that works of every constructor, function and method; a
public name without one makes `test_everything_has_a_call` fail. `INNER` names what the package calls in its loops with
arrays of its own, where nothing may be looked at.
"""

import functools
import inspect
import math
import re
import warnings

import numpy as np
import pytest

import cupyep as ep
from cupyep import optim
from cupyep.data import Split

SHAPE, CLASSES, N = (4, 5, 3), 3, 3
WRONG = {
    "none": None,
    "true": True,
    "minus one": -1,
    "zero": 0,
    "half": 0.5,
    "nan": math.nan,
    "infinity": math.inf,
    "huge": 10**400,
    "longer than Python prints": 10**5000,
    "text": "nonsense",
    "bytes": b"nonsense",
    "empty list": [],
    "list": [None],
    "dict": {"a": 1},
    "object": object(),
    "complex array": np.zeros((2, 2), complex),
    "object array": np.array([None, object()]),
    "empty array": np.zeros(0),
    "array": np.full((2, 2), 0.5),
}
INNER = {
    r"(Activation|Clip|Tanh)\.\w+": "the update calls it on arrays of its own",
    r"(Edge|Conv2d|Linear|Identity)\.\w+": "settling and learning call it on arrays of their own",
    r"(LossTerm|Head)\.\w+": "settling calls it on arrays of its own",
    r"(CrossEntropy|SquaredError)\.\w+": "heads call it on arrays of their own",
    r"Batch.(placed|one_hot)|TeacherFile.(table|places|expect)": "how learners and signals keep targets on the device",
    r"Device\.\w+": "transfers of the package's own arrays",
    r"\w+\.(bind|make_term|target|loss|gradient|nudges|term|targets)": "how networks and signals work together",
    r"(Augmenter|LocalError|\w*Distillation)\.describe": "without arguments",
    r"Network\.(free_shape|nudged_shape|run_parts|settles|checked_feedback|outputs|wide|check_start)": "learners call",
    r"Network\.judges": "scores and predict call",
    r"\w+\.(parts|needs|settled|betas|judge)": "how learners, memory and training work together",
    r"\w+\.facts": "without arguments",
    r"(State|StepResult|SettleStats|Nudge|FitResult)(\.\w+)?": "a record that the package makes",
    r"HopfieldEnergy\.(correlate|pass_up|add_\w+|winners_at)": "phases and learners call it",
    r"Graph\.(weights|feedback|label|describe|\w*depths)": "what follows from a graph that was looked at",
    r"Connection": "looked at by `Graph`",
    r"\w+\.make_weights": "without arguments",
    r"SGD.slots": "of a momentum that was looked at",
    r"array_module": "asked for the module of any array at every step; a TypeError is its answer (docstring)",
    r"Batch": "looked at by the gate, `Network.batch`",
    r"Head|Edge|LossTerm|Activation": "base classes, and what networks and signals make",
}


class World:
    """What valid calls are made of."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.folder, self.files = folder, 0
        self.x = rng.standard_normal((N, *SHAPE)).astype(np.float32)
        self.y = np.arange(N) % CLASSES
        self.net = self.network()
        self.batch = ep.Batch(self.x, self.y, np.arange(N), np.zeros(N, np.uint8))
        images = rng.integers(0, 256, (N, *SHAPE)).astype(np.uint8)
        self.split = Split("train", images, self.y)
        self.test = Split("test", images, self.y)
        self.data = ep.Dataset.from_splits("quadrants", ("a", "b", "c"), self.split, self.test, pad=1)
        self.file = folder / "teacher.h5"
        with self.writer(self.file) as writer:
            for split in ("train", "test"):
                writer.write(split, "identity", 0, rng.standard_normal((N, CLASSES)), {"f": np.ones((N, 2, 2, 4))})
        self.teacher = ep.TeacherFile(self.file)
        self.energy, self.states = self.net.energy, [np.full((N, *s), 0.5, np.float32) for s in self.net.state_shapes]
        self.free = self.net.settle(self.x, steps=2, schedule="synchronous")
        self.model = folder / "network.h5"
        self.net.save(self.model)
        self.theta = {"w": np.ones((2, 3), np.float32)}

    @staticmethod
    def edges():
        return [ep.Conv2d(SHAPE, 4, pooling="max"), ep.Linear((2, 2, 4), 6)]

    def network(self):
        return ep.Network(self.edges(), CLASSES, device="cpu", feedback=1.0)

    def writer(self, path):
        return ep.TeacherWriter(path, self.data, "a teacher", ["identity"], {"f": (2, 2, 4)})

    def fresh(self):
        """Return the name of a file that is not there yet."""
        self.files += 1
        return self.folder / f"{self.files}.h5"

    def ep(self, **options):
        return ep.EquilibriumPropagation(
            self.net, free_steps=2, nudged_steps=2, **{"schedule": "synchronous", **options}
        )

    def bptt(self):
        return ep.BackpropagationThroughTime(self.net, free_steps=2, unrolled_steps=2, schedule="synchronous")

    def signal(self):
        return ep.LocalError([1])

    def loader(self):
        return ep.Loader(self.data, "train", 2, "cpu", np.float32)


def learner_calls(make):
    both = lambda w: {"x": w.x, "targets": w.y}  # noqa: E731
    return {
        "step": lambda w: (make(w).step, both(w)),
        "evaluate": lambda w: (make(w).evaluate, both(w)),
        "scores": lambda w: (make(w).scores, {"batch": w.batch}),
        "parameters": lambda w: (make(w).parameters, {}),
    }


def owned(name, calls):
    return {f"{name}.{method}": call for method, call in calls.items()}


VALID = {
    "get_activation": lambda w: (ep.get_activation, {"activation": "relu"}),
    "get_device": lambda w: (ep.get_device, {"device": "cpu"}),
    "get_threads": lambda w: (ep.get_threads, {}),
    "set_threads": lambda w: (ep.set_threads, {"threads": None}),
    "register_activation": lambda w: (ep.register_activation, {"activation": ep.Clip("mine", 1.0, 0.0, 2.0)}),
    "register_architecture": lambda w: (ep.register_architecture, {"name": "mine", "layers": "4 4"}),
    "register_signal": lambda w: (ep.register_signal, {"name": "mine", "maker": ep.LocalError}),
    "gpu_status": lambda w: (ep.gpu_status, {}),
    "Device": lambda w: (ep.Device, {"name": "cpu"}),
    "Clip": lambda w: (ep.Clip, {"name": "clip", "slope": 1.0, "low": 0.0, "high": 1.0}),
    "Tanh": lambda w: (ep.Tanh, {"name": "smooth", "center": 0.0, "height": 1.0, "rate": 1.0}),
    "CrossEntropy": lambda w: (ep.CrossEntropy, {}),
    "SquaredError": lambda w: (ep.SquaredError, {}),
    "Conv2d": lambda w: (ep.Conv2d, {"in_shape": SHAPE, "channels": 4, "pooling": "max"}),
    "Linear": lambda w: (ep.Linear, {"in_shape": (2, 3), "units": 4}),
    "Identity": lambda w: (ep.Identity, {"in_shape": SHAPE}),
    "Graph": lambda w: (ep.Graph, {"layers": [ep.Connection("image", "a", ep.Linear((3,), 2))]}),
    "Graph.node": lambda w: (w.net.graph.node, {"name": 1}),
    "Network": lambda w: (
        ep.Network,
        {"layers": w.edges(), "classes": CLASSES, "device": "cpu"},
    ),
    "Network.batch": lambda w: (w.net.batch, {"x": w.x, "targets": w.y}),
    "Network.labelled": lambda w: (w.net.labelled, {"x": w.x, "targets": w.y}),
    "Network.describe": lambda w: (w.net.describe, {}),
    "Network.parameters": lambda w: (w.net.parameters, {}),
    "Network.load_parameters": lambda w: (w.network().load_parameters, {"parameters": w.net.parameters()}),
    "Network.save": lambda w: (w.net.save, {"path": w.folder / "saved.h5"}),
    "Network.load": lambda w: (ep.Network.load, {"path": w.model, "device": "cpu"}),
    "Network.settle": lambda w: (
        w.net.settle,
        {"x": w.x, "start": w.free, "targets": w.y, "beta": 0.5, "nudge": "deviation", "steps": 2},
    ),
    "Network.settle_free": lambda w: (w.net.settle_free, {"batch": w.batch, "steps": 2, "schedule": "synchronous"}),
    "Network.settle_nudged": lambda w: (
        w.net.settle_nudged,
        {
            "batch": w.batch,
            "free": w.free,
            "betas": [0.5],
            "nudges": w.net.nudges(w.batch),
            "form": "classical",
            "steps": 2,
            "schedule": "synchronous",
        },
    ),
    "Network.scores": lambda w: (w.net.scores, {"x": w.x, "steps": 2}),
    "Network.predict": lambda w: (w.net.predict, {"x": w.x, "steps": 2}),
    "HopfieldEnergy": lambda w: (
        ep.HopfieldEnergy,
        {
            "layers": w.net.layers,
            "activation": w.net.activation,
            "feedback": 1.0,
            "device": w.net.device,
            "precision": w.net.precision,
        },
    ),
    "HopfieldEnergy.phi": lambda w: (w.energy.phi, {"x": w.x, "layers": w.states}),
    "HopfieldEnergy.value": lambda w: (
        w.energy.value,
        {"x": w.x, "layers": w.states, "nudges": w.net.nudges(w.batch), "beta": 0.5},
    ),
    "HopfieldEnergy.force": lambda w: (
        w.energy.force,
        {"x": w.x, "layers": w.states, "nudges": w.net.nudges(w.batch), "beta": 0.5},
    ),
    "HopfieldEnergy.parameter_gradient": lambda w: (w.energy.parameter_gradient, {"x": w.x, "layers": w.states}),
    "vgg": lambda w: (ep.vgg, {"depth": 5, "width": 0.01, "device": "cpu", "input_shape": (16, 16, 1)}),
    "build": lambda w: (ep.build, {"arch": "vgg5", "width": 0.01, "device": "cpu"}),
    "EquilibriumPropagation": lambda w: (
        ep.EquilibriumPropagation,
        {"network": w.net, "generator": np.random.default_rng(0)},
    ),
    **owned("EquilibriumPropagation", learner_calls(lambda w: w.ep())),
    "EquilibriumPropagation.settle_free": lambda w: (w.ep().settle_free, {"batch": w.batch}),
    "EquilibriumPropagation.settle_nudged": lambda w: (
        w.ep().settle_nudged,
        {"batch": w.batch, "free": w.free, "betas": [0.5], "nudges": w.net.nudges(w.batch)},
    ),
    "EquilibriumPropagation.step_from": lambda w: (w.ep().step_from, {"batch": w.batch, "free": w.free}),
    "Backpropagation": lambda w: (ep.Backpropagation, {"network": w.net}),
    **owned("Backpropagation", learner_calls(lambda w: ep.Backpropagation(w.net))),
    "BackpropagationThroughTime": lambda w: (ep.BackpropagationThroughTime, {"network": w.net}),
    **owned("BackpropagationThroughTime", learner_calls(lambda w: w.bptt())),
    "BackpropagationThroughTime.settle_free": lambda w: (w.bptt().settle_free, {"batch": w.batch}),
    "BackpropagationThroughTime.step_from": lambda w: (w.bptt().step_from, {"batch": w.batch, "start": w.free}),
    "BackpropagationThroughTime.step_from_equilibrium": lambda w: (
        w.bptt().step_from_equilibrium,
        {"batch": w.batch, "free": w.free, "max_iterations": 2},
    ),
    "check_gradients": lambda w: (
        ep.check_gradients,
        {"network": w.net, "x": w.x, "y": w.y, "free_steps": 2, "nudged_steps": 2},
    ),
    "check_signal": lambda w: (ep.check_signal, {"signal": w.signal(), "network": w.net, "batch": w.batch}),
    "check_activation": lambda w: (ep.check_activation, {"activation": w.net.activation}),
    "check_edge": lambda w: (ep.check_edge, {"edge": ep.Linear((2, 3), 4)}),
    "Augmenter": lambda w: (ep.Augmenter, {"layers": [1]}),
    "LocalError": lambda w: (ep.LocalError, {"layers": [1]}),
    "Distillation": lambda w: (ep.Distillation, {"teacher": w.teacher, "layers": [1]}),
    "Distillation.from_file": lambda w: (ep.Distillation.from_file, {"path": w.file, "layers": [1]}),
    "FeatureDistillation": lambda w: (ep.FeatureDistillation, {"teacher": w.teacher, "features": {1: "f"}}),
    **{
        f"{name}.anneal": lambda w: (w.signal().anneal, {"progress": 0.5})
        for name in ("Augmenter", "LocalError", "Distillation", "FeatureDistillation")
    },
    **{
        f"{name}.parameters": lambda w: (w.signal().parameters, {})
        for name in ("Augmenter", "LocalError", "Distillation", "FeatureDistillation")
    },
    "SGD": lambda w: (ep.SGD, {"parameters": w.theta}),
    "Adam": lambda w: (ep.Adam, {"parameters": w.theta}),
    "AdamW": lambda w: (ep.AdamW, {"parameters": w.theta}),
    **{
        f"{name}.{method}": call
        for name, make in (("SGD", ep.SGD), ("Adam", ep.Adam), ("AdamW", ep.AdamW))
        for method, call in {
            "step": lambda w, make=make: (make(w.theta).step, {"gradients": w.theta}),
            "state_dict": lambda w, make=make: (make(w.theta).state_dict, {}),
            "averaged": lambda w, make=make: (make(w.theta, ema=0.9).averaged, {}),
            "load_state_dict": lambda w, make=make: (
                make(w.theta).load_state_dict,
                {"state": make(w.theta).state_dict()},
            ),
        }.items()
    },
    "constant": lambda w: (optim.constant, {"progress": 0.5}),
    "cosine": lambda w: (optim.cosine, {"progress": 0.5}),
    "step_decay": lambda w: (optim.step_decay, {"progress": 0.5}),
    "Split": lambda w: (Split, {"name": "train", "images": w.split.images, "labels": w.y}),
    "Split.select": lambda w: (w.split.select, {"rows": np.arange(2)}),
    "Split.take": lambda w: (w.split.take, {"count": 2}),
    "Split.balanced": lambda w: (w.split.balanced, {"count": 2}),
    "Dataset": lambda w: (
        ep.Dataset,
        {
            "name": "mine",
            "classes": ("a", "b", "c"),
            "train": w.split,
            "test": w.test,
            "mean": np.zeros(3, np.float32),
            "std": np.ones(3, np.float32),
        },
    ),
    "Dataset.from_splits": lambda w: (
        ep.Dataset.from_splits,
        {"name": "mine", "classes": ("a", "b", "c"), "train": w.split, "test": w.test},
    ),
    "Dataset.from_arrays": lambda w: (
        ep.Dataset.from_arrays,
        {"x": np.zeros((6, 4, 4, 3), np.uint8), "y": np.arange(6) % 3},
    ),
    "Dataset.from_torch": lambda w: (
        ep.Dataset.from_torch,
        {"samples": [(np.zeros((4, 4, 3), np.uint8), n % 3) for n in range(6)]},
    ),
    "Dataset.split": lambda w: (w.data.split, {"name": "train"}),
    "load_dataset": lambda w: (ep.load_dataset, {"name": "digits"}),
    "fit": lambda w: (
        functools.partial(ep.fit, epochs=1, batch_size=2, crop=False, flip=False),
        {"net": w.network(), "data": w.data, "run_dir": w.fresh(), "quiet": True},
    ),
    "Loader": lambda w: (
        ep.Loader,
        {
            "dataset": w.data,
            "split_name": "train",
            "batch_size": 2,
            "device": "cpu",
            "dtype": np.float32,
            "shuffle": True,
            "generator": np.random.default_rng(0),
        },
    ),
    "Loader.batches": lambda w: (w.loader().batches, {}),
    "Batch.part": lambda w: (w.batch.part, {"rows": slice(0, 1)}),
    "TeacherFile": lambda w: (ep.TeacherFile, {"path": w.file}),
    "TeacherFile.close": lambda w: (ep.TeacherFile(w.file).close, {}),
    "TeacherFile.check": lambda w: (w.teacher.check, {"dataset": w.data}),
    "TeacherFile.by_chance": lambda w: (w.teacher.by_chance, {}),
    "TeacherFile.count": lambda w: (w.teacher.count, {"split_name": "train"}),
    "TeacherFile.accuracy": lambda w: (w.teacher.accuracy, {"split_name": "train"}),
    "TeacherFile.logits": lambda w: (w.teacher.logits, {"split_name": "train", "index": np.arange(2), "view": 0}),
    "TeacherFile.feature": lambda w: (
        w.teacher.feature,
        {"layer": "f", "split_name": "train", "index": np.arange(2), "view": 0},
    ),
    "TeacherWriter": lambda w: (
        ep.TeacherWriter,
        {"path": w.fresh(), "dataset": w.data, "teacher": "me", "features": {"f": (2, 2, 4)}},
    ),
    "TeacherWriter.write": lambda w: (
        w.writer(w.fresh()).write,
        {
            "split_name": "train",
            "view_name": "identity",
            "start": 0,
            "logits": np.ones((2, CLASSES)),
            "features": {"f": np.ones((2, 2, 2, 4))},
        },
    ),
    "TeacherWriter.finish": None,
    "TeacherWriter.abort": None,
}
EXTRA = {"Split": Split, "constant": optim.constant, "cosine": optim.cosine, "step_decay": optim.step_decay}


def public():
    """Return the callables that the package offers, by name: functions, constructors, methods."""
    found = {}
    for name, thing in ({name: getattr(ep, name) for name in ep.__all__} | EXTRA).items():
        if not callable(thing) or (isinstance(thing, type) and issubclass(thing, BaseException)):
            continue
        found[name] = thing
        if isinstance(thing, type):
            members = inspect.getmembers(thing, lambda m: inspect.isfunction(m) or inspect.ismethod(m))
            found |= {
                f"{name}.{key}": member
                for key, member in members
                if not key.startswith("_") and member.__module__.startswith("cupyep")
            }
    return found


def inner(name):
    return any(re.fullmatch(pattern, name) for pattern in INNER)


def test_everything_has_a_call():
    names = {name for name in public() if not inner(name)}
    assert sorted(names - VALID.keys()) == [], "new public names need a valid call in VALID"
    assert sorted(VALID.keys() - names) == []


def arguments(function):
    """Return the parameters of a signature that can be replaced by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: p for key, p in inspect.signature(function).parameters.items() if p.kind in named}


# What looks wrong and is not: name, argument, kinds of `WRONG`, and why.
FRACTIONS = "beta|gain|feedback|tolerance|relaxation|temperature|width|kappa|progress|learning_rate|momentum|epsilon"
MEANINGFUL = (
    (r"set_threads", "threads", "none", "the default"),
    (r"register_(architecture|signal)", "name", "text", "a name"),
    (r"register_architecture", "layers", "text", "registered just before, as a name"),
    (r".*", FRACTIONS + "|weight_decay|factor|ema|clip_unit_norm|label_smoothing", "half", "a real number"),
    (r"Device|get_device", "scratch_mb", "half", "a real number"),
    (r"Clip|Tanh", "slope|low|high|center|height|rate", "half", "a real number"),
    (r"Clip|Tanh", "low|center", "minus one|zero", "a place on the axis"),
    (r"Clip", "high", "infinity", "ReLU has no upper end"),
    (r".*", "seed|_seed", "zero|huge|longer than Python prints", "NumPy takes integers of any length as seeds"),
    (r"HopfieldEnergy.*", "beta", "zero|minus one", "the energy is that of any nudge"),
    (r"Network.settle", "beta", "minus one", "the nudge away from the target"),
    (
        r".*",
        "kappa|progress|momentum|weight_decay|label_smoothing|factor|padding|pad|view|start",
        "zero",
        "its range begins at 0",
    ),
    (r".*", "signals|nudges", "empty list|empty array", "a sequence of none"),
    (r".*", "record|learned|nesterov|flip|augment|shuffle|balance|exact|channels_first", "true", "a flag"),
    (r"Clip|Tanh|Dataset.*|Device|TeacherWriter", "name|teacher|reason|fingerprint", "text", "free text"),
    (r"Network.save|TeacherWriter", "path", "text", "a file that appears"),
    (r"fit", "run_dir", "text", "a folder"),
    (r"fit", "resume|quiet", "true", "they may be"),
    (r"load_dataset|Dataset.from_arrays", "test_fraction", "half", "a share"),
    (r"load_dataset", "data_dir", "text", "digits need no folder"),
)
ALIASES = {
    "x": "image",
    "lsuv": "image",
    "batch": "image",
    "targets": "labels",
    "y": "labels",
    "arch": "architecture",
    "path": "file",
}


def meaningful(name, argument, kind):
    return any(all(map(re.fullmatch, patterns, (name, argument, kind))) for *patterns, _ in MEANINGFUL)


def says_which(argument, name, error):
    """Return whether a message is one line that names the argument, or what it is called in words."""
    said, words = re.sub("[-_ ]+", " ", str(error)), {argument, ALIASES.get(argument, argument), argument.rstrip("s")}
    words |= {"device", "data set", "split"} if argument == "name" else set()
    words |= {"layer"} if argument == "name" else set()
    words |= {"rows"} if argument == "start" else set()
    words |= {"no network at"} if argument == "path" else set()
    words |= {argument.split("_")[0]} if argument in ("split_name", "view_name") else set()
    return "\n" not in str(error) and any(word.replace("_", " ") in said for word in words)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", [name for name, call in VALID.items() if call])
def test_wrong_values(world, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, valid = VALID[name](world)
    function(**valid)
    wrong = []
    for argument, parameter in arguments(function).items():
        for kind, value in WRONG.items():
            if value is parameter.default:
                continue
            call, valid = VALID[name](world)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    call(**valid | {argument: value})
                except ep.CupyepError as error:
                    if not says_which(argument, name, error):
                        wrong.append(f"{argument}, {kind}: says '{error}'")
                except Exception as error:  # noqa: BLE001
                    wrong.append(f"{argument}, {kind}: {type(error).__name__}: {error}")
                else:
                    if not meaningful(name, argument, kind):
                        wrong.append(f"{argument}, {kind}: taken")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64])
def test_integers_of_numpy_are_integers(kind):
    edge = ep.Conv2d((kind(4), kind(4), kind(3)), kind(2), kernel=kind(3), stride=kind(1))
    assert edge.out_shape == (4, 4, 2)
    assert type(edge.channels) is int


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32])
def test_numbers_of_numpy_are_numbers(kind):
    assert ep.LocalError([1], kappa=kind(2)).kappa == 2.0
