"""The machine code of the kernels, compiled without a GPU in a process that has no interpreter; all of it in CI."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ENV = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str, env: dict[str, str] = ENV) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmd2_kernels.aot", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_kernels_compile_for_h100_without_spills_doubles_atomics_or_narrow_accesses(tmp_path: Path) -> None:
    path, some = tmp_path / "aot.csv", "matching head+cfg 4x64x64,norm plain,beyond int32"
    done = run("--only", some, "--dtype", "bf16", "--check", "--csv", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(int(row["instructions"]) > 20 and int(row["registers"]) <= 128 for row in rows)


def test_the_binder_gives_wide_accesses_where_16_divides_the_sample_and_compiles_elsewhere() -> None:
    done = run("--warmup-mock", "12288", "12290")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    even, odd = (next(line for line in lines if line.split()[:1] == [size]) for size in ("12288", "12290"))
    assert "loads {128: 6}" in even
    assert "loads {16: 48}" in odd


FAULTY = """
import torch, triton, triton.language as tl
from dmd2_kernels import aot
from dmd2_kernels.ops import _launch

@triton.jit
def bad(x, y, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(x + offs * 2, mask=offs < n, other=0.0).to(tl.float64)
    tl.atomic_add(y + offs, tl.sqrt(value + 1e-9).to(tl.float32))

found = []
with aot.recording(90, "bad", "fp32", found):
    _launch.launch(bad, 1, torch.empty(64), torch.empty(64), 64, BLOCK=1024, num_warps=4)
print(found[0].faults())
"""


def test_the_check_refuses_a_kernel_with_faults(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = [sys.executable, str(tmp_path / "faulty.py")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for fault in ("float64 instructions", "atomics", "bytes read in 128 bits or more"):
        assert fault in done.stdout


def test_compiling_under_the_interpreter_says_what_to_unset() -> None:
    done = run("--only", "gan hinge", env=ENV | {"TRITON_INTERPRET": "1"})
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr
