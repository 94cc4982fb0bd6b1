"""What a network is before it settles: graph, activation, feedback weight, readout, parameters by path, memory, and how
it settles unless it is told otherwise."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from cupyep import errors
from cupyep.activations import Activation, get_activation
from cupyep.backend import PRECISIONS, Device, get_device, get_precision, threads
from cupyep.backend.threads import Turns, number_for, one_blas_thread, run_parts, works_for
from cupyep.batch import Batch
from cupyep.energy import HopfieldEnergy
from cupyep.errors import choose, flag, instance, integer, is_number, items, number, require
from cupyep.graph import Connection, Graph
from cupyep.heads import Head, readout_window
from cupyep.layers import Edge, Identity
from cupyep.losses import get_loss
from cupyep.memory.workspace import Effective, Memory
from cupyep.ops.conv import chunked
from cupyep.program import SCHEDULES
from cupyep.settling import WEAK, check_relaxation, default_relaxation, default_steps
from cupyep.state import State
from cupyep.weights import PARAMETRISATIONS

JUDGING = ("steps", "schedule", "tolerance", "relaxation", "check_every", "record")
SETTLING = ("steps", "schedule", "relaxation", "tolerance", "unrolled_steps", "feedforward")
Method = TypeVar("Method", bound="Callable[..., Any]")


def exclusive(method: Method) -> Method:
    """Let one thread at a time into a network, or into the one that a learner is of: all share its memory."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **options: Any) -> Any:
        network = getattr(self, "network", self)
        if works_for(network):  # for the thread that holds the lock
            return method(self, *args, **options)
        with network.lock, one_blas_thread():
            return method(self, *args, **options)

    return cast(Method, locked)


