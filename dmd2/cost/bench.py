"""Times a training step and its parts: `python -m dmd2.cost.bench --preset digits --run dmd2 --threads 1`.

Networks have initial weights and the images are noise, so nothing has to be made first; they come from shards by the
loader of a real run. On a GPU times are those of its own clock, taken without waiting for it; the data's is the host's,
which reads while the GPU computes. On a shared machine compare rows of one run, not runs; the step in units of a
bare pass of the network depends little on the machine. `--profile` lists what the device's time goes to; where that is
less than the step's, the host is what a GPU waits for. Several GPUs:
`torchrun --nproc-per-node 8 -m dmd2.cost.bench --preset imagenet64 --layout shard`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from dmd2.config import Train
from dmd2.cost.bench_rows import Row, append, row_of, text_of
from dmd2.cost.gpu_hours import num_images
from dmd2.cost.meta_run import some_tokens
from dmd2.cost.step_parts import DATA, observed
from dmd2.datasets import write_shards
from dmd2.datasets.loader import Loader, to_batch
from dmd2.lineage.plan import Plan
from dmd2.method.denoiser import Cond, Teacher, move
from dmd2.method.distillation import Distillation
from dmd2.method.inputs import Distance
from dmd2.metrics.perceptual import distance_by, without_values
from dmd2.teachers import load_teacher
from dmd2.training import ranks
from dmd2.training.rng import normal, step_rng

WORKFLOW = Path(__file__).parent.parent.parent / "workflow"
CACHE_BYTES = 256 * 2**20
"""A data set up to this size is held in memory by the loader, here as in a run."""


class Stopwatch:
    """Seconds by part of a step, by the device's clock; an observer of `step_parts.observed`."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._start: Any = None

    def _mark(self, part: str = "") -> Any:
        if not self._on_gpu or part == DATA:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def begin(self, part: str) -> None:
        """See `step_parts.Observer`."""
        self._start = self._mark(part)

    def end(self, part: str) -> None:
        """See `step_parts.Observer`."""
        self._spans.append((part, self._start, self._mark(part)))

    def now(self) -> float:
        """The host's time when all work queued on the device is done."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """The sum of each part, after the device has done all."""
        self.now()
        total: dict[str, float] = defaultdict(float)
        for part, start, end in self._spans:
            total[part] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        return dict(total)


class Feed:
    """Batches of images of noise, written as shards and read by the loader of a run; also as pairs.

    Every rank writes the same shards, into a folder of its own.
    """

    def __init__(self, folder: Path, plan: Plan, teacher: Teacher, batch_size: int):
        self._codec = teacher.codec
        manifest, rng = folder / "manifest.json", np.random.default_rng(0)
        classes = plan.preset.data.classes

        def make(ids: range) -> dict[str, Any]:
            x0 = torch.from_numpy(rng.uniform(-1, 1, (len(ids), *teacher.sample_shape)).astype(np.float32))
            labels = [i % classes for i in ids]
            cond = teacher.conditioner.tokenize(labels)
            fields = {f"cond.{name}.npy": value.numpy() for name, value in cond.items()}
            return {"latent.npy": teacher.codec.encode(teacher.codec.decode(x0), ids), **fields, "cls": labels}

        total = 4 * batch_size * ranks.world_size()
        write_shards(manifest, total, plan.preset.data.shard_size, make, plan.latents, batch_size=256)
        in_memory = num_images(plan) * int(np.prod(teacher.sample_shape)) <= CACHE_BYTES
        self._loader = Loader(
            manifest,
            batch_size=batch_size,
            seed=0,
            rank=ranks.rank(),
            world=ranks.world_size(),
            digest=plan.latents.digest,
            cache_bytes=CACHE_BYTES if in_memory else 0,
        )

    def read(self, index: int) -> tuple[Tensor, Cond]:
        """This rank's batch `index`."""
        return to_batch(self._loader.batch(index), self._codec)

    def data(self, index: int) -> tuple[Tensor, Cond]:
        """See `training.Batches`."""
        return self.read(index)

    def pairs(self, index: int) -> tuple[Tensor, Tensor, Cond]:
        """See `distillation.PairBatches`; an image stands for its noise as well."""
        x0, cond = self.read(index)
        return x0, x0, cond

    def close(self) -> None:
        """Ends the loader's thread."""
        self._loader.close()


def bare_pass(run: Distillation, times: int) -> float:
    """Milliseconds, the median, of a forward and backward pass of the generator on as many samples as it is given."""
    num, rng, watch, found = run.micro_batches.size, step_rng(0, 0, device=run.device), Stopwatch(run.device), []
    x = normal((num, *run.teacher.sample_shape), rng)
    cond = run.teacher.conditioner.embed(move(some_tokens(run.teacher, num, rng), run.device))
    for _ in range(times):
        start = watch.now()
        run.generator(x, torch.ones(num, device=run.device), cond).square().mean().backward()
        found.append(watch.now() - start)
        run.generator.zero_grad()
    return 1000 * median(found)


