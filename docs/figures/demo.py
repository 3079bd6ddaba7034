"""Takes docs/demo.png, the page of `dmd2 demo`: `python -P docs/figures/demo.py results/digits-t2i`.

Needs gradio, playwright and Debian's chromium; without -P the file dmd2.py beside it would be taken for the package.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from dmd2.stages import demo

SIZE = {"width": 1000, "height": 740}


def screenshot(address: str) -> Image.Image:
    """The page with the images of its first example."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        page.locator("button", has_text="Generate").wait_for()
        page.locator(".prose p", has_text=" ms").last.wait_for()
        page.click("button:has-text('Generate')")  # again, when the browser no longer takes the processor's time
        page.wait_for_timeout(3000)
        found = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(found)).convert("RGB")


if __name__ == "__main__":
    blocks = demo.serve(
        Path(sys.argv[1]), list(demo.RUNS), host="127.0.0.1", port=None, wait=False, steps=25, guidance_scale=2.0
    )
    picture = screenshot(blocks.local_url).quantize(64, dither=Image.Dither.NONE)
    picture.save(Path(__file__).parents[1] / "demo.png", optimize=True)
    blocks.close()
