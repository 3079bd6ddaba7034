"""The machine code of the kernels, compiled without a GPU in a process that has no interpreter; all of it in CI."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# One process for all, since each imports torch and Triton; a jitted function must stand in a file.
SCRIPT = """
import sys
import torch, triton, triton.language as tl
from dmd2_kernels import aot
from dmd2_kernels.ops import _launch

@triton.jit
def bad(x, y, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(x + offs * 2, mask=offs < n, other=0.0).to(tl.float64)
    tl.atomic_add(y + offs, tl.sqrt(value + 1e-9).to(tl.float32))

some = "matching head+cfg 4x64x64,norm plain,beyond int32"
print("status", aot.main(["--only", some, "--dtype", "bf16", "--check", "--csv", sys.argv[1]]))
aot.main(["--warmup-mock", "12288", "12290"])
found = []
with aot.recording(90, "bad", "fp32", found):
    _launch.launch(bad, 1, torch.empty(64), torch.empty(64), 64, BLOCK=1024, num_warps=4)
print("faults", found[0].faults())
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What was printed, and the file of statistics."""
    folder = tmp_path_factory.mktemp("aot")
    (folder / "script.py").write_text(SCRIPT)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(folder / "script.py"), str(folder / "aot.csv")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), folder / "aot.csv"


def test_kernels_compile_for_h100_without_spills_doubles_atomics_or_narrow_accesses(
    compiled: tuple[list[str], Path],
) -> None:
    lines, path = compiled
    assert "status 0" in lines, lines
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert all(int(row["instructions"]) > 20 and int(row["registers"]) <= 128 for row in rows)


def test_the_binder_gives_wide_accesses_where_16_divides_the_sample_and_compiles_elsewhere(
    compiled: tuple[list[str], Path],
) -> None:
    even, odd = (next(line for line in compiled[0] if line.split()[:1] == [size]) for size in ("12288", "12290"))
    assert "loads {128: 6}" in even
    assert "loads {16: 48}" in odd


def test_the_check_refuses_a_kernel_with_faults(compiled: tuple[list[str], Path]) -> None:
    (faults,) = (line for line in compiled[0] if line.startswith("faults "))
    for fault in ("float64 instructions", "atomics", "bytes read in 128 bits or more"):
        assert fault in faults


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests' process has no interpreter where there is a GPU")
def test_compiling_under_the_interpreter_says_what_to_unset() -> None:
    from dmd2_kernels import aot

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        aot.main(["--only", "gan hinge"])
