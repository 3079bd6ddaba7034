"""A page about work that is running: jobs, curves of the trainings, and samples of their newest snapshots.

It only reads: samples are drawn here, from the snapshots that a training writes, so that watching changes no bit of it.
"""

from __future__ import annotations

import base64
import html
import logging
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dmd2.config import Sampler, TeacherConfig
from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.lineage.plan import Plan
from dmd2.lineage.replanning import output_named
from dmd2.report.figures import curves_figure
from dmd2.report.sheets import grid_png, prompts_png
from dmd2.stages.generate import COMPONENTS, Model, images_of
from dmd2.stages.open_weights import components_folder
from dmd2.teachers import load_teacher

log = logging.getLogger(__name__)

RECENT_S = 900
"""A log that was written within so many seconds is shown."""
CLASSES, EACH = 10, 4
"""Of a sheet of newest samples."""
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 20px clamp(12px, 3vw, 40px); max-width: 1400px; }
pre { overflow-x: auto; border: 1px solid #8886; padding: 8px; border-radius: 6px; }
img { max-width: 100%; background: #fff; border-radius: 6px; padding: 4px; box-sizing: border-box; }
figure { display: inline-block; margin: 8px 12px 8px 0; vertical-align: top; max-width: 100%; }
figcaption, .soft { opacity: 0.75; font-size: 13.5px; }
"""


def trainings(folder: Path) -> list[Path]:
    """The state folders with a log: trainings that have not finished, the one that was written last first."""
    logs = list((folder / "state").glob("*/log.jsonl"))
    return [path.parent for path in sorted(logs, key=lambda path: -path.stat().st_mtime)]


def running(folder: Path) -> list[str]:
    """The outputs of jobs that Snakemake has started and not ended; after a kill also those that were cut."""
    marked, found = folder / ".snakemake/incomplete", []
    for path in marked.rglob("*"):
        if path.is_file():
            try:
                found.append(output_named(path.relative_to(marked)))
            except ValueError:
                continue
    return sorted(found)


def last_lines(folder: Path, now: float) -> list[str]:
    """The last line of every stage's log that was written lately, the newest first."""
    logs = [(path.stat().st_mtime, path) for path in (folder / "logs").rglob("*.log")]
    recent = sorted((item for item in logs if now - item[0] < RECENT_S), reverse=True)
    lines = []
    for changed, path in recent[:20]:
        said = path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines.append(f"{now - changed:4.0f} s ago  {path.relative_to(folder)}: {said[-1] if said else ''}")
    return lines


def newest_snapshot(state: Path) -> tuple[Path, int] | None:
    """The newest snapshot of a training and its iteration."""
    found = sorted(state.glob("snapshot-*.safetensors"))
    return (found[-1], int(found[-1].stem.rpartition("-")[2])) if found else None


def run_of(state: Path) -> str:
    """The run that a state folder, `RUN-DIGEST`, is of."""
    return re.sub(r"-[0-9a-f]{16}$", "", state.name)


def draw_samples(plan: Plan, results: Path, run: str, weights: Path, out: Path) -> None:
    """Draws a sheet of a snapshot on the CPU: the first classes, or prompts, from the noise of seed 0.

    Raises UserError for weights that do not fit the preset's run.
    """
    spec = plan.train(run)
    teacher, data = spec.need("teacher"), spec.need("data")
    folder = None
    if not isinstance(teacher, TeacherConfig):
        record = results / COMPONENTS
        folder = components_folder(record, read_json(record)["provenance"]["digest"])
    bare = teacher.model_copy(update={"training": None, "weights": None})
    loaded = load_teacher(bare, data, weights, components=folder)
    model = Model(spec.model_copy(update={"teacher": bare}), loaded, Sampler(kind="few_step"), folder)
    if data.captions is None:
        labels = np.arange(min(CLASSES, data.classes)).repeat(EACH)
        grid_png(images_of(model, labels.tolist(), 0), labels, out, rows=EACH)
    else:
        from dmd2.stages.demo import DIGITS, OTHERS

        prompts = [prompt for prompt in (DIGITS if data.source == "digit_pairs" else OTHERS) for _ in range(EACH)]
        prompts_png({run: (images_of(model, prompts, 0), np.asarray(prompts))}, out)


class Watch:
    """Makes the page of a folder in which Snakemake runs; figures are drawn again only when their files change."""

    def __init__(self, folder: Path, plan: Plan, *, samples: bool = True):
        self._folder, self._plan, self._samples = folder, plan, samples
        self._sheet = lru_cache(maxsize=64)(self._draw_sheet)
        self._curves = lru_cache(maxsize=2)(self._draw_curves)

    def page(self) -> str:
        """The page as HTML, which loads itself again every ten seconds."""
        states, now = trainings(self._folder), time.time()
        done = sum(path.is_file() for path in (self._folder / ".snakemake/metadata").rglob("*"))
        parts = [
            f"<h1>DMD2: running on {html.escape(self._plan.preset.name)}</h1>",
            f'<p class="soft">{time.strftime("%H:%M:%S")}; {done} outputs of finished jobs.</p>',
            _block("Jobs in progress (by their outputs)", running(self._folder)),
            _block("Last lines of the logs", last_lines(self._folder, now)),
        ]
        logs = tuple((run_of(state), state / "log.jsonl", (state / "log.jsonl").stat().st_mtime) for state in states)
        if logs:
            parts += ["<h2>Curves of unfinished trainings</h2>", self._curves(logs)]
        if self._samples and states:
            parts += ["<h2>Samples of their newest snapshots</h2>", *self._sheets(states)]
        if (self._folder / "results/index.html").exists():
            parts.append("<p>Finished tables are in <code>results/index.html</code>.</p>")
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="10">'
            f'<meta name="viewport" content="width=device-width"><title>DMD2: running</title><style>{STYLE}</style>'
            f"</head><body>{''.join(parts)}</body></html>"
        )

    def _sheets(self, states: list[Path]) -> Iterator[str]:
        for state in states:
            if (found := newest_snapshot(state)) and run_of(state) != "teacher":
                yield self._sheet(run_of(state), *found)

    def _draw_curves(self, logs: tuple[tuple[str, Path, float], ...]) -> str:
        content = {run: path for run, path, _ in reversed(logs) if path.stat().st_size}
        return _drawn("svg", lambda out: curves_figure(content, out), "losses and diagnostics")

    def _draw_sheet(self, run: str, weights: Path, step: int) -> str:
        results = self._folder / "results" / self._plan.preset.name
        return _drawn(
            "png", lambda out: draw_samples(self._plan, results, run, weights, out), f"{run}, iteration {step}"
        )


def _block(title: str, lines: list[str]) -> str:
    return f"<h2>{title}</h2><pre>{html.escape(chr(10).join(lines)) or 'none'}</pre>"


def _drawn(kind: str, draw: Callable[[Path], None], caption: str) -> str:
    """A figure as HTML; what cannot be drawn is said instead, and stops nothing."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / f"figure.{kind}"
        try:
            draw(out)
        except (UserError, OSError, ValueError, RuntimeError) as error:
            return f'<p class="soft">{html.escape(f"{caption}: {error}")}</p>'
        content = base64.b64encode(out.read_bytes()).decode()
    form = "svg+xml" if kind == "svg" else kind
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/{form};base64,{content}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def server(watch: Watch, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page at `/`. Raises UserError for an address that is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            content = watch.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Says nothing about requests."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(f"--host {host}, --port {port}: {error}; choose another") from None
