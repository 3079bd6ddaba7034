"""Draws docs/dmd2.png, DMD2 in one picture: `python docs/figures/dmd2.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TRAINED, FROZEN, DATA = "#cfe3f7", "#e4e4e4", "#ffffff"
FORWARD = {"color": "#333333", "linestyle": "-"}
MATCHING = {"color": "#c43a1d", "linestyle": "--"}
GAN = {"color": "#1f7a3d", "linestyle": "--"}
MATCHING_TEXT = "distribution-matching gradient: fake score - real score, at the same noisy image"
Point = tuple[float, float]


def box(axes: Axes, centre: Point, size: Point, text: str, colour: str) -> None:
    (x, y), (width, height) = centre, size
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="#333333")
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def arrow(axes: Axes, *points: Point, color: str, linestyle: str) -> None:
    """A line through `points` with a head at the last one."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=color, linestyle=linestyle, linewidth=1.3)
    style = {"arrowstyle": "-|>", "color": color, "linestyle": linestyle, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 1}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def label(axes: Axes, at: Point, text: str, color: str = "#333333", ha: str = "center") -> None:
    axes.text(*at, text, ha=ha, va="center", fontsize=8, color=color, linespacing=1.3)


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 4.3), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12.0), ylim=(0, 5.4))
    axes.axis("off")

    box(axes, (0.9, 3.6), (1.3, 0.8), "noise z,\nclass c", DATA)
    box(axes, (3.1, 3.6), (1.8, 1.0), "student\n(generator), 1 step", TRAINED)
    box(axes, (5.3, 3.6), (1.3, 0.8), "image x0", DATA)
    box(axes, (5.3, 1.0), (1.3, 0.8), "real images\n(GAN only)", DATA)
    box(axes, (7.3, 2.3), (1.5, 0.8), "add noise:\nx0 + sigma eps", DATA)
    box(axes, (10.1, 4.1), (2.6, 0.9), "teacher (frozen):\nreal score", FROZEN)
    box(axes, (10.1, 2.3), (2.6, 0.9), "critic (5 updates to 1 of\nthe student): fake score", TRAINED)
    box(axes, (10.1, 0.7), (2.6, 0.8), "GAN head on the\ncritic's encoder", TRAINED)

    arrow(axes, (1.55, 3.6), (2.2, 3.6), **FORWARD)
    arrow(axes, (4.0, 3.6), (4.65, 3.6), **FORWARD)
    arrow(axes, (5.3, 3.2), (5.3, 2.4), (6.55, 2.4), **FORWARD)
    arrow(axes, (5.3, 1.4), (5.3, 2.2), (6.55, 2.2), **FORWARD)
    arrow(axes, (8.05, 2.3), (8.8, 2.3), **FORWARD)
    arrow(axes, (7.3, 2.7), (7.3, 4.1), (8.8, 4.1), **FORWARD)
    arrow(axes, (10.1, 1.85), (10.1, 1.1), **FORWARD)
    arrow(axes, (10.1, 4.55), (10.1, 4.95), (3.3, 4.95), (3.3, 4.1), **MATCHING)
    axes.plot((11.4, 11.75, 11.75, 10.1), (2.3, 2.3, 4.95, 4.95), linewidth=1.3, **MATCHING)
    arrow(axes, (8.8, 0.42), (3.1, 0.42), (3.1, 3.1), **GAN)

    label(axes, (6.6, 5.17), MATCHING_TEXT, MATCHING["color"])
    label(axes, (3.2, 1.75), "GAN gradient:\nlook real to the head", GAN["color"], "left")
    label(axes, (9.95, 1.48), "fake or real?", ha="right")
    label(axes, (0.2, 0.95), "blue: trained\ngrey: frozen\nsolid: forward\ndashed: gradient", ha="left")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).parent.parent / "dmd2.png", metadata={"Software": None})
