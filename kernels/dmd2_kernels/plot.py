"""Plots results/bench/kernels.csv: achieved bandwidth over bytes if there are times, else bytes by provider.

python -m dmd2_kernels.plot results/bench/kernels.csv kernels/bench.svg
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ._bench_table import FORMS, peak_gb_per_s

Rows = list[dict[str, str]]


def label(row: dict[str, str]) -> str:
    """The label of a case."""
    nhwc = " nhwc" if row["memory_format"] == "channels_last" else ""
    return f"{row['op']} {row['case'].removeprefix('adm-')}{nhwc}"


def roofline(axes: Axes, rows: Rows) -> None:
    """Achieved bandwidth of each measured row over its minimum bytes (the floor), below the memory's peak."""
    for number, provider in enumerate(sorted({row["provider"] for row in rows})):
        for layout, marker, words in (("contiguous", "o", ""), ("channels_last", "x", ", channels_last")):
            mine = [row for row in rows if (row["provider"], row["memory_format"]) == (provider, layout)]
            megabytes = [float(row["bytes_floor"]) / 1e6 for row in mine]
            rates = [float(row["achieved_GBps"]) for row in mine]
            axes.scatter(megabytes, rates, s=16, marker=marker, color=f"C{number}", label=provider + words)
    for gpu in sorted({row["gpu"] for row in rows}):
        if (peak := peak_gb_per_s(gpu)) is not None:
            axes.axhline(peak, color="0.5", linewidth=0.8, linestyle="--", label=f"{gpu}'s peak")
    axes.set(xscale="log", xlabel="bytes at the floor, MB", ylabel="floor / GPU time, GB/s")
    made = ", ".join(sorted({f"{row['gpu']} at {row['commit']}" for row in rows}))
    axes.set_title(f"whole calls on {made}", fontsize=9)
    axes.legend(fontsize=8)


def traffic(axes: Axes, rows: Rows) -> None:
    """Bytes of eager and fused as multiples of the floor; no times."""
    names = list(dict.fromkeys(map(label, rows)))
    for offset, provider, colour in ((-0.2, "eager", "0.7"), (0.2, "fused", "tab:blue")):
        mine = {
            label(row): int(row["bytes_moved"]) / int(row["bytes_floor"]) for row in rows if row["provider"] == provider
        }
        axes.barh([i + offset for i in range(len(names))], [mine[n] for n in names], 0.4, label=provider, color=colour)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("bytes moved, forward and backward, as multiples of the floor (counted; no times yet)", fontsize=8)
    axes.legend(fontsize=8)


def draw(rows: Rows, path: Path) -> None:
    """Write the figure of the rows; the file is deterministic."""
    mpl.rcParams |= {"svg.hashsalt": "dmd2_kernels", "svg.fonttype": "none"}
    rows = [row for row in rows if not row["op"].startswith("gan")]  # bound by their launches
    timed = [row for row in rows if row["mode"] in FORMS and row["achieved_GBps"]]
    counted = [row for row in rows if row["bytes_moved"] and row["mode"] == "full"]
    figure, axes = plt.subplots(figsize=(7, 4 if timed else 1 + 0.11 * len(counted)), layout="constrained")
    if timed:
        roofline(axes, timed)
    else:
        traffic(axes, counted)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    """Plot a CSV."""
    parser = argparse.ArgumentParser(prog="python -m dmd2_kernels.plot", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args(argv)
    with args.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        print(f"{args.csv} has no rows; write them with python -m dmd2_kernels.bench")
        return 1
    draw(rows, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
