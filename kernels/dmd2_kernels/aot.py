"""Compiles every kernel without a GPU, with Triton's own binder, and checks the machine code.

    python -m dmd2_kernels.aot --arch 80,90,100 --check

The host functions run on uninitialised CPU tensors with a launcher that compiles instead of launching, so that kernels
are specialised exactly as in a real call. `--check` fails on spilled registers (but for 0.5 % of the instructions), a
float64 instruction, an atomic, more than MAX_REGISTERS registers, or bulk memory accesses of less than 128 bits.
"""

import argparse
import csv
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

import dmd2_kernels as dk

from . import _dispatch, ops
from ._aot_norms import norm_cases
from ._sass import Compiled, statistics
from .ops import _launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_statistics = functools.cache(statistics)  # several cases use the same reduction kernels
_READ = ("x0", "real", "fake", "x", "uncond", "out", "target", "dy", "residual", "d_total")
_READ_ONCE = ("residual", "d_total")  # also where a group is walked twice
_WRITTEN = ("grad", "y", "dx", "total")
_IMAGES = ("x0", "x", "target")  # of the losses; found by offset where raw outputs are in channels_last


class _Compiler:
    """A stub of a CUDA driver that only has a target: sufficient for the binder, cannot launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # the binder keeps one target, and its compiled kernels, for each device

    def get_current_stream(self, device: int) -> int:
        return 0


def _tile_elements(options: dict[str, Any]) -> int:
    if "CG_P" in options and "TILE" in options:
        return int(options["CG"] * options["TILE"])
    if "SPAN" in options:
        return int(options["ROWS"] * options["SPAN"])
    return int(options.get("BLOCK", 0) or options.get("ROWS", 0) * options.get("COLS", 0))


def _bulk_bytes(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], names: tuple[str, ...]) -> int:
    """The bytes of one tile of each named tensor."""
    named = dict(zip(kernel.arg_names, args, strict=False))
    sizes = [named[n].itemsize for n in names if isinstance(named.get(n), Tensor)]
    return sum(sizes) * _tile_elements(options)


@contextmanager
def recording(arch: int, case: str, dtype: str, into: list[Compiled]) -> Iterator[None]:
    """In the block, a launch compiles its kernel for `arch` and appends it to `into` instead of running it."""

    def compile_only(kernel: Any, num_programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__.lstrip('_')}"
        sweeps = 2 if options.get("TILES", 1) > 1 else 1
        scattered = _IMAGES if options.get("CHANNELS", 1) > 1 else ()
        read = sweeps * _bulk_bytes(kernel, args, options, tuple(set(_READ) - set(scattered)))
        read -= (sweeps - 1) * _bulk_bytes(kernel, args, options, _READ_ONCE)
        written = _bulk_bytes(kernel, args, options, _WRITTEN)
        named = zip(kernel.arg_names, args, strict=False)
        tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
        moved = sum(
            t.numel() * t.itemsize * (1 if name in _READ_ONCE or name not in _READ else sweeps) for name, t in tensors
        )
        compiled = kernel.warmup(*args, grid=(num_programs,), **options)
        code = _statistics(compiled.asm["cubin"])
        into.append(Compiled(case, name, dtype, arch, options["num_warps"], read, written, moved, code))

    if _launch.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set, so that kernels cannot be compiled; unset it")
    before, _launch.launcher, _dispatch.compiling = _launch.launcher, compile_only, True
    driver = triton.runtime.driver
    active = driver._active
    driver.set_active(_Compiler(arch))
    try:
        yield
    finally:
        _launch.launcher, _dispatch.compiling = before, False
        driver._active = active


def _matching(
    shape: tuple[int, ...], head: bool, guided: bool, nhwc: bool = False, weighted: bool = False
) -> Callable[[torch.dtype], None]:
    """Raw outputs in the dtype, images in float32 if there is a head, as in a training step."""

    def run(dtype: torch.dtype) -> None:
        real, fake, uncond = torch.empty(3, *shape, dtype=dtype)
        x0, x = torch.empty(2, *shape, dtype=torch.float32 if head else dtype)
        if nhwc:
            real, fake, uncond = (t.to(memory_format=torch.channels_last) for t in (real, fake, uncond))
        a, k, factor = torch.empty(3, 1024)[:, : shape[0]].clone()
        dk.matching_loss_and_grad(
            x0,
            real,
            fake,
            x=x if head else None,
            head=dk.LinearHead(a, k) if head else None,
            real_uncond=uncond if guided else None,
            guidance_scale=8.0 if guided else 1.0,
            sample_weight=factor if weighted else None,
            scale=0.5 if weighted else 1.0,
        )

    return run


def _beyond_int32(dtype: torch.dtype) -> None:
    """The kernels for a sample with more than 2^31 elements; the tensors represent larger ones."""
    (x0, real, fake, grad), sums = torch.empty(4, 64, dtype=dtype), torch.empty(64)
    sizes, options = (2**31 + 16, 2**19 + 1), {"BLOCK": 4096, "ACC": tl.float32, "num_warps": 8}
    counts = torch.empty(64, dtype=torch.int64)
    matching, denoising = ops.score_difference, ops.denoising_loss
    _launch.launch(
        matching._distances, 1, x0, real, None, None, None, None, sums, *sizes, GUIDANCE=1.0, CHANNELS=1, **options
    )
    _launch.launch(
        matching._chunk_gradients, 1, sums, real, fake, None, None, None, grad, sums, sums, sums, counts, 2, *sizes,
        SCALE=1.0, GUIDANCE=1.0, COLS=1024, **options,
    )  # fmt: skip
    _launch.launch(
        denoising._loss_and_grad,
        1,
        x0,
        real,
        sums,
        None,
        None,
        None,
        grad,
        sums,
        2,
        *sizes,
        SCALE=1.0,
        CHANNELS=1,
        **options,
    )


def _denoising(shape: tuple[int, ...], head: bool, nhwc: bool = False) -> Callable[[torch.dtype], None]:
    def run(dtype: torch.dtype) -> None:
        out = torch.empty(shape, dtype=dtype)
        out = out.to(memory_format=torch.channels_last) if nhwc else out
        target, x = torch.empty(2, *shape, dtype=torch.float32 if head else dtype)
        a, k, weight = torch.empty(3, 1024)[:, : shape[0]].clone()
        at = {"x": x, "head": dk.LinearHead(a, k)} if head else {}
        dk.denoising_loss_and_grad(out, target, weight, **at)

    return run


def _gan(kind: str) -> Callable[[torch.dtype], None]:
    def run(dtype: torch.dtype) -> None:
        gen, data, perturbed = torch.empty(64, dtype=dtype), *torch.empty(2, 40, dtype=dtype)
        dk.gan_critic_loss_and_grad(gen, data, kind=kind, perturbed_data_logits=perturbed, r1_weight=0.5, scale=0.01)
        dk.gan_critic_loss_and_grad(gen, data, kind=kind)
        dk.gan_generator_loss_and_grad(gen, kind=kind)

    return run


def cases() -> dict[str, Callable[[torch.dtype], None]]:
    """All compiled calls by name; `ragged` in a name means sizes that do not allow wide accesses."""
    return {
        "matching x0 3x64x64": _matching((2, 3, 64, 64), head=False, guided=False),
        "matching head+cfg 4x64x64": _matching((2, 4, 64, 64), head=True, guided=True),
        "matching head+cfg 4x128x128": _matching((2, 4, 128, 128), head=True, guided=True),
        "matching nhwc head 3x64x64": _matching((2, 3, 64, 64), head=True, guided=False, nhwc=True, weighted=True),
        "matching nhwc head+cfg 4x128x128": _matching((2, 4, 128, 128), head=True, guided=True, nhwc=True),
        "matching ragged 3x7x5": _matching((3, 3, 7, 5), head=True, guided=True),
        "matching ragged 1x1x1 batch 1": _matching((1, 1, 1, 1), head=False, guided=False),
        "losses beyond int32": _beyond_int32,
        "denoising head 3x64x64": _denoising((2, 3, 64, 64), head=True),
        "denoising x0 4x128x128": _denoising((2, 4, 128, 128), head=False),
        "denoising nhwc head 3x64x64": _denoising((2, 3, 64, 64), head=True, nhwc=True),
        "denoising ragged 3x7x5": _denoising((3, 3, 7, 5), head=True),
        "gan softplus": _gan("softplus"),
        "gan hinge": _gan("hinge"),
        **norm_cases(),
    }


def compile_cases(arch: int, dtype: str, only: str = "") -> list[Compiled]:
    """Compile the cases whose name contains one of `only` (a,b,c) for one target and dtype."""
    found: list[Compiled] = []
    for case, run in cases().items():
        if any(part in case for part in only.split(",")):
            with dk.use("triton"), recording(arch, case, dtype, found):
                run(DTYPES[dtype])
    return found


def compile_sizes(sizes: list[int], arch: int) -> None:
    """Print the access widths of the matching loss in bf16 for samples of these sizes."""
    for num in sizes:
        found: list[Compiled] = []
        x0, real, fake = torch.empty(3, 2, num, dtype=torch.bfloat16)
        with dk.use("triton"), recording(arch, f"matching {num}", "bf16", found):
            dk.matching_loss_and_grad(x0, real, fake)
        code = found[0].code
        print(f"{num:8d} {found[0].kernel} loads {code.loads} stores {code.stores}")


def _report(each: Compiled) -> dict[str, Any]:
    code = each.code._asdict()
    return {**{key: getattr(each, key) for key in each._fields if key != "code"}, **code}


def main(argv: list[str] | None = None) -> int:
    """Compile the requested kernels, print a line for each, and with --check fail on any fault."""
    parser = argparse.ArgumentParser(prog="python -m dmd2_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", help="compute capabilities, as in 80,90,100")
    parser.add_argument("--dtype", default="bf16,fp16,fp32", help="dtypes, as in bf16,fp32")
    parser.add_argument("--only", default="", help="compile the cases whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile; a target is never split")
    parser.add_argument("--check", action="store_true", help="exit 1 if a kernel has a fault")
    parser.add_argument("--csv", help="write the statistics to this file")
    parser.add_argument("--warmup-mock", type=int, nargs="+", metavar="N", help="widths at samples of N elements")
    args = parser.parse_args(argv)
    archs = [int(arch) for arch in args.arch.split(",")]
    if args.warmup_mock:
        compile_sizes(args.warmup_mock, archs[0])
        return 0
    targets = [(arch, dtype, args.only) for arch in archs for dtype in args.dtype.split(",")]
    if args.jobs == 1:
        groups = [compile_cases(*target) for target in targets]
    else:
        with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(targets))) as pool:
            groups = pool.starmap(compile_cases, targets, chunksize=1)
    return _print([each for group in groups for each in group], args.check, args.csv)


def _print(done: list[Compiled], check: bool, path: str | None) -> int:
    faulty = 0
    for each in done:
        faults = each.faults()
        faulty += bool(faults)
        if faults or not check:
            label = f"sm_{each.arch} {each.dtype} {each.case}: {each.kernel}"
            print(f"{label}: {'; '.join(faults) or each.code}", flush=True)
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(_report(done[0])))
            writer.writeheader()
            writer.writerows(map(_report, done))
    print(f"{len(done)} kernels compiled, {faulty} with faults")
    return 1 if check and faulty else 0


if __name__ == "__main__":
    sys.exit(main())
