"""Networks for other programs: weights in the layout of PyTorch, the settled network as an ONNX graph."""

from cupyep.export.onnx_graph import onnx_model
from cupyep.export.weights import load_torch_layout, torch_layout

__all__ = ["load_torch_layout", "onnx_model", "torch_layout"]
