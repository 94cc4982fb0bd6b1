"""Architectures: one table, one grammar, one builder.

An architecture is a name of `TABLE` or a text of one's own:

- ``"32 32p 64 64p"``: 3 x 3 convolutions (padding 1), by their numbers of channels. An ``s`` behind a number makes the
  stride 2, a ``p`` adds 2 x 2 pooling, in this order.
- ``"64 64+64 64+128s 128+128"``: layers joined by ``+`` are a residual block. A skip leads from the state below the
  block to the state of its last layer: the identity where the shapes are equal, else a 1 x 1 convolution with the
  block's strides and pools.
- ``"mlp:512,512"``: dense layers by their numbers of units.

The readout comes on top. Without blocks the nodes are ``1``, ``2``, ...; with blocks they are ``conv1`` (layers outside
of blocks), ``block1_1``, ``block1_2`` (the layers of the first block), ``output`` (with squared error).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cupyep import initialization
from cupyep.activations import Activation, get_activation
from cupyep.backend import Device
from cupyep.errors import (
    ConfigurationError,
    CupyepError,
    choose,
    integer,
    is_integer,
    nearest,
    number,
    require,
    shape,
    shown,
)
from cupyep.graph import IMAGE, Connection, Graph
from cupyep.layers import Conv2d, Edge, Identity, Linear
from cupyep.losses import LOSSES
from cupyep.network import Network
from cupyep.settling import STRONG, WEAK

GRAMMAR = "layers as in '32 32p 64s 64+64' (s: stride 2, p: pooling, +: residual block) or 'mlp:512,512'"
MOST_LAYERS = 256
MOST_WIDTH = 1e6
OUTPUT = "output"  # the node of a layer of squared error


@dataclass(frozen=True)
class Architecture:
    """Layers, and what trains them where nothing else is asked for.

    Attributes
    ----------
    layers : str or callable
        In the grammar of this module; or a function of `input_shape`, `width` and `pooling` that returns what `Network`
        takes, the readout aside (`cupyep.plugins.register_architecture`).
    activation, weights, readout_pool
        See `Network`; `readout_pool` is that of a softmax readout.
    gains : (float, float)
        Of the weights at a feedback above 0.3, and at one up to it.
    valid : bool
        Whether the last convolution has no padding, where that leaves enough to pool.
    """

    layers: str | Callable[[tuple[int, ...], float, str], Sequence[Any]]
    activation: str = "hard_sigmoid"
    weights: str = "plain"
    readout_pool: int | str | None = None
    gains: tuple[float, float] = (0.6, 1.2)
    valid: bool = False


def _resnet(layers: str) -> Architecture:
    return Architecture(layers, "relu", "standardized", "global", (0.6, 1.0))


# VGG-N has N weight layers, the readout included. VGG-5 is the network of Laborieux et al. (2021, arXiv 2101.05536).
# The widths of the deeper ones are not published in arXiv 2508.15989; they are this project's own choice. Hopfield-
# ResNet13 (arXiv 2509.26003) has 13, its skips and the readout included. The resnets are for weak feedback: resnet9 has
# the layers of D. Page's (DAWNBench, 2018), without batch normalization; resnet18 is our own.
TABLE = {
    "vgg5": Architecture("128p 256p 512p 512p", valid=True),
    "vgg7": Architecture("128 128p 256 256p 512p 512p"),
    "vgg9": Architecture("128 128p 256 256p 512 512p 512 512p"),
    "vgg11": Architecture("128 128p 256 256 256p 512 512 512p 512 512p"),
    "vgg12": Architecture("128 128p 256 256 256p 512 512 512p 512 512 512p"),
    "vgg16": Architecture("128 128p 256 256 256p 512 512 512p 512 512 512p 512 512 512 512p"),
    "hopfield-resnet13": Architecture("128+128s 256+256s 512+512s 512+512s", "relu6", gains=(0.7, 1.0)),
    "resnet9": _resnet("64 128p 128+128 256p 512p 512+512"),
    "resnet18": _resnet("64 64+64 64+64 128s+128 128+128 256s+256 256+256 512s+512 512+512"),
}
ARCHITECTURES = tuple(TABLE)  # others in the table are of plugins


def architecture(arch: str, what: str = "architecture") -> Architecture:
    """Return the architecture of a name or text, which is called `what`.

    `ConfigurationError` for an unknown name, with the nearest known one, or a text that breaks the grammar.
    """
    if isinstance(arch, str) and arch in TABLE:
        return TABLE[arch]
    text = arch if isinstance(arch, str) else shown(arch)
    require(
        text is arch and bool(re.match(r"mlp:| *[0-9+]", text)),
        f"unknown {what} '{text}'{nearest(text, TABLE)} (choose from {', '.join(TABLE)}; or {GRAMMAR})",
    )
    count = len(_units(text)) if text.startswith("mlp:") else sum(map(len, _blocks(text)))
    require(count <= MOST_LAYERS, f"an architecture has at most {MOST_LAYERS} layers, not {count}")
    return Architecture(text)


def slug(arch: str) -> str:
    """Return an architecture as a part of a file's name: letters, digits, ``-`` and ``_``, at most 40 of them."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", arch)[:40]


