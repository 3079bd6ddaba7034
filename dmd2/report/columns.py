"""The measured columns of tables: one entry for each. Does not import torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from dmd2.config.protocols import PROTOCOLS

PaperMetric = Literal["resolution", "latency_s", "fid", "patch_fid", "clip", "diversity"]
"""What the paper's tables quote, in the order of columns; a measured column of the same name may be of other data."""


class Column(NamedTuple):
    """How a value is shown."""

    title: str
    better: Literal["lower", "higher"] | None = None  # none: neither, or both ends are bad
    spread: bool = False  # whether the CSV has NAME_sd beside it
    decimals: int | None = None  # of the paper's figure; the measured one has those of its deviation


COLUMNS: dict[str, Column] = {
    "resolution": Column("resolution", decimals=0),
    "latency_s": Column("latency (s)", "lower", spread=True, decimals=2),
    **{
        f"latency_{part}_s": Column(f"latency of the {title} (s)", "lower", spread=True)
        for part, title in (("text", "text encoder"), ("network", "network"), ("decoder", "decoder"))
    },
    "fid": Column("FID", "lower", spread=True, decimals=2),
    **{f"fid_{name}": Column(f"FID, protocol {name}", "lower", spread=True) for name in PROTOCOLS},
    "patch_fid": Column("patch FID", "lower", spread=True, decimals=2),
    "clip": Column("CLIP", "higher", spread=True, decimals=3),
    "alignment": Column("prompt accuracy", "higher", spread=True),
    "alignment_held_out": Column("prompt accuracy, held-out compositions", "higher", spread=True),
    "lpips_diversity": Column("LPIPS diversity", spread=True),
    "prompt_diversity": Column("diversity within prompts", spread=True),
    "inception_score": Column("inception score", "higher", spread=True),
    "pixel_fd": Column("pixel FD", "lower", spread=True),
    "precision": Column("precision", "higher"),
    "recall": Column("recall", "higher"),
    "accuracy": Column("accuracy", "higher"),
    "nearest_distance": Column("nearest real image"),
    "diversity": Column("diversity", decimals=2),
}
"""Columns by the name in the CSV and, but for `resolution`, in the metrics record."""

OF_CLASSES = (
    *("fid", "fid_edm", "fid_dmd2", "inception_score", "pixel_fd"),
    *("precision", "recall", "accuracy", "nearest_distance", "diversity"),
)
"""The measured columns of a table that names none."""

TICK_TITLES = {"ttur": "TTUR", "gan": "GAN"}
"""Titles of yes/no columns that are not their name with spaces."""
