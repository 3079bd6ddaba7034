"""The time that a sampler takes for one image, by its parts (paper, table 5: batch size 1, on one device)."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dmd2.metrics.distances import Device

Part = Callable[[Any], Any]


def measure_latency(
    parts: Mapping[str, Part], device: Device = "cpu", *, warm_up: int = 3, repeats: int = 20
) -> dict[str, dict[str, Any]]:
    """Times the parts of a call that makes one image: the first gets the call's number, each other the one's before it.

    The first `warm_up` calls compile, allocate and tune, and do not count. A part is timed until the device has
    finished. Returns `{"median", "sd", "calls"}` in seconds for each part and for `total`, their sum in each call.
    Raises ValueError for fewer than 2 repeats.
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}; a standard deviation needs at least 2")
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warm_up + repeats):
        value: Any = number
        for name, part in parts.items():
            _finish(device)
            start = time.perf_counter()
            value = part(value)
            _finish(device)
            times[name].append(time.perf_counter() - start)
    counted = {name: calls[warm_up:] for name, calls in times.items()}
    counted["total"] = [sum(call) for call in zip(*counted.values(), strict=True)]
    return {
        name: {"median": statistics.median(calls), "sd": statistics.stdev(calls), "calls": calls}
        for name, calls in counted.items()
    }


def device_name(device: Device) -> str:
    """The name of a GPU, or the processor's architecture and PyTorch's number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _finish(device: Device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
