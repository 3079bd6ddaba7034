"""The benchmark without a GPU: counted columns, times that are empty and say so, rows replaced by key."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dmd2_kernels as dk
from dmd2_kernels import _bench_static, _bench_table, _timing, bench, plot
from dmd2_kernels._bench_cases import Case, cases
from dmd2_kernels.bench import COLUMNS, KEY, PENDING, merge
from dmd2_kernels.ops import _launch

CASES = {(case.op, case.name, case.memory_format): case for case in cases()}
IMAGE = 40 * 3 * 64 * 64 * 4  # bytes of an ImageNet-64 batch in float32


def row(**values: object) -> dict[str, object]:
    return dict.fromkeys(KEY, "x") | values


def test_the_floor_of_the_matching_loss_is_three_reads_and_one_write() -> None:
    case = CASES["matching", "imagenet", "contiguous"]
    assert _bench_static.floor_bytes(case) == pytest.approx(4 * IMAGE, rel=1e-5)


def test_the_floor_of_the_adaptive_norm_is_five_passes() -> None:
    case = CASES["adaptive-norm", "adm-192x64", "contiguous"]
    assert _bench_static.floor_bytes(case) == pytest.approx(5 * 40 * 192 * 64 * 64 * 2, rel=1e-3)


def test_eager_bytes_are_counted_op_by_op() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).view(-1) * 2

    case = Case("", "", torch.float32, "", lambda device: (torch.empty(5, 10, device=device),), 1, twice, twice, 0)
    launches, moved = _bench_static.eager_counts(case)
    # forward x + 1 and * 2, backward * 2: each reads and writes 50 floats; views and allocations are free
    assert (launches, moved) == (3, 3 * 2 * 50 * 4)


def test_the_static_rows_have_bytes_and_no_times(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dmd2_kernels.bench", "--static", "--op", "gan-critic", "--csv", str(path)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    full = {row["provider"]: int(row["launches"]) for row in rows if row["mode"] == "full"}
    (step,) = [row for row in rows if row["mode"] == bench.STEP and row["provider"] == "fused"]
    assert (full["eager"], step["launches"]) == (13, "1")
    assert all(row["bytes_floor"] and not row["median_us"] and row["timing"] == PENDING for row in rows)
    lines = _bench_table.table(path).splitlines()
    assert len(lines) == 1 + len(rows)
    assert all(line.count("pending") == 3 for line in lines[1:])
    (line,) = [line for line in lines if "loss and gradient   fused" in line]
    assert line.split()[9:12] == ["pending", "1", "1.02x"]


@pytest.mark.parametrize(("name", "launches"), [("imagenet", 4), ("sdxl-guided", 5)])
def test_an_iterations_losses_read_and_write_each_byte_once(name: str, launches: int) -> None:
    """But the teacher's two outputs at SDXL's size: first for the normaliser, then for the direction."""
    case = CASES["iteration", name, "channels_last"]
    step, moved = list[str](), list[int]()

    def count(kernel: Any, num_programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        step.append(kernel.__name__)
        moved.append(sum(a.numel() * a.itemsize for a in args if isinstance(a, torch.Tensor)))

    inputs = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype) for t in case.inputs("meta")]
    before, _launch.launcher = _launch.launcher, count
    try:
        with dk.use("triton"):
            assert case.step is not None
            case.step(*inputs)
    finally:
        _launch.launcher = before
    assert len(step) == launches
    again = 2 * inputs[1].numel() * inputs[1].itemsize if launches == 5 else 0
    assert sum(moved) - again == pytest.approx(_bench_static.step_floor(case), rel=1e-3)


@pytest.mark.parametrize("name", [("gan-critic", "imagenet", "contiguous"), ("norm", "imagenet-head", "channels_last")])
def test_each_provider_is_timed_in_each_mode_that_it_can_run(
    name: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU, with one call in the place of each timing."""

    def called(run: Any) -> float:
        run()
        return 2.0

    on_cpu, compiled = CASES[name]._replace(inputs=lambda _: CASES[name].inputs("cpu")), torch.compile
    monkeypatch.setattr(bench._bench_static, "floor_bytes", lambda case: 8_000_000)
    monkeypatch.setattr(torch, "compile", lambda *args, **keys: compiled(*args, **keys, backend="aot_eager"))
    monkeypatch.setattr(_timing, "kernel_us", lambda run: (called(run),) * 3)
    monkeypatch.setattr(_timing, "copy_gb_per_s", lambda: 8000.0)
    for library in ("_liger", "_apex"):
        monkeypatch.setattr(bench, library, lambda case: None)
    for timing in ("graph_us", "host_us", "peak_mb"):
        monkeypatch.setattr(_timing, timing, called)
    if on_cpu.step is not None:
        monkeypatch.setattr(_bench_static, "step_floor", lambda case: 8_000_000)
    rows = list(bench.measure(on_cpu, step_ms=1.0))
    found = {(row["provider"], row["mode"]) for row in rows}
    all_modes = {(provider, mode) for provider in ("eager", "compile", "fused") for mode in bench.MODES}
    taken = {(provider, bench.STEP) for provider in ("eager", "compile", "fused")} if on_cpu.step else set()
    assert found == all_modes - {("compile", "backward")} | taken
    assert all(float(row["max_error"]) < 1e-6 for row in rows if "max_error" in row)
    assert {row["achieved_GBps"] for row in rows if row["mode"] == "full"} == {"4000"}
    assert {row["pct_of_copy"] for row in rows if row["mode"] == "full"} == {"50"}


def test_a_rerun_replaces_its_rows_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "kernels.csv"
    merge(path, [row(op="a", median_us=1), row(op="b", median_us=2)])
    merge(path, [row(op="a", median_us=3)])
    with path.open() as file:
        reader = csv.DictReader(file)
        assert {found["op"]: found["median_us"] for found in reader} == {"a": "3", "b": "2"}
        assert tuple(reader.fieldnames or ()) == COLUMNS


@pytest.mark.parametrize("rate", ["", "1500"])
def test_the_plot_is_drawn_with_and_without_times_and_repeats_its_bytes(rate: str, tmp_path: Path) -> None:
    keys = {
        "op": "matching",
        "case": "c",
        "memory_format": "contiguous",
        "mode": "full",
        "gpu": "NVIDIA H100 80GB HBM3",
        "commit": "0",
    }
    rows = [
        keys | {"provider": name, "bytes_floor": "100", "bytes_moved": moved, "achieved_GBps": rate}
        for name, moved in (("eager", "400"), ("fused", "120"))
    ]
    figures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for figure in figures:
        plot.draw(rows, figure)
    assert figures[0].read_bytes() == figures[1].read_bytes()
    assert b"<svg" in figures[0].read_bytes()
