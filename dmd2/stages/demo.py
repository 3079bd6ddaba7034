"""A web page that shows the images of finished runs side by side for a typed prompt, with passes and milliseconds.

Gradio serves it; it comes with `pip install -e '.[demo]'`. The page loads nothing from elsewhere.
"""

from __future__ import annotations

import html
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dmd2.config.digit_pairs import composition, is_held_out
from dmd2.datasets.texts import tidy
from dmd2.errors import UserError
from dmd2.stages.generate import NAMES, Model, images_of, open_run
from dmd2.training import ranks

RUNS = {"teacher": "Teacher", "dmd2_1step": "One step", "dmd2_4step": "Four steps"}
SIDE = 320
"""Smaller images are enlarged to at least this many pixels."""
DIGITS = ("a three left of a seven", "a one right of an eight", "a four left of a two")  # the last one is held out
OTHERS = ("a photo of a cat on a red sofa", "a lighthouse on a cliff at sunset, oil painting")
UNSEEN = "No network was trained on this pair of digits: it is one of the 20 that are held out."


class Shown(NamedTuple):
    image: Image.Image
    caption: str  # such as "One step: 1 pass, 8 ms"


def open_runs(results: Path, runs: Sequence[str], device: torch.device | str, **teacher: Any) -> dict[str, Model]:
    """The models of `results/RUN`, each of which has made an image, so that the first prompt's time is as the next's.

    `teacher` has the steps and guidance scale of its sampler. Raises UserError for a run that is not there, and for a
    model of classes.
    """
    for run in runs:
        if not any((results / run / name).exists() for name in NAMES):
            found = sorted({path.parent.name for name in NAMES for path in results.glob(f"*/{name}")})
            there = f"choose with --run from: {', '.join(found)}" if found else "make table2 makes results/digits-t2i"
            raise UserError(f"{results / run}: no finished run; {there}")
    models = {run: open_run(results / run, device, **teacher) for run in runs}
    for run, model in models.items():
        if model.spec.need("data").captions is None:
            raise UserError(f"{results / run} has no prompts; name the results of a text-to-image preset")
        images_of(model, [examples(models)[0]], 0)
    return models


def examples(models: Mapping[str, Model]) -> tuple[str, ...]:
    """Prompts to begin with: `DIGITS` or `OTHERS`, by the data of the models."""
    sources = {model.spec.need("data").source for model in models.values()}
    return DIGITS if "digit_pairs" in sources else OTHERS


def compare(models: Mapping[str, Model], prompt: str, seed: Any) -> tuple[list[Shown], str]:
    """One image per model, from the same noise, and a note on the prompt, "" if there is none.

    Raises UserError for an empty prompt, one that the models do not know, and a seed that is no natural number.
    """
    if not (prompt := tidy(prompt)):
        raise UserError(f"type a prompt, such as {examples(models)[0]!r}")
    if type(seed) is not int or seed < 0:
        raise UserError("the seed must be a whole number from 0 on")
    note = UNSEEN if examples(models) is DIGITS and is_held_out(*composition(prompt)) else ""
    return [_shown(run, model, prompt, seed) for run, model in models.items()], note


def page(models: Mapping[str, Model]) -> Any:
    """The page as gradio's Blocks. It shows the first example when it is opened; a message takes the images' place."""
    gr, known = gradio(), examples(models)

    def show(prompt: str, seed: Any) -> list[Any]:
        try:
            shown, note = compare(models, prompt, seed)
        except UserError as error:
            return [_paragraph(str(error)), *([None] * len(models)), *([""] * len(models))]
        return [_paragraph(note), *(one.image for one in shown), *(_paragraph(one.caption) for one in shown)]

    with gr.Blocks(title="DMD2", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as blocks:
        gr.HTML("<h1>DMD2: teacher and students</h1><p>All start from the same noise, which the seed determines.</p>")
        with gr.Row():
            prompt = gr.Textbox(known[0], label="Prompt", max_length=1000, scale=4, elem_id="prompt")
            seed = gr.Number(0, label="Seed", scale=1, elem_id="seed")
            button = gr.Button("Generate", variant="primary", scale=1)
        listed = gr.Examples([[text] for text in known], [prompt], label="Examples", cache_examples=False)
        images, captions = [], []
        message = gr.HTML(elem_id="message")
        with gr.Row():
            for run in models:
                with gr.Column(min_width=160):
                    plain = {"format": "png", "interactive": False, "buttons": [], "show_label": False}
                    images.append(gr.Image(label=run, elem_id=run, **plain))
                    captions.append(gr.HTML(elem_id=f"{run}-caption"))
        event: dict[str, Any] = {"fn": show, "inputs": [prompt, seed], "outputs": [message, *images, *captions]}
        event |= {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "models"}
        gr.on([blocks.load, button.click, prompt.submit, seed.submit], **event)
        listed.load_input_event.then(**event)
    return blocks


def serve(results: Path, runs: Sequence[str], *, host: str, port: int | None, wait: bool = True, **teacher: Any) -> Any:
    """Serves the page of `results/RUN` until it is interrupted, or until the process ends if not `wait`; returns it.

    Raises UserError without gradio, for what `open_runs` refuses, and for a port that is taken.
    """
    gradio()
    blocks = page(open_runs(results, runs, ranks.device_of("auto"), **teacher))
    local = {"share": False, "ssr_mode": False, "pwa": False, "footer_links": [], "quiet": True}
    try:
        blocks.launch(server_name=host, server_port=port, prevent_thread_lock=True, **local)
    except OSError as error:
        raise UserError(f"--host {host}, --port {port or 'any'}: {error}; choose another") from None
    print(f"open {blocks.local_url}; Ctrl-C ends it", flush=True)
    if wait:
        blocks.block_thread()
    return blocks


def gradio() -> Any:
    """The package, which sends no statistics and looks for no newer version of itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError("the page needs gradio, which is not installed: pip install -e '.[demo]'") from None
    return gradio


def _shown(run: str, model: Model, prompt: str, seed: int) -> Shown:
    start = time.perf_counter()
    pixels = images_of(model, [prompt], seed)[0]
    milliseconds, passes = 1000 * (time.perf_counter() - start), model.passes
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    large = image.resize([side * -(-SIDE // max(image.size)) for side in image.size], Image.Resampling.NEAREST)
    return Shown(large, f"{RUNS.get(run, run)}: {passes} {'pass' if passes == 1 else 'passes'}, {milliseconds:.0f} ms")


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""
