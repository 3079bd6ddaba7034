"""Stages that write figures: curves of training and quality, sheets of samples; and the report's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from dmd2.config import Preset, Run
from dmd2.config.reading import parse
from dmd2.datasets import ShardReader
from dmd2.files import write_text
from dmd2.report.sheets import by_class, compare_png, grid_png, prompts_png

ROWS, COLUMNS = 8, 10
"""Of a sheet: images per class, and classes."""


def curves(logs: Mapping[str, Path], qualities: Mapping[str, Path], real: Path, folder: Path) -> None:
    """Writes curves.svg, brightness.svg and fid_curve.svg of the runs to `folder`."""
    from dmd2.report.figures import (  # imports matplotlib, which sheets do not need
        brightness_figure,
        curves_figure,
        fid_curve_figure,
    )

    curves_figure(logs, folder / "curves.svg")
    brightness_figure(logs, folder / "brightness.svg", data_brightness=_brightness(real))
    fid_curve_figure(qualities, folder / "fid_curve.svg")


def _brightness(manifest: Path) -> float:
    """Mean of the first 10,000 real images, in [-1, 1]."""
    reader = ShardReader(manifest)
    return float(reader.read(range(min(len(reader), 10_000)), ["image"])["image"].mean()) / 127.5 - 1


def grid(manifest: Path, out: Path) -> None:
    """Writes a sheet of the first samples of each class or prompt, or of the first samples if most classes have few."""
    images, labels = _first(manifest)
    if labels.dtype.kind == "U":
        prompts_png({"samples": (images, labels)}, out, each=COLUMNS)
    elif _too_thin(labels):
        compare_png({f"the first {ROWS * COLUMNS}, of classes in turn": images[: ROWS * COLUMNS]}, out, columns=COLUMNS)
    else:
        grid_png(images, labels, out, rows=ROWS)


def compare(sets: Mapping[str, Path], out: Path) -> None:
    """Writes sheets of several sets side by side with their titles."""
    panels, columns = {}, COLUMNS
    content = {title: _first(manifest) for title, manifest in sets.items()}
    if any(labels.dtype.kind == "U" for _, labels in content.values()):
        prompts_png(content, out)
        return
    thin = any(_too_thin(labels) for _, labels in content.values())
    for title, (images, labels) in content.items():
        picked, classes = by_class(images, labels, columns=COLUMNS, rows=ROWS)
        panels[title] = images[: ROWS * COLUMNS] if thin else picked
        columns = COLUMNS if thin else min(COLUMNS, len(classes))
    compare_png(panels, out, columns=columns)


def _too_thin(labels: np.ndarray) -> bool:
    """Whether a sheet with one class per column would have too few rows, although there are enough images."""
    _, counts = np.unique(labels, return_counts=True)
    return len(counts) > COLUMNS and counts.min() < ROWS


def _first(manifest: Path, num: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """The first samples, or evenly spaced ones if the first are of few classes because the set is sorted."""
    reader = ShardReader(manifest)
    label = "cls" if "cls" in reader.fields else "txt"
    content = reader.read(range(min(len(reader), num)), ["image", label])
    if label == "cls" and len(reader) > num and len(np.unique(content[label])) < COLUMNS:
        content = reader.read(np.linspace(0, len(reader) - 1, ROWS * COLUMNS).astype(np.int64), ["image", label])
    return content["image"], np.asarray(content[label])


def configuration(preset: str, runs: str, out: Path) -> None:
    """Writes the resolved preset and runs as YAML with all defaults, keys in the order of their models."""
    content = {
        "preset": parse(Preset, json.loads(preset), "preset").model_dump(mode="json"),
        "runs": {name: parse(Run, run, "run").model_dump(mode="json") for name, run in json.loads(runs).items()},
    }
    write_text(out, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