def default_gain(activation: str | Activation, feedback: float, gains: tuple[float, float] = (0.6, 1.2)) -> float:
    """Return the weight gain that this project found to train, from those for strong and weak feedback.

    Weak feedback wants the gain of a feed-forward net. With lambda = 1 every layer is driven from both sides, and too
    high a gain saturates or never settles. The halved hard sigmoid has slope 1/2 and wants twice the gain.
    """
    name = get_activation(activation).name
    gain = gains[0] if number("feedback", feedback) > STRONG else gains[1]
    return 2 * gain if name == "half_hard_sigmoid" else gain


def vgg(depth: int, *args: Any, **options: Any) -> Network:
    """Build VGG-`depth`, of 5, 7, 9, 11, 12 or 16 weight layers, the readout included; the rest as `build`."""
    known = [int(name[3:]) for name in ARCHITECTURES if name.startswith("vgg")]
    require(
        is_integer(depth) and depth in known,
        f"there is no VGG of depth {shown(depth)} (choose from {', '.join(map(str, known))})",
    )
    return build(f"vgg{depth}", *args, **options)


def build(
    arch: str,
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    width: float = 1.0,
    activation: str | Activation | None = None,
    pooling: str = "max",
    loss: str = "cross_entropy",
    feedback: float = WEAK,
    gain: float | Sequence[float] | None = None,
    seed: int = 0,
    device: str | Device = "auto",
    precision: str = "float32",
    weights: str | None = None,
    readout_pool: int | str | None = None,
    lsuv: Any = None,
    exact: bool = False,
) -> Network:
    """Build a network by the name of an architecture or a text of one's own (see this module).

    Parameters
    ----------
    arch : str
    classes : int
    input_shape : (H, W, C)
        Any that the pools allow.
    width : float
        Multiplies all numbers of channels or units (rounded, at least 1), of the output aside.
    activation, weights, readout_pool : optional
        See `Network`; those of the architecture if not given. A `readout_pool` of 1 is none.
    pooling : {"max", "average"}
        Of the layers with a ``p``.
    gain : float or sequence, optional
        `default_gain` of the architecture if not given.
    loss, feedback, seed, device, precision, exact
        See `Network`.
    lsuv : array of shape (N, H, W, C), optional
        Normalised images: the weights start from data, see `cupyep.initialization.lsuv`.

    Raises
    ------
    ConfigurationError
        For an unknown architecture, images too small for the pools, or a value out of range.
    """
    own = architecture(arch)
    activation = own.activation if activation is None else activation
    weights = own.weights if weights is None else weights
    softmax = choose("loss", loss, LOSSES) == "cross_entropy"
    readout_pool = own.readout_pool if readout_pool is None and softmax else readout_pool
    options: dict[str, Any] = {"loss": loss, "feedback": feedback, "seed": seed, "precision": precision}
    options |= {"weights": weights, "readout_pool": readout_pool}
    layers = _layers(arch, integer("classes", classes, 2), input_shape, width, pooling, loss)
    drawn = default_gain(activation, feedback, own.gains) if gain is None else gain
    network = Network(layers, classes, activation=activation, gain=drawn, device=device, exact=exact, **options)
    built = {"arch": arch, "classes": classes, "input_shape": tuple(input_shape), "width": width, "pooling": pooling}
    built |= {"activation": network.activation.name, "gain": gain} | options
    network.config = {name: _plain(value) for name, value in built.items()}
    if lsuv is not None:
        initialization.lsuv(network, lsuv)
    return network


