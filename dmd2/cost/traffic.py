"""Launches and bytes of a training step on a GPU: `python -m dmd2.cost.traffic --preset imagenet64 --batch 40`.

Counted on a dry run with meta tensors in channels_last, the layout of a GPU. Each operation reads its inputs and writes
its outputs once, except: a convolution's bias is a launch of its own over its output, as torch runs cuDNN's, and
so is the bias's gradient; the norms of `dmd2_kernels` have the launches and the second reads of their host functions.
*Before* is the step with the norms fused alone, each in two passes; *after* has small images in one pass and biases and
additions folded into the norms and the sums (`dmd2_kernels.folds`). Views, allocations and host work are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dmd2.config import Preset, Train
from dmd2.cost.meta_run import meta_networks, meta_run, meta_tensors
from dmd2.cost.observed_ops import OpObserver
from dmd2.lineage.plan import Plan
from dmd2.method import sampling
from dmd2_kernels import ops, use

WORKFLOW = Path(__file__).parent.parent.parent / "workflow"
KINDS = (
    "convolutions",
    "biases of convolutions",
    "norms",
    "sums and scales of activations",
    "casts and copies",
    "rest",
)
CONV, BIAS, NORM, SUM, COPY, REST = KINDS
_KIND_OF = {
    **dict.fromkeys(("convolution", "convolution_backward"), CONV),
    **dict.fromkeys(("group_norm_silu", "group_norm_silu_backward", "native_group_norm", "silu"), NORM),
    **dict.fromkeys(("native_group_norm_backward", "silu_backward"), NORM),
    **dict.fromkeys(("add", "add_", "mul", "div", "residual_sum"), SUM),
    **dict.fromkeys(("_to_copy", "copy_", "clone", "cat"), COPY),
}


def num_bytes(*values: Any) -> int:
    """The size of all tensors in a structure."""
    return sum(t.numel() * t.itemsize for t in tree_leaves(values) if isinstance(t, Tensor))


class Traffic(OpObserver):
    """Launches and bytes by kind of the operations in the block; `once`: small norms in channels_last in one pass."""

    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self._once = once
        self.launches: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def _count(self, kind: str, launches: int, size: int) -> None:
        self.launches[kind] += launches
        self.bytes[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """cuDNN's convolutions keep channels_last; torch's shapes on the meta device do not."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.rpartition("::")[2]
        if name == "convolution":
            return _as(args[0], out)
        return (_as(args[1], out[0]), *out[1:]) if name == "convolution_backward" else out

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """See `OpObserver`."""
        schema = func._schema
        name = schema.name.rpartition("::")[2]
        is_view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in schema.returns)
        if is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            return
        kind, size, launches = _KIND_OF.get(name, REST), num_bytes(args, kwargs, out), 1
        if kind == SUM and not (isinstance(out, Tensor) and out.ndim == 4 and out.shape[1] > 4):
            kind = REST
        if name == "sum" and args[0].ndim == 4 and out.ndim == 1:
            kind = BIAS  # the gradient of a folded one
        if name == "convolution" and args[2] is not None:
            self._count(BIAS, 1, 2 * num_bytes(out))
        elif name == "convolution_backward" and args[-1][2]:
            self._count(BIAS, 1, num_bytes(args[0]))
        elif name in ("group_norm_silu", "group_norm_silu_backward"):
            launches, again = self._norm(name.endswith("backward"), args)
            size += again
        self._count(kind, launches, size)

    def _norm(self, backward: bool, args: tuple[Any, ...]) -> tuple[int, int]:
        """Launches, and the bytes that are read a second time."""
        x, groups = (args[1], args[4]) if backward else (args[0], args[1])
        pixels, channels = x[0, 0].numel(), x.shape[1] // groups
        biased = len(args) > 10 and args[10] is not None
        read = num_bytes(x) * (2 if backward else 1)
        if x.is_contiguous():
            resident = ops.group_norm_silu.budget(channels, x.itemsize, backward=backward, added=biased)
            tiles = ops.group_norm_silu.tiling(channels, pixels, resident)[2]
            return 2 if backward else 1, read if tiles > 1 else 0
        run = ops.group_norm_nhwc_once.run_of(pixels, groups, channels, x.itemsize, backward=backward)
        if run is not None and self._once:
            return 2 if backward else 1, 0
        return (4 + biased if backward else 3), read


def _as(source: Tensor, out: Tensor | None) -> Tensor | None:
    """`out` in channels_last if the convolution's input is."""
    last = source.is_contiguous(memory_format=torch.channels_last) and not source.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last) if last and out is not None else out


class Count(NamedTuple):
    """Launches and GB of an average iteration."""

    launches: float
    gigabytes: float


@contextmanager
def _as_on_a_gpu(*, folded: bool) -> Iterator[None]:
    """Meta tensors that take a GPU's layout and kernels; without `folded` as before the folding."""
    from dmd2.teachers import diffusers_layers

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", property(lambda self: True)))
        stack.enter_context(use("triton", fold=folded))
        if not folded:
            stack.enter_context(patch.object(diffusers_layers, "fuses", lambda x: False))
        yield


def traffic(preset: Preset, train: Train, batch: int, *, folded: bool) -> dict[str, Count]:
    """Launches and GB by kind of an average iteration of `train` with `batch` samples, and of all as `total`."""
    train = train.model_copy(update={"batch_size": batch})
    period, ends = train.critic_steps_per_generator, sorted({0, train.num_steps - 1})
    built, copies = meta_networks(preset.teacher, preset.data)
    found: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in (*KINDS, "total")}
    simulate = sampling.simulate
    with meta_tensors():
        run = meta_run(built, train, copies)
        for index, share in ((0, 1 / period), (1, (period - 1) / period)):
            for k in ends if share else []:

                def exactly(generator: Any, cond: Any, steps: Any, _: int, noise: Any, k: int = k) -> Any:
                    return simulate(generator, cond, steps, k, noise)

                counter = Traffic(once=folded)
                with patch.object(sampling, "simulate", exactly), _as_on_a_gpu(folded=folded), counter:
                    run.step(index)
                for kind in KINDS:
                    for sums in (found[kind], found["total"]):
                        sums[0] += counter.launches[kind] * share / len(ends)
                        sums[1] += counter.bytes[kind] * share / len(ends) / 1e9
    return {kind: Count(*sums) for kind, sums in found.items()}


def text_of(before: dict[str, Count], after: dict[str, Count]) -> str:
    """A table in Markdown."""
    lines = ["| | launches before | after | GB before | after |", "|---|---|---|---|---|"]
    for kind, old in before.items():
        new = after[kind]
        lines.append(f"| {kind} | {old.launches:.0f} | {new.launches:.0f} | {old[1]:.1f} | {new[1]:.1f} |")
    return "\n".join(lines)


def main(
    preset: Annotated[str, typer.Option()] = "imagenet64",
    run: Annotated[str, typer.Option()] = "dmd2",
    batch: Annotated[int, typer.Option(min=1, help="samples of one device")] = 40,
) -> None:
    """Print launches and bytes of an average iteration before and after the folding."""
    plan = Plan(WORKFLOW, preset)
    before, after = (traffic(plan.preset, plan.run(run).train, batch, folded=folded) for folded in (False, True))
    print(f"{preset}, {run}, {batch} samples, an average iteration")
    print(text_of(before, after))


if __name__ == "__main__":
    typer.run(main)
