"""A convergent network in PyTorch as the field's scripts write it: the reference that `benchmark.py` compares with.

Every settle step is one evaluation of ``Phi = sum_n a_n <s^n, P(w_n * s^(n-1) + b_n)> - beta L`` and one call of
autograd for its derivative with respect to all states (Laborieux et al. 2021, arXiv 2101.05536). Channels first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cupyep.activations import Clip
from cupyep.errors import ConfigurationError, require
from cupyep.layers import Conv2d, Edge
from cupyep.network import Network


class TorchReference:
    """The network, with its parameters copied.

    Parameters
    ----------
    network : Network
        A chain of `Conv2d` and dense edges with plain weights, with a clip as activation.
    device : str
        PyTorch's name of the device.
    dtype : {"float32", "float64"}

    Raises
    ------
    ConfigurationError
        If it is another one.
    """

    def __init__(self, network: Network, device: str = "cpu", dtype: str = "float32"):
        plain = network.graph.is_chain and network.weights == "plain"
        require(plain, "the reference takes chains with plain weights: compare networks with skips without --against")
        if not isinstance(network.activation, Clip):
            raise ConfigurationError(f"the reference has no activation '{network.activation.name}'")
        self.network = network
        self.device, self.dtype = device, getattr(torch, dtype)
        self.activation = network.activation
        self.weights = network.energy.weights
        self.edges = nn.ModuleList([_torch_edge(edge) for edge in network.layers])
        self.readout = nn.Sequential(nn.Flatten(), _torch_linear(network.readout.shape, network.classes))
        self.criterion = network.readout.criterion.name
        for module in (self.edges, self.readout):
            module.to(device, self.dtype)
        self._copy_parameters()

    def _copy_parameters(self) -> None:
        parameters = self.network.parameters()
        for path, own in self.parameters().items():
            array = torch.tensor(self.network.device.to_numpy(parameters[path]), dtype=self.dtype)
            with torch.no_grad():
                own.copy_(_channels_first(array, self._below(path)))

    def _round_as_the_network(self) -> None:
        """Let PyTorch multiply float32 as TF32 on a GPU if, and only if, the network does: left alone, cuDNN would."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.network.precision.tf32

    def _below(self, path: str) -> tuple[int, ...]:
        """Return the shape of the state below a parameter."""
        _, _, rest = path.partition("layers.")
        return self.network.layers[int(rest.split(".")[0]) - 1].in_shape if rest else self.network.readout.shape

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by cupyep's paths."""
        modules = {f"layers.{n}": edge[_map_index(edge)] for n, edge in enumerate(self.edges, 1)}
        if self.criterion == "cross_entropy":
            modules["readout"] = self.readout[1]
        return {
            f"{path}.{name}": getattr(module, name) for path, module in modules.items() for name in ("weight", "bias")
        }

    def images(self, x: Any) -> torch.Tensor:
        """Return images (N, H, W, C) of the network's device as a tensor (N, C, H, W)."""
        host = self.network.device.to_numpy(x).astype(self.network.dtype)  # PyTorch does not know NumPy's bfloat16
        array = torch.tensor(host, dtype=self.dtype, device=self.device)
        return array.permute(0, 3, 1, 2).contiguous()

    def labels(self, labels: Any) -> torch.Tensor:
        """Return labels (N,) as a tensor."""
        return torch.as_tensor(labels, device=self.device)

    def zeros(self, samples: int) -> list[torch.Tensor]:
        """Return the states where a free phase starts."""
        shapes = [(shape[2], *shape[:2]) if len(shape) == 3 else shape for shape in self.network.state_shapes]
        return [torch.zeros(samples, *shape, device=self.device, dtype=self.dtype) for shape in shapes]

    def phi(self, x: torch.Tensor, states: list[torch.Tensor], labels: Any = None, beta: float = 0.0) -> torch.Tensor:
        """Return Phi, less the nudge, summed over the batch."""
        total, below = torch.zeros((), device=self.device, dtype=self.dtype), x
        for weight, edge, state in zip(self.weights, self.edges, states, strict=True):
            total = total + weight * (edge(below) * state).sum()
            below = state
        return total if beta == 0 else total - beta * self.loss(states[-1], labels)

    def loss(self, top: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of the last state, summed over the batch."""
        if self.criterion == "cross_entropy":
            return functional.cross_entropy(self.readout(top), labels, reduction="sum")
        return 0.5 * ((top - functional.one_hot(labels, self.network.classes)) ** 2).sum()

    def settle(
        self, x: torch.Tensor, states: list[torch.Tensor], steps: int, labels: Any = None, beta: float = 0.0
    ) -> list[torch.Tensor]:
        """Return the states after `steps` synchronous steps."""
        self._round_as_the_network()
        for _ in range(steps):
            states = [state.detach().requires_grad_() for state in states]
            forces = torch.autograd.grad(self.phi(x, states, labels, beta), states)
            states = [self._clip(g, weight) for g, weight in zip(forces, self.weights, strict=True)]
        return states

    def _clip(self, force: torch.Tensor, weight: float) -> torch.Tensor:
        gain = self.activation.gain / weight
        return torch.clamp(force if gain == 1.0 else gain * force, self.activation.low, self.activation.high)

    def ep_step(
        self, x: torch.Tensor, labels: torch.Tensor, beta: float, free_steps: int, nudged_steps: int
    ) -> dict[str, torch.Tensor]:
        """Return the centered EP gradient of the batch mean by path: a free phase, then one with +beta and one with
        -beta, then autograd for the difference of Phi at their ends.
        """
        free = self.settle(x, self.zeros(len(x)), free_steps)
        plus = self.settle(x, free, nudged_steps, labels, beta)
        minus = self.settle(x, free, nudged_steps, labels, -beta)
        difference = self.phi(x, minus, labels, -beta) - self.phi(x, plus, labels, beta)
        parameters = self.parameters()
        gradients = torch.autograd.grad(difference / (2 * beta * len(x)), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    def channels_last(self, path: str, gradient: torch.Tensor) -> Any:
        """Return a gradient as a NumPy array in the layout of cupyep's parameter `path`."""
        below, array = self._below(path), gradient.cpu()
        if array.ndim == 4:
            array = array.permute(2, 3, 1, 0)
        elif array.ndim == 2:
            height, width, channels = below if len(below) == 3 else (1, 1, *below)
            array = array.reshape(-1, channels, height, width).permute(2, 3, 1, 0).reshape(-1, len(array))
        return array.numpy()

    @staticmethod
    def state_channels_last(state: torch.Tensor) -> Any:
        """Return a state as a NumPy array, channels last."""
        return (state.permute(0, 2, 3, 1) if state.ndim == 4 else state).detach().cpu().numpy()


def _torch_edge(edge: Edge) -> nn.Sequential:
    if not isinstance(edge, Conv2d):
        return nn.Sequential(nn.Flatten(), _torch_linear(edge.in_shape, edge.out_shape[0]))
    convolution = nn.Conv2d(edge.in_shape[2], edge.map_shape[2], edge.kernel, edge.stride, edge.padding)
    pools = {"none": [], "max": [nn.MaxPool2d(edge.pool)], "average": [nn.AvgPool2d(edge.pool)]}
    return nn.Sequential(convolution, *pools[edge.pooling])


def _torch_linear(in_shape: tuple[int, ...], units: int) -> nn.Linear:
    return nn.Linear(int(torch.Size(in_shape).numel()), units)


def _map_index(edge: nn.Sequential) -> int:
    return 1 if isinstance(edge[0], nn.Flatten) else 0


def _channels_first(array: torch.Tensor, below: tuple[int, ...]) -> torch.Tensor:
    """Return a parameter of cupyep in PyTorch's layout; a dense map reads states flattened channels first."""
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1)
    if array.ndim == 2:
        height, width, channels = below if len(below) == 3 else (1, 1, *below)
        return array.reshape(height, width, channels, -1).permute(3, 2, 0, 1).reshape(array.shape[1], -1)
    return array
