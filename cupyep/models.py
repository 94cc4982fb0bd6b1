"""The VGG family for EP: one table, one builder.

VGG-N has N weight layers, the readout included. VGG-5 is the network of Laborieux et al. (2021, arXiv 2101.05536). The
widths of the deeper ones are not published in arXiv 2508.15989; they are this project's own choice: 3 x 3 kernels,
padding 1, channels doubled at pools, four or five pools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cupyep.activations import Activation, get_activation
from cupyep.backend import Device
from cupyep.errors import ConfigurationError, choose, integer, is_integer, number, shape, shown
from cupyep.layers import Conv2d, Edge, Linear
from cupyep.losses import LOSSES
from cupyep.network import Network

CHANNELS = {  # a p marks 2 x 2 pooling after the convolution
    5: "128p 256p 512p 512p",
    7: "128 128p 256 256p 512p 512p",
    9: "128 128p 256 256p 512 512p 512 512p",
    11: "128 128p 256 256 256p 512 512 512p 512 512p",
    12: "128 128p 256 256 256p 512 512 512p 512 512 512p",
    16: "128 128p 256 256 256p 512 512 512p 512 512 512p 512 512 512 512p",
}
MOST_WIDTH = 1e6
ARCHITECTURES = tuple(f"vgg{depth}" for depth in CHANNELS)


def default_gain(activation: str | Activation, feedback: float) -> float:
    """Return the weight gain that this project found to train.

    Weak feedback wants the gain of a feed-forward net. With lambda = 1 every layer is driven from both sides, and too
    high a gain saturates or never settles. The halved hard sigmoid has slope 1/2 and wants twice the gain.
    """
    name = get_activation(activation).name
    gain = 0.6 if number("feedback", feedback) > 0.3 else 1.2
    return 2 * gain if name == "half_hard_sigmoid" else gain


def vgg(
    depth: int,
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    width: float = 1.0,
    activation: str | Activation = "hard_sigmoid",
    pooling: str = "max",
    loss: str = "cross_entropy",
    feedback: float = 1.0,
    gain: float | Sequence[float] | None = None,
    seed: int = 0,
    device: str | Device = "auto",
    precision: str = "float32",
) -> Network:
    """Build VGG-`depth`.

    Parameters
    ----------
    depth : {5, 7, 9, 11, 12, 16}
        Weight layers, readout included.
    classes : int
    input_shape : (H, W, C)
        Any that the pools allow.
    width : float
        Multiplies all channel counts (rounded, at least 1).
    pooling : {"max", "average"}
    gain : float or sequence, optional
        `default_gain` if not given.
    activation, loss, feedback, seed, device, precision
        See `Network`.

    Raises
    ------
    ConfigurationError
        For an unknown depth or images too small for the pools.
    """
    network = Network(
        vgg_edges(depth, classes, input_shape, width, pooling, loss),
        classes,
        activation=activation,
        loss=loss,
        feedback=feedback,
        gain=default_gain(activation, feedback) if gain is None else gain,
        seed=seed,
        device=device,
        precision=precision,
    )
    network.config = {
        "arch": f"vgg{depth}",
        "classes": classes,
        "input_shape": tuple(input_shape),
        "width": width,
        "activation": network.activation.name,
        "pooling": pooling,
        "loss": loss,
        "feedback": feedback,
        "gain": gain,
        "seed": seed,
        "precision": precision,
    }
    return network


def vgg_edges(
    depth: int,
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    width: float = 1.0,
    pooling: str = "max",
    loss: str = "cross_entropy",
) -> list[Edge]:
    """Return the edges of VGG-`depth`, without weights; see `vgg` for arguments and errors."""
    if not is_integer(depth) or depth not in CHANNELS:
        raise ConfigurationError(
            f"there is no VGG of depth {shown(depth)} (choose from {', '.join(map(str, CHANNELS))})"
        )
    width = number("width", width, above=0, below=MOST_WIDTH)
    classes = integer("classes", classes, 2)
    choose("pooling", pooling, ("max", "average"))
    choose("loss", loss, LOSSES)
    layers = _convolutions(depth, shape("input_shape", input_shape, "H, W, C"), width, pooling)
    if loss == "squared_error":
        layers.append(Linear(layers[-1].out_shape, classes))
    return layers


def _convolutions(depth: int, shape: tuple[int, ...], width: float, pooling: str) -> list[Edge]:
    height, breadth, _ = shape
    edges: list[Edge] = []
    for item in CHANNELS[depth].split():
        channels, pooled = re.fullmatch(r"(\d+)(p?)", item).groups()
        # The published VGG-5 leaves its last convolution unpadded; smaller images than 32 x 32 leave no room for that.
        last_of_five = depth == 5 and len(edges) == 3 and min(shape[:2]) >= 4
        if pooled and min(shape[:2]) < 2:
            raise ConfigurationError(
                f"{height}x{breadth} images are too small for VGG-{depth}, which halves them "
                f"{CHANNELS[depth].count('p')} times; use at least {2 ** CHANNELS[depth].count('p')} pixels a side"
            )
        edge = Conv2d(
            shape,
            max(1, round(int(channels) * width)),
            padding=0 if last_of_five else 1,
            pooling=pooling if pooled else "none",
        )
        edges.append(edge)
        shape = edge.out_shape
    return edges


def build(arch: str, **options: Any) -> Network:
    """Build a network by name, ``vgg5`` .. ``vgg16``; options as `vgg`.

    Raises
    ------
    ConfigurationError
        For an unknown name, with the nearest known one.
    """
    return vgg(int(choose("architecture", arch, ARCHITECTURES)[3:]), **options)
