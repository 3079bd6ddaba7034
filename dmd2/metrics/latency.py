"""The time that a sampler takes for one image (paper, table 5: batch size 1, on one device)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dmd2.metrics.distances import Device

WARM_UP = 3
REPEATS = 20


def measure_latency(
    make: Callable[[int], object], device: Device = "cpu", *, warm_up: int = WARM_UP, repeats: int = REPEATS
) -> dict[str, Any]:
    """Times calls of `make(id)`, each of which generates one image, text encoding and decoding included.

    The first `warm_up` calls compile, allocate and tune, and do not count. Each call is timed until the device has
    finished. Returns `{"mean", "sd", "blocks"}` in seconds, as a metric in a record: `blocks` are the single calls.
    Raises ValueError for fewer than 2 repeats.
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}; a standard deviation needs at least 2")
    for i in range(warm_up):
        make(i)
    times = []
    for i in range(warm_up, warm_up + repeats):
        _finish(device)
        start = time.perf_counter()
        make(i)
        _finish(device)
        times.append(time.perf_counter() - start)
    return {"mean": statistics.fmean(times), "sd": statistics.stdev(times), "blocks": times}


def _finish(device: Device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
