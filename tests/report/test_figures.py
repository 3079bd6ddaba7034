"""The figures: what is drawn is what the files say, and nothing else."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dmd2.errors import UserError
from dmd2.report.figures import (
    brightness_figure,
    by_class,
    compare_png,
    curves_figure,
    fid_curve_figure,
    grid_png,
    read_curve,
    read_log,
)
from dmd2.report.sheets import GAP, HEAD, MARGIN


def write_log(path: Path, rows: Sequence[Mapping[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_curve(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n".join(["step,generator_updates,fid,pixel_fd,accuracy,diversity", *rows]) + "\n")
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into their axes."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw)))
    return saved


def texts(path: Path) -> str:
    return " ".join(re.findall(r">([^<>]+)</text>", path.read_text()))


def test_panels_are_the_logged_curves_and_lines_are_their_values(tmp_path: Path, drawn):
    a = write_log(tmp_path / "a.jsonl", [{"step": s, "matching_loss": 1 / s, "d_accuracy": 0.6} for s in (10, 20, 30)])
    b = write_log(tmp_path / "b.jsonl", [{"step": s, "matching_loss": 2.0} for s in (10, 20)])
    curves_figure({"run a": a, "run b": b}, tmp_path / "curves.svg")
    matching, accuracy = drawn[0].axes
    assert matching.get_title(loc="left") == "Distribution matching loss"
    assert accuracy.get_title(loc="left") == "Discriminator accuracy"
    np.testing.assert_allclose(matching.lines[0].get_xydata(), [[10, 0.1], [20, 0.05], [30, 1 / 30]])
    np.testing.assert_allclose(matching.lines[1].get_xydata(), [[10, 2], [20, 2]])
    assert len(accuracy.lines[1].get_xydata()) == 0  # run b has no discriminator
    assert matching.lines[0].get_color() != matching.lines[1].get_color()
    assert "run a" in texts(tmp_path / "curves.svg")
    assert "Regression loss" not in texts(tmp_path / "curves.svg")


def test_non_finite_counts_get_a_panel_only_when_there_were_some(tmp_path: Path, drawn):
    clean = [{"step": s, "matching_loss": 1.0, "num_nonfinite": 0.0} for s in (1, 2)]
    log = write_log(tmp_path / "a.jsonl", clean)
    curves_figure({"a": log}, tmp_path / "a.svg")
    assert len(drawn[-1].axes) == 1
    write_log(log, [*clean, {"step": 3, "matching_loss": 1.0, "num_nonfinite": 2.0}])
    curves_figure({"a": log}, tmp_path / "a.svg")
    assert len(drawn[-1].axes) == 2


def test_long_curves_are_smoothed_over_what_was_logged(tmp_path: Path, drawn):
    values = np.random.default_rng(0).normal(size=150)
    rows = [{"step": i, "denoising_loss": v} for i, v in enumerate(values)]
    curves_figure({"a": write_log(tmp_path / "a.jsonl", rows)}, tmp_path / "a.svg")
    raw, smooth = drawn[0].axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), values)
    np.testing.assert_allclose(smooth.get_ydata()[5:-5], np.convolve(values, np.ones(11) / 11, "valid"))
    assert smooth.get_ydata()[0] == pytest.approx(values[:6].mean())


def test_logarithmic_panels_leave_out_what_has_no_logarithm(tmp_path: Path, drawn):
    rows = [{"step": 1, "critic_grad_norm": 0.0}, {"step": 2, "critic_grad_norm": 0.5}]
    curves_figure({"a": write_log(tmp_path / "a.jsonl", rows)}, tmp_path / "a.svg")
    assert drawn[0].axes[0].get_yscale() == "log"
    np.testing.assert_allclose(drawn[0].axes[0].lines[0].get_xydata(), [[2, 0.5]])


def test_distances_stand_against_iterations_and_against_generator_updates(tmp_path: Path, drawn):
    dmd2 = write_curve(tmp_path / "dmd2.csv", ["250,50,0.2,0.4,0.9,0.8", "500,100,0.1,0.2,0.95,0.9"])
    noreg = write_curve(tmp_path / "noreg.csv", ["250,250,3,7,1,0.1", "500,500,4,6,1,"])
    fid_curve_figure({"dmd2": dmd2, "noreg": noreg}, tmp_path / "fid.svg")
    axes = drawn[0].axes
    assert [axis.get_ylabel().split("\n")[0] for axis in axes] == [
        "FID", "", "Pixel Fréchet distance", "", "Diversity within classes", ""
    ]  # fmt: skip
    np.testing.assert_allclose(axes[0].lines[0].get_xydata(), [[250, 0.2], [500, 0.1]])
    np.testing.assert_allclose(axes[1].lines[0].get_xydata(), [[50, 0.2], [100, 0.1]])
    np.testing.assert_allclose(axes[3].lines[1].get_xydata(), [[250, 7], [500, 6]])
    np.testing.assert_allclose(axes[4].lines[1].get_xydata(), [[250, 0.1]])  # an empty cell is no point
    assert axes[0].get_ylim() == axes[1].get_ylim()


def test_a_dozen_runs_are_distinguished_on_logarithmic_axes(tmp_path: Path, drawn):
    names = [f"run {i}" for i in range(12)]
    curves = {
        name: write_curve(
            tmp_path / f"{i}.csv", [f"{s},{s // 5},{2**i / s},{3**i / s},0.9,0.8" for s in (50, 100, 200)]
        )
        for i, name in enumerate(names)
    }
    fid_curve_figure(curves, tmp_path / "fid.svg")
    for axis in drawn[0].axes[:4]:
        assert axis.get_yscale() == "log"
        assert len({(line.get_color(), line.get_marker()) for line in axis.lines}) == 12
        low, high = axis.get_ylim()
        values = np.concatenate([line.get_ydata() for line in axis.lines])
        assert low < values.min() < values.max() < high
    logs = {
        name: write_log(tmp_path / f"{i}.jsonl", [{"step": s, "brightness": i / 12} for s in (1, 2)])
        for i, name in enumerate(names)
    }
    brightness_figure(logs, tmp_path / "brightness.svg", data_brightness=0.5)
    *lines, _ = drawn[1].axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 12
    for figure in ("fid", "brightness"):
        assert all(name in texts(tmp_path / f"{figure}.svg") for name in names)


def test_brightness_is_drawn_raw_beside_the_datas(tmp_path: Path, drawn):
    rows = [{"step": s, "brightness": (-1.0) ** s} for s in range(100)]
    log = write_log(tmp_path / "a.jsonl", rows)
    brightness_figure({"noreg": log}, tmp_path / "brightness.png", data_brightness=-0.39)
    line, data = drawn[0].axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [row["brightness"] for row in rows])
    np.testing.assert_allclose(data.get_ydata(), -0.39)
    assert Image.open(tmp_path / "brightness.png").format == "PNG"


def test_the_same_files_give_the_same_figure_byte_for_byte(tmp_path: Path):
    log = write_log(tmp_path / "a.jsonl", [{"step": s, "matching_loss": s} for s in range(5)])
    for name in ("one.svg", "two.svg"):
        curves_figure({"a": log}, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_files_without_a_known_curve_are_named(tmp_path: Path):
    log = write_log(tmp_path / "a.jsonl", [{"step": 1, "other": 2.0}])
    empty = write_curve(tmp_path / "a.csv", [])
    for draw, source in ((curves_figure, log), (brightness_figure, log), (fid_curve_figure, empty)):
        with pytest.raises(UserError, match=source.name.replace(".", r"\.")):
            draw({"a": source}, tmp_path / "out.svg")
    assert not (tmp_path / "out.svg").exists()


def test_damaged_files_are_named_with_their_line(tmp_path: Path):
    log = tmp_path / "a.jsonl"
    log.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        read_log(log)
    log.write_text("[1]\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: a log row is an object with `step`"):
        read_log(log)
    with pytest.raises(UserError, match=r"a\.csv:3: could not convert string to float: 'low'"):
        read_curve(write_curve(tmp_path / "a.csv", ["1,1,2,3,1,1", "2,2,low,3,1,1"]))
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        read_log(tmp_path / "gone.jsonl")


def flat(values: Sequence[int], side: int = 2) -> np.ndarray:
    """Images of one grey level each, (N, side, side, 1)."""
    return np.array(values, np.uint8)[:, None, None, None].repeat(side, axis=1).repeat(side, axis=2)


def test_grid_has_a_class_per_column_enlarged_by_a_whole_factor(tmp_path: Path):
    images, labels = flat([10, 20, 30, 11, 21, 31, 12]), np.array([0, 1, 2, 0, 1, 2, 0])
    images[0, 0, 1] = 200  # one pixel of the first image
    grid_png(images, labels, tmp_path / "grid.png", scale=4)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 8 + GAP + HEAD + 2 * MARGIN, 3 * 8 + 2 * GAP + 2 * MARGIN, 3)
    body = sheet[MARGIN + HEAD : -MARGIN, MARGIN:-MARGIN, 0]
    assert (body[:4, 4:8] == 200).all()
    assert (body[4:8, :8] == 10).all()
    step = 8 + GAP
    assert [[int(body[r * step + 7, c * step]) for c in range(3)] for r in range(2)] == [[10, 20, 30], [11, 21, 31]]
    assert (body[8:step] == 255).all()  # the gap
    assert (sheet[MARGIN : MARGIN + HEAD] < 128).any()  # the class is written


def test_small_images_are_enlarged_until_legible_and_large_ones_are_left(tmp_path: Path):
    for side, factor in ((8, 5), (28, 2), (64, 1)):
        grid_png(flat([1, 2], side), np.array([0, 1]), tmp_path / "grid.png")
        assert Image.open(tmp_path / "grid.png").width == 2 * side * factor + GAP + 2 * MARGIN


def test_many_classes_are_thinned_evenly():
    shown, classes = by_class(flat(range(100)), np.arange(100), columns=4)
    assert classes.tolist() == [0, 33, 66, 99]
    assert shown[:, 0, 0, 0].tolist() == [0, 33, 66, 99]


def test_colour_survives(tmp_path: Path):
    images = np.broadcast_to(np.array([255, 128, 0], np.uint8), (1, 2, 2, 3))
    grid_png(images, np.array([7]), tmp_path / "grid.png", scale=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet[MARGIN + HEAD, MARGIN].tolist() == [255, 128, 0]


def test_compared_panels_show_as_many_images_each(tmp_path: Path):
    compare_png({"real": flat([40] * 9, 8), "student": flat([80] * 4, 8)}, tmp_path / "c.png", columns=2, scale=10)
    sheet = np.asarray(Image.open(tmp_path / "c.png"))[:, :, 0]
    assert (sheet == 40).sum() == (sheet == 80).sum() == 4 * 80 * 80
    assert sheet.shape[0] == 2 * 80 + GAP + HEAD + 2 * MARGIN
    columns = [np.flatnonzero((sheet == level).any(axis=0)) for level in (40, 80)]
    assert columns[0].max() < columns[1].min()


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 1)), np.zeros((1, 1, 4, 4), np.uint8), flat([])])
def test_images_of_another_kind_are_refused(tmp_path: Path, images):
    with pytest.raises(ValueError, match="expected uint8"):
        grid_png(images, np.zeros(len(images), np.int64), tmp_path / "grid.png")
    with pytest.raises(ValueError, match="expected uint8"):
        compare_png({"a": images}, tmp_path / "grid.png")


def test_planning_and_drawing_never_import_torch():
    code = "import sys, dmd2.report.targets, dmd2.report.tables, dmd2.report.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