def time_step(run: Distillation, feed: Feed, iterations: int, warmup: int) -> tuple[float, float, dict[str, float]]:
    """Milliseconds per iteration of the step as it is, of the step under the watch, and of each part."""
    for index in range(warmup):
        run.step(index)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    watch = Stopwatch(run.device)
    start = watch.now()
    for index in range(warmup, warmup + iterations):
        run.step(index)
    plain = watch.now() - start
    with observed(run, watch, [(feed, "read", DATA)]):
        start = watch.now()
        for index in range(warmup, warmup + iterations):
            run.step(index)
        whole = watch.now() - start
    scale = 1000 / iterations
    return plain * scale, whole * scale, {part: s * scale for part, s in watch.seconds().items()}


def profiled(run: Distillation, start: int, iterations: int, rows: int = 25) -> tuple[float, str]:
    """Milliseconds of an iteration in which the device computes, and its kernels (a CPU's operators) by their time."""
    on_gpu = run.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        for index in range(start, start + iterations):
            run.step(index)
        if on_gpu:
            torch.cuda.synchronize(run.device)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(((getattr(e, name), e.count, e.key) for e in profile.key_averages()), reverse=True)
    lines = [
        f"  {us / 1000 / iterations:8.2f} ms {count / iterations:8.1f} times  {key[:100]}"
        for us, count, key in found[:rows]
    ]
    busy = sum(us for us, *_ in found) / 1000 / iterations
    return busy, "\n".join([f"  {'GPU' if on_gpu else 'CPU'} busy for {busy:.1f} ms/iteration", *lines])


def trainee(
    teacher: Teacher, train: Train, feed: Feed, device: torch.device, how: Mapping[str, Any], micro_batch: int | None
) -> Distillation:
    """The run as a training job would build it, LPIPS with made-up weights."""
    distance: Distance = torch.nn.functional.mse_loss
    if train.regression_weight > 0 and train.regression_loss == "lpips":
        network = without_values().to_empty(device=device)
        for value in (*network.parameters(), *network.buffers()):
            torch.nn.init.uniform_(value, 0.01, 0.02)
        distance = distance_by(network)
    run = Distillation(
        teacher,
        train,
        data=feed.data,
        pairs=feed.pairs,
        regression_distance=distance,
        micro_batch_size=micro_batch,
        layout=how["layout"],
        device=device,
    )
    for network in (run.generator, run.critic.fake, run.teacher.denoiser):
        network.prepare(compile=how["compile"], activation_checkpointing=how["recompute"])
    return run


def main(
    preset: Annotated[str, typer.Option()] = "digits",
    run: Annotated[list[str] | None, typer.Option(help="repeatable; dmd2 by default")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="rounded up to whole cycles of R")] = 100,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option()] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="global; the run's by default")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="samples passed at a time")] = None,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="the run's by default")] = None,
    layout: Annotated[Literal["replicate", "shard"], typer.Option(help="under torchrun")] = "replicate",
    compile: Annotated[bool, typer.Option("--compile")] = False,
    recompute: Annotated[bool, typer.Option("--activation-checkpointing")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="list what the device's time goes to")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows, as to results/bench/step.csv")] = None,
) -> None:
    """Time the training step of one or more runs and print the breakdown."""
    torch.set_num_threads(threads)
    plan, where = Plan(WORKFLOW, preset), ranks.device_of(device)
    bare = plan.preset.teacher.model_copy(update={"weights": None})
    over = {key: value for key, value in {"batch_size": batch_size, "precision": precision}.items() if value}
    how = {"layout": layout, "compile": compile, "recompute": recompute}
    rows: list[Row] = []
    with ranks.process_group(where), TemporaryDirectory() as folder:
        for name in run or ["dmd2"]:
            train = plan.run(name).train.model_copy(update=over)
            teacher, period = load_teacher(bare, plan.preset.data), train.critic_steps_per_generator
            feed = Feed(Path(folder) / name, plan, teacher, ranks.local_share(train.batch_size))
            built, num = trainee(teacher, train, feed, where, how, micro_batch), -(-iterations // period) * period
            times = time_step(built, feed, num, warmup=2 * period)
            busy, listing = profiled(built, 2 * period + 2 * num, period) if profile else (None, "")
            feed.close()
            row = row_of(plan, name, train, built, times, bare_pass(built, num))
            rows.append({**how, "iterations": num, "ms_busy": busy and f"{busy:.2f}", **row})
            if ranks.rank() == 0:
                print("\n".join(filter(None, (text_of(rows[-1]), listing))), flush=True)
    if out is not None and ranks.rank() == 0:
        append(out, rows)


if __name__ == "__main__":
    typer.run(main)
