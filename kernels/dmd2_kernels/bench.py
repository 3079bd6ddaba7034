"""Benchmarks the ops on a GPU; without one counts launches and bytes.

    python -m dmd2_kernels.bench --csv results/bench/kernels.csv
    python -m dmd2_kernels.bench --static --arch 90 --csv results/bench/kernels.csv

A row is one op at one shape by one provider in one mode; a rerun replaces rows with the same key and keeps the rest.
Rows are written as they are measured. Without a GPU (or with --static) the columns of time are empty and `timing` is
pending. The providers: eager torch, torch.compile, the fused op and, if importable, Liger's and apex's GroupNorm. All
rows of the CSV are printed as one table at the end, each with its GPU, versions and commit.
--jobs compiles everything first in that many processes, into the compilers' caches.
"""

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmd2_kernels as dk

from . import _bench_static, _bench_table, _timing
from ._bench_cases import Case, Forward, cases

KEY = ("op", "case", "provider", "mode", "dtype", "memory_format", "gpu")
COLUMNS = (
    *KEY,
    *("shape", "median_us", "p20_us", "p80_us", "graph_us", "host_us", "bytes_floor", "bytes_moved", "achieved_GBps"),
    *("pct_of_copy", "pct_of_step", "launches", "peak_MB", "max_error", "registers", "spills", "widest_load_bits"),
    *("timing", "arch", "driver", "torch", "triton", "commit", "timestamp"),
)
MODES = ("forward", "backward", "full")
STEP = "loss_and_grad"  # the mode of the form that a training step takes
PENDING = "pending: no GPU"
Row = dict[str, Any]


def _liger(case: Case) -> Forward | None:
    """Liger's GroupNorm followed by SiLU; it has no adaptive form and no channels_last."""
    if case.op != "norm" or importlib.util.find_spec("liger_kernel") is None:
        return None
    liger = importlib.import_module("liger_kernel.ops.group_norm")

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = liger.LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], 32, 1e-5)
        return torch.nn.functional.silu(z)

    return run


def _apex(case: Case) -> Forward | None:
    """Apex's GroupNorm with fused SiLU; channels_last only, and no adaptive form."""
    if case.op != "norm" or case.memory_format != "channels_last" or importlib.util.find_spec("apex") is None:
        return None
    apex = importlib.import_module("apex.contrib.group_norm")
    norm = apex.GroupNorm(32, case.inputs("meta")[0].shape[1], act="silu").cuda()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = norm(x)
        return out

    return run


def providers(case: Case) -> Iterator[tuple[str, Forward]]:
    """Name and function of each provider of the case on a GPU."""
    if case.eager is None or case.fused is None:
        return
    torch.compiler.reset()  # else one function at many shapes would exceed the recompile limit
    yield "eager", case.eager
    yield "compile", torch.compile(case.eager, fullgraph=True, dynamic=False)
    yield "fused", case.fused
    for name, provider in (("liger", _liger(case)), ("apex", _apex(case))):
        if provider is not None:
            yield name, provider


def step_providers(case: Case) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The same for gradients and sums: the plain-torch definition, the same compiled by Inductor, and the kernels."""
    if (step := case.step) is None:
        return

    def defined(*inputs: Tensor) -> Any:
        with dk.use("reference"):
            return step(*inputs)

    torch.compiler.reset()
    yield "eager", defined
    compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def by_inductor(*inputs: Tensor) -> Any:
        with dk.use("reference"):
            return compiled(*inputs)

    yield "compile", by_inductor
    yield "fused", step


def _leaves(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The inputs that require gradients."""
    return [leaf.requires_grad_() for leaf in inputs[: case.num_leaves]]


def modes(case: Case, run: Forward) -> dict[str, Callable[[], object]]:
    """The timed functions by mode: forward, backward and both."""
    inputs = case.inputs("cuda")
    leaves, out = _leaves(case, inputs), run(*inputs)
    go = torch.ones_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, leaves, go, retain_graph=True, allow_unused=True)

    def full() -> object:
        return torch.autograd.grad(run(*inputs), leaves, go, allow_unused=True)

    def forward() -> object:
        return run(*inputs)

    return dict(zip(MODES, (forward, backward, full), strict=True))


def compile_case(index: int) -> None:
    """Runs every provider of a case once to fill the compilers' caches on disk."""
    case = cases()[index]
    with dk.use("auto"):
        for _, run in providers(case):
            modes(case, run)["full"]()
        for _, run in step_providers(case):
            run(*case.inputs("cuda"))


def _max_error(case: Case, run: Forward) -> float:
    """The largest difference from the eager expression in float64, relative to its largest value."""
    torch.manual_seed(0)
    inputs = case.inputs("cuda")
    assert case.eager is not None
    exact = case.eager(*(t.double() for t in inputs))
    _leaves(case, inputs)
    error = (run(*inputs).double() - exact).abs().max() / exact.abs().max()
    return error.item()


