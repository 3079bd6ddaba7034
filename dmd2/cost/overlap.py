"""What of the gradients' exchange a backward pass hides: `python -m dmd2.cost.overlap --preset imagenet64 --batch 40`.

A dry run with meta tensors tells in which order a backward pass ends the gradients, and how many of its FLOPs have been
done by then. `training.gradient_buckets` lets a bucket leave once it and those before it are complete. The times are of
a model, not measured: backward at `--tflops`, buckets one after the other at `--gb-per-s` (what a rank's gradients are
divided by to get the time of their all-reduce). *Exposed* is what is left after the backward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from torch import nn

from dmd2.config import Preset, Train
from dmd2.cost.flops import FlopCounter
from dmd2.cost.meta_run import meta_networks, meta_run, meta_tensors
from dmd2.cost.step_parts import CRITIC_BACKWARD, GENERATOR_BACKWARD, observed
from dmd2.lineage.plan import Plan
from dmd2.training.gradient_buckets import BUCKET_BYTES, buckets_of
from dmd2_kernels import use

WORKFLOW = Path(__file__).parent.parent.parent / "workflow"


class Departure(NamedTuple):
    """One bucket of gradients."""

    num_bytes: int
    done: float  # the share of the backward pass's FLOPs that is done when it leaves


class Exchange(NamedTuple):
    """The exchange beside one backward pass."""

    part: str
    flops: float
    departures: list[Departure]

    @property
    def num_bytes(self) -> int:
        """All gradients."""
        return sum(each.num_bytes for each in self.departures)

    def seconds(self, tflops: float, gb_per_s: float) -> tuple[float, float, float]:
        """(backward, exchange, exposed) by the model."""
        backward, ready = self.flops / (tflops * 1e12), 0.0
        for each in self.departures:
            ready = max(ready, each.done * backward) + each.num_bytes / (gb_per_s * 1e9)
        return backward, self.num_bytes / (gb_per_s * 1e9), ready - backward


class _Arrivals(FlopCounter):
    """FLOPs at the begin and end of each part, and when each parameter's gradient was complete."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: dict[str, list[int]] = defaultdict(list)
        self.complete: dict[nn.Parameter, int] = {}

    def begin(self, part: str) -> None:
        super().begin(part)
        self.spans[part].append(self.total)

    def end(self, part: str) -> None:
        super().end(part)
        self.spans[part].append(self.total)

    def arrived(self, param: nn.Parameter) -> None:
        self.complete[param] = self.total


def departures(
    params: Sequence[nn.Parameter], complete: dict[nn.Parameter, int], start: int, end: int, bucket_bytes: int
) -> list[Departure]:
    """When the buckets of `params` leave, from the FLOPs at which their gradients are complete."""
    found, last = [], 0
    for bucket in buckets_of(params, bucket_bytes):
        held = [param for param in bucket if param in complete]
        last = max([last, *(complete[param] for param in held)])
        size = sum(param.numel() * param.element_size() for param in held)
        found.append(Departure(size, (last - start) / max(1, end - start)))
    return [each for each in found if each.num_bytes]


def exchanges(preset: Preset, train: Train, batch: int, bucket_bytes: int = BUCKET_BYTES) -> list[Exchange]:
    """The generator's and the critic's exchange in an iteration that moves both."""
    train = train.model_copy(update={"batch_size": batch, "turns": "both"})
    built, copies = meta_networks(preset.teacher, preset.data)
    with meta_tensors(), use("triton"):
        run, counter = meta_run(built, train, copies), _Arrivals()
        optimizers: dict[str, Any] = {
            GENERATOR_BACKWARD: run._generator_optimizer,
            CRITIC_BACKWARD: run._critic_optimizer,
        }
        for optimizer in optimizers.values():
            for param in optimizer.params:
                param.register_post_accumulate_grad_hook(counter.arrived)
        with observed(run, counter), counter:
            run.step(0)
    found = []
    for part, optimizer in optimizers.items():
        start, end = counter.spans[part][-2:]
        leaving = departures(optimizer.params, counter.complete, start, end, bucket_bytes)
        found.append(Exchange(part, end - start, leaving))
    return found


def text_of(found: Sequence[Exchange], tflops: float, gb_per_s: float) -> str:
    """A table in Markdown, and the shares of backward that are done when the buckets leave."""
    lines = ["| | buckets | MB | backward, ms | exchange, ms | exposed, ms | hidden |", "|---|---|---|---|---|---|---|"]
    for each in found:
        backward, exchange, exposed = (1000 * t for t in each.seconds(tflops, gb_per_s))
        row = f"{each.part} | {len(each.departures)} | {each.num_bytes / 1e6:.0f} | {backward:.1f} | {exchange:.1f}"
        lines.append(f"| {row} | {exposed:.2f} | {1 - exposed / exchange:.0%} |")
    shares = [f"{each.part}: " + " ".join(f"{d.done:.0%}" for d in each.departures) for each in found]
    return "\n".join([*lines, "", "Backward done when a bucket leaves:", *shares])


def main(
    preset: Annotated[str, typer.Option()] = "imagenet64",
    run: Annotated[str, typer.Option()] = "dmd2",
    batch: Annotated[int, typer.Option(min=1, help="samples of one device")] = 40,
    tflops: Annotated[float, typer.Option(help="rate of the backward pass; assumed")] = 400.0,
    gb_per_s: Annotated[float, typer.Option(help="rate of the exchange; assumed")] = 150.0,
    bucket_mb: Annotated[float, typer.Option(help="size of a bucket")] = BUCKET_BYTES / 2**20,
) -> None:
    """Print what of the exchange of gradients the backward passes hide."""
    plan = Plan(WORKFLOW, preset)
    found = exchanges(plan.preset, plan.run(run).train, batch, int(bucket_mb * 2**20))
    print(f"{preset}, {run}, {batch} samples a device, {tflops:g} TFLOP/s, {gb_per_s:g} GB/s (assumed)")
    print(text_of(found, tflops, gb_per_s))


if __name__ == "__main__":
    typer.run(main)