def _plain(value: Any) -> Any:
    """Return an argument as JSON has it: numbers and arrays of NumPy as Python's."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def takes(arch: str, input_shape: Sequence[int], width: float = 1.0, pooling: str = "max") -> bool:
    """Return whether `build` makes a network of images of that shape: whether they are not too small for its pools."""
    try:
        _layers(arch, 2, input_shape, width, pooling, "cross_entropy")
    except CupyepError:
        return False
    return True


def _units(text: str) -> list[int]:
    """Return the numbers of ``"mlp:512,512"``."""
    parts = text.removeprefix("mlp:").split(",")
    wrong = next((part for part in parts if not re.fullmatch(r"[1-9][0-9]{0,5}", part)), None)
    require(wrong is None, f"{shown(wrong)} in {shown(text)} is no number of units; write 'mlp:512,512'")
    return [int(part) for part in parts]


def _blocks(text: str) -> list[list[tuple[int, bool, bool]]]:
    """Return the layers (channels, strided, pooled) of each block of a text; a layer outside of blocks is one alone."""
    blocks = []
    for word in filter(None, re.sub(r" *\+ *", "+", text).split(" ")):
        found = [re.fullmatch(r"([1-9][0-9]{0,5})(s?)(p?)", item) for item in word.split("+")]
        require(None not in found, f"{shown(word)} is no layer or block; write {GRAMMAR}")
        blocks.append([(int(item[1]), bool(item[2]), bool(item[3])) for item in found if item])
    return blocks


def _layers(
    arch: str, classes: int, input_shape: Sequence[int], width: float, pooling: str, loss: str
) -> list[Edge] | list[Connection]:
    """Return what `Network` takes, without weights; for arguments and errors see `build`."""
    own, width = architecture(arch), number("width", width, above=0, below=MOST_WIDTH)
    choose("pooling", pooling, ("max", "average"))
    tower = _Tower(shape("input_shape", input_shape, "H, W, C"), width, pooling)
    if callable(own.layers):
        return _custom_layers(arch, own.layers(tower.shape, width, pooling), classes, loss)
    if own.layers.startswith("mlp:"):
        for n, units in enumerate(_units(own.layers), 1):
            tower.add(str(n), Linear(tower.shape, tower.scaled(units)))
    else:
        blocks = _blocks(own.layers)
        _check_size(arch, blocks, tower.shape)
        for block in blocks:
            tower.add_block(block, valid=own.valid and block is blocks[-1])
    if loss == "squared_error":
        tower.add(OUTPUT, Linear(tower.shape, classes))
    edges = [connection.edge for connection in tower.connections]
    return tower.connections if tower.blocks else edges


def _custom_layers(arch: str, made: Any, classes: int, loss: str) -> list[Edge] | list[Connection]:
    """Return the layers that a builder made, with that of squared error on top."""
    if isinstance(made, Graph):
        made = made.edges if made.is_chain else made.connections
    found = list(made) if isinstance(made, Iterable) else []
    connected = all(isinstance(layer, Connection) for layer in found)
    right = found and (connected or all(isinstance(layer, Edge) for layer in found))
    require(bool(right), f"the builder of {arch} must return Edges, or Connections, as Network takes them")
    if loss == "squared_error":
        graph = Graph(found)  # in whose order the output is last
        require(OUTPUT not in graph.names, f"squared error adds a node '{OUTPUT}'; give that of {arch} another name")
        edge = Linear(graph.shapes[-1], classes)
        found.append(Connection(graph.names[-1], OUTPUT, edge) if connected else edge)
    return found


def _check_size(arch: str, blocks: list[list[tuple[int, bool, bool]]], images: tuple[int, ...]) -> None:
    side, halvings = min(images[:2]), 0
    for _, strided, pooled in (layer for block in blocks for layer in block):
        side, halvings = (side + strided) // (1 + strided), halvings + strided + pooled
        side = side // 2 if pooled else side
    if side < 1:
        raise ConfigurationError(
            f"{images[0]}x{images[1]} images are too small for {arch}, which halves them {halvings} times; use "
            f"at least {2.0**halvings:g} pixels a side"
        )


class _Tower:
    """Nodes one above another, and the connections that lead to them."""

    def __init__(self, shape: tuple[int, ...], width: float, pooling: str):
        self.top, self.shape = IMAGE, shape
        self.width, self.pooling = width, pooling
        self.connections: list[Connection] = []
        self.blocks = self.singles = 0

    def scaled(self, count: int) -> int:
        """Return a number of channels or units at this width."""
        return max(1, round(count * self.width))

    def add(self, name: str, edge: Edge) -> None:
        """Put a node on top."""
        self.connections.append(Connection(self.top, name, edge))
        self.top, self.shape = name, edge.out_shape

    def add_block(self, block: list[tuple[int, bool, bool]], valid: bool = False) -> None:
        """Put the layers of a residual block on top, and its skip beside them; or one layer."""
        below, shape = self.top, self.shape
        if len(block) == 1:
            self.singles += 1
            names = [f"conv{self.singles}"]
        else:
            self.blocks += 1
            names = [f"block{self.blocks}_{n}" for n in range(1, len(block) + 1)]
        for name, (channels, strided, pooled) in zip(names, block, strict=True):
            room = not valid or min(self.shape[:2]) < 4
            pool = self.pooling if pooled else "none"
            self.add(name, Conv2d(self.shape, self.scaled(channels), 3, 1 + strided, int(room), pool))
        if len(block) > 1:
            self.connections.append(Connection(below, self.top, self._skip(shape, block)))

    def _skip(self, below: tuple[int, ...], block: list[tuple[int, bool, bool]]) -> Edge:
        stride, pool = (2 ** sum(layer[place] for layer in block) for place in (1, 2))
        if self.shape == below and stride == pool == 1:
            return Identity(below)
        pooling = self.pooling if pool > 1 else "none"
        edge = Conv2d(below, self.shape[-1], 1, stride, 0, pooling, pool, bias=False)
        require(
            edge.out_shape == self.shape,
            f"block {self.blocks} makes {self.shape[:2]} of {below[:2]}, its skip {edge.out_shape[:2]}; use images "
            "whose sides halve evenly, or put its s before its p",
        )
        return edge