def measure(case: Case, step_ms: float | None) -> Iterator[Row]:
    """The rows of one case on this GPU."""
    floor, copy_rate = _bench_static.floor_bytes(case), _timing.copy_gb_per_s()
    for provider, run in providers(case):
        error = _max_error(case, run)
        for mode, call in modes(case, run).items():
            if mode == "backward" and provider == "compile":
                continue  # a compiled graph reuses its memory and runs once
            median, low, high = _timing.kernel_us(call)
            row: Row = {"provider": provider, "mode": mode, "timing": "measured", "max_error": f"{error:.2e}"}
            row |= {"median_us": f"{median:.2f}", "p20_us": f"{low:.2f}", "p80_us": f"{high:.2f}"}
            row |= {"host_us": f"{_timing.host_us(call):.2f}", "peak_MB": f"{_timing.peak_mb(call):.1f}"}
            if mode != "backward":  # a retained graph can't be captured
                device = _timing.graph_us(call)  # GPU time; an event would include waiting for the host
                row["graph_us"] = f"{device:.2f}"
            if mode == "full":
                row |= _rates(case, floor, device, copy_rate, step_ms)
            yield row
    for provider, run in step_providers(case):
        inputs = case.inputs("cuda")
        call = partial(run, *inputs)
        median, low, high = _timing.kernel_us(call)
        device = _timing.graph_us(call)
        row = {"provider": provider, "mode": STEP, "timing": "measured", "graph_us": f"{device:.2f}"}
        row |= {"median_us": f"{median:.2f}", "p20_us": f"{low:.2f}", "p80_us": f"{high:.2f}"}
        row |= {"host_us": f"{_timing.host_us(call):.2f}", "peak_MB": f"{_timing.peak_mb(call):.1f}"}
        yield row | _rates(case, _bench_static.step_floor(case), device, copy_rate, step_ms)


def _rates(case: Case, floor: int, device_us: float, copy_rate: float, step_ms: float | None) -> Row:
    """Bandwidth of the minimum bytes, as a share of a copy's, and the share of a step's time."""
    rate = floor / device_us / 1000
    row: Row = {"bytes_floor": floor, "achieved_GBps": f"{rate:.0f}", "pct_of_copy": f"{100 * rate / copy_rate:.0f}"}
    if step_ms and case.calls_per_step:
        row["pct_of_step"] = f"{case.calls_per_step * device_us / 10 / step_ms:.3f}"
    return row


def static(case: Case, arch: int) -> Iterator[Row]:
    """The rows of one case without a GPU, eager and fused: forward and backward together, and as a step takes it."""
    common = {"timing": PENDING, "arch": f"sm_{arch}"}
    for mode in ("full", STEP):
        step = mode == STEP
        if (case.step if step else case.eager) is None:
            continue
        floor = _bench_static.step_floor(case) if step else _bench_static.floor_bytes(case)
        launches, moved = _bench_static.eager_counts(case, step)
        row = common | {"mode": mode, "bytes_floor": floor}
        yield row | {"provider": "eager", "launches": launches, "bytes_moved": moved}
        yield row | {"provider": "fused", **_bench_static.fused_counts(case, arch, step)}


def _environment(on_gpu: bool) -> Row:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if on_gpu else "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": gpu,
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0] if on_gpu else "",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "commit": commit.stdout.strip(),
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _key(case: Case) -> Row:
    return {
        "op": case.op,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "memory_format": case.memory_format,
        "shape": "x".join(map(str, case.inputs("meta")[0].shape)),
    }


def merge(path: Path, rows: list[Row]) -> None:
    """Merge the rows into the CSV: rows with the same key are replaced, others kept; sorted by key."""
    kept: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {tuple(row[k] for k in KEY): dict(row) for row in csv.DictReader(file)}
    kept |= {tuple(str(row[k]) for k in KEY): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept))


def main(argv: list[str] | None = None) -> int:
    """Run the cases and merge their rows into the CSV."""
    parser = argparse.ArgumentParser(prog="python -m dmd2_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=Path("results/bench/kernels.csv"))
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--static", action="store_true", help="no times, even with a GPU")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of the static rows")
    parser.add_argument("--step-ms", type=float, help="measured time of a training step, for pct_of_step")
    parser.add_argument("--jobs", type=int, default=0, help="compile first, in this many processes")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and not args.static
    wanted = [index for index, case in enumerate(cases()) if args.op in case.op]
    if on_gpu and args.jobs:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_case, wanted))
    environment, count = _environment(on_gpu), 0
    for case in map(cases().__getitem__, wanted):
        with dk.use("auto"), torch.cuda.stream(torch.cuda.Stream() if on_gpu else None):  # for the graphs
            found = list(measure(case, args.step_ms) if on_gpu else static(case, args.arch))
        merge(args.csv, [environment | _key(case) | row for row in found])
        count += len(found)
        print(f"{case.op} {case.name} {_key(case)['dtype']} {case.memory_format}", flush=True)
    print(_bench_table.table(args.csv))
    print(f"{count} rows into {args.csv}, {'measured on ' + environment['gpu'] if on_gpu else PENDING}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
