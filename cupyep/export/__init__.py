"""Networks for other programs: weights in the layout of PyTorch, the settled network as an ONNX graph."""

from cupyep.export.onnx_graph import onnx_model
from cupyep.export.weights import torch_layout

__all__ = ["onnx_model", "torch_layout"]
