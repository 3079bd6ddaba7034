"""The energy that a GPU has used, as NVML counts it since the driver was loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

LIBRARY = "libnvidia-ml.so.1"
Meter = Callable[[], float | None]
"""Joules so far of this process's device; None where they are not known."""


def gpu_meter() -> Meter:
    """The meter of this process's GPU.

    Its value is None without a GPU, without NVML, and on devices before Volta, which do not count
    (nvmlDeviceGetTotalEnergyConsumption, in millijoules). On a GPU shared with other processes it is that of all.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return lambda: None
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        return lambda: None
    return _meter_of(nvml, f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")


def _meter_of(nvml: ctypes.CDLL, uuid: str) -> Meter:
    """Reads through a loaded NVML; 0 is its status of success."""
    device, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)):
        return lambda: None

    def read() -> float | None:
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used))
        return None if failed else used.value / 1000

    return read
