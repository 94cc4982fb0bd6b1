"""Devices: where arrays live, which array module computes on them, in which precision. The only importer of CuPy."""

from cupyep.backend.device import Device, array_module, get_device, gpu_status, host_array
from cupyep.backend.precision import PRECISIONS, Precision, get_precision

__all__ = [
    "PRECISIONS",
    "Device",
    "Precision",
    "array_module",
    "get_device",
    "get_precision",
    "gpu_status",
    "host_array",
]
