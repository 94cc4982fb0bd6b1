"""Devices: where arrays live and which array module computes on them. The only importer of CuPy."""

from cupyep.backend.device import Device, array_module, get_device, gpu_status

__all__ = ["Device", "array_module", "get_device", "gpu_status"]