class Structure:
    """The fixed parts of a network and its trained arrays; `cupyep.network.Network` is one that settles.

    Parameters
    ----------
    layers, classes, activation, loss, feedback, gain, weights, seed, device, precision, readout_pool, exact
        See `Network`.
    """

    def __init__(
        self,
        layers: Graph | Sequence[Edge] | Sequence[Connection],
        classes: int,
        *,
        activation: str | Activation = "hard_sigmoid",
        loss: str = "cross_entropy",
        feedback: float = WEAK,
        gain: float | Sequence[float] = 1.0,
        weights: str = "plain",
        seed: int = 0,
        device: str | Device = "auto",
        precision: str = "float32",
        readout_pool: int | str | None = None,
        exact: bool = False,
    ):
        self.lock = threading.RLock()
        self._energy: HopfieldEnergy | None = None
        self.graph = layers if isinstance(layers, Graph) else Graph(layers)
        self.classes = integer("classes", classes)
        self.activation = get_activation(activation)
        self.device = get_device(device)
        self.device.use()  # another GPU may be the current one
        self.precision = get_precision(choose("precision", precision, PRECISIONS), flag("exact", exact))
        self.dtype = self.precision.number
        self.feedback = self.checked_feedback(feedback)
        self._check_edges_are_new()
        self.readout = self._make_readout(loss, readout_pool)
        self.weights = choose("parametrisation of weights", weights, PARAMETRISATIONS)
        self._initialize(gain, seed)
        self.config: dict[str, Any] = {}
        self._settling: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in ("lock", "_memories", "effective")}
        return {"device": self.device} | own | {"_energy": None}  # first: CuPy unpickles arrays on the current GPU

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def checked_feedback(self, feedback: float) -> float:
        """Return `feedback`, or raise ConfigurationError if it is not one, or too weak for so many layers."""
        feedback = number("feedback (lambda)", feedback, above=0, high=1)
        largest = max(self.graph.weights(feedback))
        limit = float(np.finfo(self.dtype).max) ** 0.75
        require(
            largest < limit,
            f"feedback {feedback} in {max(self.graph.depths)} layers makes layer weights of {largest:.0e}, too large "
            f"for {self.dtype}; raise the feedback or use precision float64",
        )
        return feedback

    def _make_readout(self, loss: str, pool: int | str | None) -> Head:
        shape, criterion = self.state_shapes[-1], get_loss(loss)
        if criterion.name == "cross_entropy":
            pool = readout_window(pool, shape)
            return Head(self.depth, shape, criterion, self.classes, bias=True, learned=True, pool=pool)
        require(pool is None, "with squared error the output is a state: there is no readout to pool for")
        require(
            shape == (self.classes,),
            f"squared error needs a last layer of shape ({self.classes},), the classes; it gives {shape}",
        )
        return Head(self.depth, shape, criterion, self.classes, identity=True)

    def _check_edges_are_new(self) -> None:
        for c in self.graph.connections:
            require(
                isinstance(c.edge, Identity) or c.edge.reads_image is None,
                f"the edge from {c.below} to {c.above} has the weights of another network; make new edges for each: "
                "weights are not shared",
            )

    def _initialize(self, gain: float | Sequence[float], seed: int) -> None:
        generator = np.random.default_rng(errors.seed("seed", seed))
        count = len(self.layers)
        gains = [gain] * count if is_number(gain) else items("gain", gain)
        require(len(gains) == count, f"give one gain or {count}, one a layer, not {len(gains)}")
        gains = [number("gain", each, above=0) for each in gains]  # before an edge is this network's
        for edge, layer_gain, below in zip(self.layers, gains, self.graph.below, strict=True):
            edge.reads_image = below == 0
            more = {} if self.weights == "plain" else {"weights": self.weights}  # a user's own edge may know only that
            edge.initialize(generator, layer_gain, self.device, self.dtype, **more)
        self.readout.initialize(generator, 1.0, self.device, self.dtype)
        self.readout.prepare(self.precision)

    @property
    def layers(self) -> list[Edge]:
        """The edge of each connection, in the order of the nodes above."""
        return self.graph.edges

    @property
    def depth(self) -> int:
        """Number of nodes L, the state layers."""
        return len(self.graph.names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (H, W, C) of an image."""
        return self.graph.input_shape

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of s^1 .. s^L without the batch axis."""
        return self.graph.shapes

    @property
    def energy(self) -> HopfieldEnergy:
        """The energy that this network's free phase settles in."""
        made_of = (self.activation, self.feedback)
        if self._energy is None or (self._energy.activation, self._energy.feedback) != made_of:
            self.checked_feedback(self.feedback)  # which may have been assigned
            self._energy = HopfieldEnergy(self.graph, *made_of, self.device, self.precision)
        return self._energy

    def __repr__(self) -> str:
        pool = f"average pool {self.readout.pool}, " if self.readout.pool else ""
        inner = math.prod(self.readout.inner_shape)
        readout = "state" if self.readout.identity else f"{pool}Linear({inner} -> {self.classes})"
        where = f"{self.precision.name}, {self.device.name}"
        lines = [f"Network({self.activation.name}, feedback {self.feedback:g}, {where}"]
        for c in self.graph.connections:
            lines.append(f"  {c.above}: {c.edge!r}" if self.graph.is_chain else f"  {c.below} to {c.above}: {c.edge!r}")
        return "\n".join([*lines, f"  readout: {readout}, {self.readout.criterion.name})"])

    @functools.cached_property
    def _memories(self) -> dict[int, Memory]:
        return {}

    @functools.cached_property
    def effective(self) -> Effective:
        """What is made of the parameters, once while they are constant."""
        return Effective(self.layers, self.device.xp)

    @property
    def memory(self) -> Memory:
        """What settling and learning need beside the parameters, in this thread."""
        number = number_for(self)
        if number not in self._memories:
            self._memories[number] = Memory(self.graph, self.device, self.precision, self.effective)
        return self._memories[number]

    def run_parts(self, batch: Batch, work: Callable[[Batch, int, Turns], Any], most: int | None = None) -> list[Any]:
        """Return what `work` makes of each part of a batch: of the part, its number, and turns in their order.

        On a CPU each is done by a thread with memory of its own (`cupyep.backend.threads`); on a GPU one after the
        other. `most` is the largest part, see `parts`. Parameters must not change meanwhile.
        """
        parts = [batch.part(rows) for rows in self.parts(len(batch.images), most)]

        def of(number: int, turns: Turns) -> Any:
            with self.memory.at_work():
                return work(parts[number], number, turns)

        _ = self.energy  # made before threads ask for it
        with self.effective.constant():  # a new thread would launch on GPU 0, and captures share one stream
            return run_parts(self, len(parts), of, 1 if self.device.is_gpu else None)

    def parts(self, samples: int, most: int | None = None) -> list[slice]:
        """Return the rows of a batch that are processed together, nearly equally many each, the longest first.

        At most `most`, by default `threads.PART` on a CPU and all on a GPU.
        """
        return [rows for rows, _ in chunked(samples, most or (samples if self.device.is_gpu else threads.PART))]

    @property
    def settling(self) -> dict[str, Any]:
        """How this network settles unless it is told otherwise: ``steps``, ``schedule``, ``relaxation``.

        And how it judges (`Network.scores`, `Network.predict`), as its training did: ``tolerance``, ``unrolled_steps``
        that follow, synchronous ones of BPTT, or ``feedforward``, one pass up, of backpropagation.
        """
        return dict(self._settling)

    @settling.setter
    def settling(self, values: Mapping[str, Any]) -> None:
        for name in instance("settling", values, Mapping, "a mapping of steps, schedule, relaxation, ..."):
            choose("settling", name, SETTLING)
        schedule = choose("schedule", values.get("schedule", "sweeps"), SCHEDULES)
        relaxation = number("relaxation", values.get("relaxation", 1.0))
        check_relaxation(relaxation, schedule)
        checked = {"steps": integer("steps", values.get("steps", 1)), "schedule": schedule, "relaxation": relaxation}
        checked["tolerance"] = number("tolerance", values.get("tolerance", 1.0), above=0)
        checked["unrolled_steps"] = integer("unrolled_steps", values.get("unrolled_steps", 1))
        checked["feedforward"] = flag("feedforward", values.get("feedforward", False))
        self._settling = {name: checked[name] for name in values}

    def settles(
        self, steps: int | None = None, schedule: str | None = None, relaxation: float | None = None
    ) -> tuple[int, str, float]:
        """Return steps, schedule and relaxation of the free phase, those that are None as this network settles.

        Where `settling` says nothing, or of another schedule: sweeps, and the defaults of `cupyep.settling` for the
        feedback.
        """
        usual = self._settling.get("schedule", "sweeps")
        schedule = usual if schedule is None else choose("schedule", schedule, SCHEDULES)
        own = self._settling if schedule == usual else {}
        steps = own.get("steps", default_steps(schedule, self.feedback)[0]) if steps is None else steps
        fallback = own.get("relaxation", default_relaxation(schedule, self.feedback))
        return steps, schedule, fallback if relaxation is None else relaxation

    def judges(self, given: Mapping[str, Any], is_new: bool) -> dict[str, Any]:
        """Return how states are settled that are to be judged: as `given`, else as `settling` says.

        A network of ``feedforward`` settles if it is told how to, or is not to begin at a start (`is_new`) of its own.
        """
        for name in given:
            choose("argument of scores or predict", name, JUDGING)
        names = ("steps", "schedule", "relaxation")
        how = dict(given) | dict(zip(names, self.settles(*(given.get(name) for name in names)), strict=True))
        own = self._settling if how["schedule"] == self._settling.get("schedule", "sweeps") else {}
        if own.get("feedforward") and is_new and not given:
            return {"feedforward": True}
        return {name: own[name] for name in ("tolerance", "unrolled_steps") if name in own} | how

    def check_start(self, start: State, samples: int, name: str = "start") -> None:
        """Raise ConfigurationError unless the argument `name` is a state of so many samples of this network."""
        instance(name, start, State, "a state that settle() returned")
        found, wanted = [tuple(s.shape) for s in start.layers], [(samples, *shape) for shape in self.state_shapes]
        count = found[0][0] if found else 0  # none: deviations alone, which settle_nudged returns
        require(
            found == wanted,
            f"the {name} state has {count} samples in {len(found)} layers, the batch {samples} in {self.depth}, and "
            "their shapes must agree",
        )

    def outputs(self, last: Any) -> Any:
        """Return what the readout says of some last states s^L, shape (B, classes); float32 where they are halves."""
        return self.readout.output(self.wide(last))

    def wide(self, s: Any) -> Any:
        """Return states in the type to compute in: themselves, or a copy of halves."""
        return s if s.dtype == self.dtype else s.astype(self.dtype)

    def parameters(self) -> dict[str, Any]:
        """Return the trained arrays by path, ``layers.1.weight`` .. ``readout.bias``."""
        parameters = {
            f"{path}.{name}": array
            for path, edge in zip(self.graph.paths, self.layers, strict=True)
            for name, array in edge.parameters().items()
        }
        return parameters | {f"readout.{name}": array for name, array in self.readout.parameters().items()}

    @exclusive
    def load_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Copy arrays by path into the parameters.

        Raises
        ------
        ConfigurationError
            If a name is missing or unknown or a shape differs; nothing is changed then.
        """
        own = self.parameters()
        instance("parameters", parameters, Mapping, "a mapping of arrays by path")
        missing, unknown = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys(), key=str)
        require(
            not missing and not unknown, f"parameters do not fit this network: missing {missing}, unknown {unknown}"
        )
        for path, array in own.items():
            found = getattr(parameters[path], "shape", None)
            require(found == array.shape, f"parameter {path} has shape {found}, this network's has {array.shape}")
        for path, array in own.items():
            array[...] = self.device.asarray(parameters[path], self.dtype)
        self.make_weights()

    def make_weights(self) -> None:
        """Make the weights that multiply of what is trained: settling and learning do so by themselves."""
        for edge in self.layers:
            edge.make_weight()
