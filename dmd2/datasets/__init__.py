"""Data sets of labelled images, latents and noise-image pairs: sources, tar shards, batches."""

from dmd2.datasets.images import write_images
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shards import read_manifest, write_shards
from dmd2.datasets.sources import CAPTIONED, SOURCES

__all__ = ["CAPTIONED", "SOURCES", "ShardReader", "read_manifest", "write_images", "write_shards"]
