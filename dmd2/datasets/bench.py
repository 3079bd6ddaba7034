"""How fast this machine shards: `python -m dmd2.datasets.bench --workers 1 2` on JPEGs of ImageNet's usual size."""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dmd2.config import Data
from dmd2.datasets.images import write_images
from dmd2.lineage.spec import Spec

HEIGHT, WIDTH, CLASSES = 375, 500, 4


def write_photographs(root: Path, num: int) -> None:
    """Smooth noise as JPEGs of about 60 kB in class folders."""
    rng = np.random.default_rng(0)
    for number in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8))
        path = root / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=92)


def cpu_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def shard(root: Path, num: int, workers: int) -> tuple[float, float]:
    """(images a second, processor seconds an image) of sharding a tree, the start of the processes included."""
    data = Data(source="image_folder", path=str(root), resolution=64, num_classes=CLASSES, shard_size=max(num // 16, 1))
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.perf_counter(), cpu_seconds()
        write_images(Path(folder) / "manifest.json", data, Spec.of("shards", "bench", data=data), workers=workers)
        return num / (time.perf_counter() - began), (cpu_seconds() - used) / num


def main() -> None:
    """Prints a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.images)
        for workers in options.workers:
            rate, cpu = shard(Path(folder), options.images, workers)
            print(f"{workers} workers: {rate:.0f} images/s, {1000 * cpu:.2f} ms of CPU an image", flush=True)


if __name__ == "__main__":
    main()
