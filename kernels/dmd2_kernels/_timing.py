"""Timing on a GPU: with Triton's do_bench, which flushes L2, in a CUDA graph, and by the host's clock.

A graph is captured on the current stream, which must not be the default one; its inputs must be created there.
"""

import time
from collections.abc import Callable

import torch
import triton

L2_BYTES = 256 * 2**20  # larger than any L2; writing it evicts a previous run's data


def kernel_us(run: Callable[[], object]) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile) in microseconds, L2 flushed, launch overhead of short kernels included."""
    median, low, high = triton.testing.do_bench(run, warmup=10, rep=50, quantiles=[0.5, 0.2, 0.8])
    return 1000 * median, 1000 * low, 1000 * high


def graph_us(run: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds per run in a CUDA graph that flushes L2 before each run, minus a graph that only flushes."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    return (_graph_ms(run, flush, repeats) - _graph_ms(lambda: None, flush, repeats)) * 1000 / repeats


def _graph_ms(run: Callable[[], object], flush: torch.Tensor, repeats: int) -> float:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            flush.zero_()
            run()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def host_us(run: Callable[[], object], repeats: int = 100) -> float:
    """Wall-clock microseconds per call, back to back: the cost of Python and launches if the GPU is not the limit."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / repeats


def peak_mb(run: Callable[[], object]) -> float:
    """Peak memory of a call beyond what was allocated before, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copy_gb_per_s() -> float:
    """The achieved memory bandwidth of a 1 GB copy in GB/s, counting read and write."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    median, *_ = kernel_us(lambda: target.copy_(source))
    return 2 * source.numel() / median / 1000
