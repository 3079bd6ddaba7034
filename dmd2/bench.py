"""Times a training step and its parts: `python -m dmd2.bench --preset digits --run dmd2 --threads 1`.

Networks have initial weights and the data are random, so nothing has to be made first. Times are wall-clock means on
whatever device is there; on a shared machine compare rows of one run, not runs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from dmd2 import distributed, objective, optimization, sampling
from dmd2.plan import Plan
from dmd2.teachers import load_teacher
from dmd2.training import Distillation

WORKFLOW = Path(__file__).parent.parent / "workflow"


class Stopwatch:
    """Seconds by part; a part inside another is not counted twice."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `part`, or to the part that is open already."""

        def call(*arguments: Any, **options: Any) -> Any:
            if self._open:
                return function(*arguments, **options)
            self._open.append(part)
            start = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += self.now() - start
                self._open.pop()

        return call


@contextmanager
def instrumented(run: Distillation, watch: Stopwatch) -> Iterator[None]:
    """The parts of `run.step` under the watch."""
    parts = [
        (sampling, "simulate", "generator input"),
        (objective, "matching_gradient", "real and fake score"),
        (objective, "gan_gradient", "generator's GAN term"),
        (objective, "critic_losses", "critic forward"),
        (torch.Tensor, "backward", "backward"),
        (optimization.Descent, "step", "optimizers"),
        (optimization.Average, "update", "weight average"),
    ]
    with ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(run.generator, "forward", watch.timed("generator", run.generator.forward)))
        yield


def measure(run: Distillation, iterations: int, warmup: int) -> tuple[float, float, dict[str, float]]:
    """Milliseconds per iteration of the step as it is, of the step under the watch, and of each part."""
    for index in range(warmup):
        run.step(index)
    watch = Stopwatch(run.device)
    start = watch.now()
    for index in range(warmup, warmup + iterations):
        run.step(index)
    plain = watch.now() - start
    with instrumented(run, watch):
        start = watch.now()
        for index in range(warmup, warmup + iterations):
            run.step(index)
        whole = watch.now() - start
    scale = 1000 / iterations
    return plain * scale, whole * scale, {part: s * scale for part, s in watch.seconds.items()}


def _always(batch: Any, index: int) -> Any:
    return batch


def main(
    preset: Annotated[str, typer.Option()] = "digits",
    run: Annotated[list[str] | None, typer.Option(help="repeatable")] = None,
    iterations: Annotated[int, typer.Option(min=1)] = 100,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Time the training step of one or more runs and print the breakdown."""
    torch.set_num_threads(threads)
    plan, where = Plan(WORKFLOW, preset), distributed.device_of(device)
    for name in run or ["dmd2"]:
        train = plan.run(name).train
        teacher = load_teacher(plan.preset.teacher, plan.preset.data)
        rng = torch.Generator().manual_seed(0)
        x0 = torch.rand((train.batch_size, *teacher.sample_shape), generator=rng) * 2 - 1
        cond = teacher.conditioner.draw(train.batch_size, rng)
        noise = torch.randn(x0.shape, generator=rng)
        trainee = Distillation(
            teacher, train, data=partial(_always, (x0, cond)), pairs=partial(_always, (noise, x0, cond)), device=where
        )
        plain, whole, parts = measure(trainee, iterations, warmup=2 * train.critic_steps_per_generator)
        size = sum(p.numel() for p in trainee.generator.parameters())
        print(
            f"{preset}/{name} on {where}, {threads} thread(s): {size / 1e6:.3f} M parameters, batch "
            f"{train.batch_size}, R = {train.critic_steps_per_generator}: "
            f"{plain:.1f} ms/iteration, {1000 * train.batch_size / plain:.0f} images/s"
        )
        parts["rest"] = whole - sum(parts.values())
        for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {part:24s}{ms:9.2f} ms {100 * ms / whole:6.1f} %")
        if where.type == "cuda":
            print(f"  peak memory {torch.cuda.max_memory_allocated(where) / 2**30:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
