"""Figures of the report: training curves, distances over training, and grids of samples.

They read JSON lines, CSV files and arrays, without torch and without matplotlib's global state. The format is that of
the output's suffix (`.svg`, `.png`, `.pdf`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from dmd2.errors import UserError
from dmd2.files import atomic
from dmd2.report.sheets import by_class, compare_png, grid_png

__all__ = [
    "brightness_figure",
    "by_class",
    "compare_png",
    "curves_figure",
    "fid_curve_figure",
    "grid_png",
    "read_curve",
    "read_log",
]

Points = tuple[list[float], list[float]]

# Okabe and Ito's palette for colour-blind readers; dashes distinguish lines without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: smaller, searchable
    "svg.hashsalt": "dmd2",  # else element ids, and so the file, would differ between runs
    "savefig.dpi": 160,
}
PANEL = (2.6, 1.9)  # inches
NARROW = 50.0  # a logarithmic axis with a smaller range is labelled at 1, 2 and 5, not only at decades

# Name in the log -> (title, whether the axis is logarithmic).
CURVES: dict[str, tuple[str, bool]] = {
    "matching_loss": ("Distribution matching loss", False),
    "denoising_loss": ("Fake-score denoising loss", False),
    "regression_loss": ("Regression loss", True),
    "gan_generator_loss": ("GAN loss, generator", False),
    "gan_critic_loss": ("GAN loss, discriminator", False),
    "d_accuracy": ("Discriminator accuracy", False),
    "generator_grad_norm": ("Gradient norm, generator", True),
    "critic_grad_norm": ("Gradient norm, critic", True),
    "gan_to_matching_ratio": ("GAN / matching gradient", True),
    "critic_lag": ("Critic lag: loss change between\ngenerator updates, share", False),
    "saturated": ("Values outside [-1, 1], share", False),
    "neighbour_ratio": ("Nearest / mean distance in batch", False),
    "num_nonfinite": ("Non-finite gradient values", False),
}
CHANCE = {"d_accuracy": 0.5}
DISTANCES = {
    "fid": ("FID", True),
    "pixel_fd": ("Pixel Fréchet distance", True),
    "diversity": ("Diversity within classes\n(data = 1)", False),
}


def read_log(path: Path | str) -> list[dict[str, float]]:
    """Reads the rows of a training log. Raises UserError naming file and line if one is not an object with `step`."""
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); delete the line and draw again") from None
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f"{path}:{number}: a log row is an object with `step`; delete the line and draw again")
        rows.append(row)
    return rows


def read_curve(path: Path | str) -> list[dict[str, float]]:
    """Reads the rows of a curve CSV as floats, without empty cells. Raises UserError naming the file and line."""
    rows = []
    for number, line in enumerate(csv.DictReader(_lines(path)), 2):
        try:
            row = {name: float(value) for name, value in line.items() if value}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}; delete the file and run the workflow again") from None
        if "step" not in row:
            raise UserError(f"{path}:{number}: no value in column `step`; delete the file and run the workflow again")
        rows.append(row)
    return rows


def _lines(path: Path | str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the rule that writes it") from None


def curves_figure(runs: Mapping[str, Path | str], out: Path | str) -> None:
    """Plots losses, gradient norms and diagnostics over iterations, one line per run.

    `runs` maps a run's name to its log; a curve that no log has gets no panel. Raises UserError if there is none.
    """
    logs = {name: read_log(path) for name, path in runs.items()}
    shown = [name for name in CURVES if _has(logs, name) and (name != "num_nonfinite" or _any_nonzero(logs, name))]
    if not shown:
        raise UserError(f"none of {', '.join(map(str, runs.values()))} has a known curve; let training log once")
    with _style():
        columns = min(3, len(shown))
        figure, axes = _panels(len(shown), columns)
        for i, (axis, name) in enumerate(zip(axes, shown, strict=True)):
            title, log_scale = CURVES[name]
            _draw(axis, logs, "step", name, log_scale=log_scale)
            axis.set_title(title)
            axis.set_xlabel("iteration" if i + columns >= len(shown) else "")
            if name in CHANCE:
                axis.axhline(CHANCE[name], color="0.5", linewidth=0.7, zorder=1)
        _finish(figure, axes, out)


def fid_curve_figure(curves: Mapping[str, Path | str], out: Path | str) -> None:
    """Plots distances to the data over iterations and over generator updates (the paper's figure 9).

    `curves` maps a run's name to a CSV with the columns step, generator_updates, fid, pixel_fd, diversity. The two
    horizontal axes differ between runs that update the generator every iteration and every fifth. Raises UserError if
    no curve has a distance.
    """
    content = {name: read_curve(path) for name, path in curves.items()}
    shown = [name for name in DISTANCES if _has(content, name)]
    if not shown:
        raise UserError(f"none of {', '.join(map(str, curves.values()))} has a distance; evaluate a snapshot first")
    abscissae = {"step": "iteration (critic updates)", "generator_updates": "generator updates"}
    with _style():
        figure, axes = _panels(2 * len(shown), 2)
        for i, axis in enumerate(axes):
            name, x = shown[i // 2], list(abscissae)[i % 2]
            title, log_scale = DISTANCES[name]
            _draw(axis, content, x, name, log_scale=log_scale, markers=True)
            axis.set_xlabel(abscissae[x] if i // 2 == len(shown) - 1 else "")
            axis.set_ylabel(title if i % 2 == 0 else "")
            if i % 2:
                axis.sharey(axes[i - 1])
                axis.tick_params(labelleft=False)
        _finish(figure, axes, out)


def brightness_figure(logs: Mapping[str, Path | str], out: Path | str, data_brightness: float | None = None) -> None:
    """Plots the mean brightness of samples over iterations (the paper's figure 8), and the data's if given.

    For runs in latent space, where brightness means nothing, it plots the latents' standard deviation.
    """
    content = {name: read_log(path) for name, path in logs.items()}
    latent = _has(content, "latent_std") and not _has(content, "brightness")
    if not latent and not _has(content, "brightness"):
        raise UserError(f"none of {', '.join(map(str, logs.values()))} has `brightness`; let training log once")
    with _style():
        figure, axes = _panels(1, 1, size=(4.4, 2.6))
        _draw(axes[0], content, "step", "latent_std" if latent else "brightness", smooth=False)
        axes[0].set_xlabel("iteration")
        axes[0].set_ylabel("standard deviation of latents" if latent else "mean brightness of samples, in [-1, 1]")
        if data_brightness is not None and not latent:
            axes[0].axhline(data_brightness, color="0.5", linewidth=0.8, zorder=1, label="data")
        _finish(figure, axes, out)


@contextmanager
def _style() -> Iterator[None]:
    """The figures' style over matplotlib's defaults: a user's own settings have no say here."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def _panels(count: int, columns: int, size: tuple[float, float] = PANEL) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of `columns`; `size` of a panel in inches."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _draw(
    axis: Axes,
    content: Mapping[str, Sequence[Mapping[str, float]]],
    x: str,
    y: str,
    *,
    log_scale: bool = False,
    markers: bool = False,
    smooth: bool = True,
) -> None:
    """Draws one line per run; long lines pale, with their moving average on top."""
    for i, (name, rows) in enumerate(content.items()):
        xs, ys = _points(rows, x, y, positive=log_scale)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "label": name, "zorder": 3}
        shape = i + i // len(COLOURS)  # the eighth line differs from the first in shape
        style |= {"marker": MARKERS[shape % len(MARKERS)]} if markers else {"linestyle": DASHES[shape % len(DASHES)]}
        width = len(xs) // 15
        if smooth and width > 2:
            axis.plot(xs, ys, color=style["color"], alpha=0.2, linewidth=0.7, zorder=2)
            ys = _moving_average(ys, width)
        axis.plot(xs, ys, **style)
    if log_scale and any(_points(rows, x, y, positive=True)[0] for rows in content.values()):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < NARROW else (1.0,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _points(rows: Iterable[Mapping[str, float]], x: str, y: str, *, positive: bool) -> Points:
    kept = [(row[x], row[y]) for row in rows if x in row and y in row and (row[y] > 0 or not positive)]
    return [a for a, _ in kept], [b for _, b in kept]


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Centred moving average over `width` values, fewer at the ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _has(content: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> bool:
    return any(name in row for rows in content.values() for row in rows)


def _any_nonzero(content: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> bool:
    return any(row.get(name) for rows in content.values() for row in rows)


def _finish(figure: Figure, axes: Sequence[Axes], out: Path | str) -> None:
    """Adds one legend above all panels and writes the file."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(entries) > 1:
        columns = min(len(entries), 4 if len(axes) > 1 else 3)
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)
    kind = Path(out).suffix.removeprefix(".") or "svg"
    with atomic(out) as temporary:
        figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
