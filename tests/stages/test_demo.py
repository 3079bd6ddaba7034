"""The page with teacher and students side by side: its functions, and the page itself in a browser."""

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import World

from dmd2.__main__ import main
from dmd2.errors import UserError
from dmd2.method.denoiser import Teacher
from dmd2.stages import demo
from dmd2.stages.generate import Model, images_of

PROMPT = "a three left of a seven"
STEPS: dict[str, Any] = {"steps": 2, "guidance_scale": 2.0}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def models(text_results: Path) -> dict[str, Model]:
    return demo.open_runs(text_results, list(demo.RUNS), "cpu", **STEPS)


def test_each_run_shows_its_image_of_the_prompt_with_passes_and_milliseconds(models: dict[str, Model]):
    shown, note = demo.compare(models, PROMPT, 3)
    assert note == ""
    for (run, model), one, start in zip(
        models.items(), shown, ("Teacher: 4 passes, ", "One step: 1 pass, ", "Four steps: 4 passes, "), strict=True
    ):
        assert one.caption.startswith(start), run
        assert one.caption.removeprefix(start).removesuffix(" ms").isdecimal()
        assert one.image.size == (320, 320)
        small = np.asarray(one.image)[::20, ::20]
        assert np.array_equal(small, images_of(model, [PROMPT], 3)[0, ..., 0])


def test_large_images_keep_their_size(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "images_of", lambda *_: np.zeros((1, 512, 384, 3), np.uint8))
    shown, _ = demo.compare(models, PROMPT, 0)
    assert {(one.image.size, one.image.mode) for one in shown} == {((384, 512), "RGB")}


def test_blanks_around_and_in_a_prompt_do_not_matter(models: dict[str, Model]):
    plain, spaced = (demo.compare(models, text, 0)[0] for text in (PROMPT, "  a three  left of\na seven "))
    assert [one.image.tobytes() for one in plain] == [one.image.tobytes() for one in spaced]


@pytest.mark.parametrize("prompt", ["a cat", "a three left of seven", "eleven", "A three left of a seven"])
def test_a_prompt_that_the_models_do_not_know_is_refused(models: dict[str, Model], prompt: str):
    with pytest.raises(UserError, match=f"'{prompt}' is not a caption of digit_pairs; write it as"):
        demo.compare(models, prompt, 0)


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt_is_refused(models: dict[str, Model], prompt: Any):
    with pytest.raises(UserError, match=f"type a prompt, such as '{PROMPT}'"):
        demo.compare(models, prompt, 0)


@pytest.mark.parametrize("seed", [None, -1, 0.5, 1e30, True, "1"])
def test_a_seed_that_is_no_natural_number_is_refused(models: dict[str, Model], seed: Any):
    with pytest.raises(UserError, match="the seed must be a whole number"):
        demo.compare(models, PROMPT, seed)


def test_held_out_compositions_are_reported(models: dict[str, Model]):
    assert [demo.compare(models, text, 0)[1] != "" for text in demo.examples(models)] == [False, False, True]


def test_other_data_take_any_prompt_and_have_their_own_examples(models: dict[str, Model]):
    spec = models["dmd2_1step"].spec
    other = spec.model_copy(update={"data": spec.need("data").model_copy(update={"source": "webdataset"})})
    relabelled = {"dmd2_1step": models["dmd2_1step"]._replace(spec=other)}
    assert demo.examples(relabelled) == demo.OTHERS
    shown, note = demo.compare(relabelled, demo.OTHERS[0], 0)
    assert (len(shown), note) == (1, "")


def test_each_model_makes_an_image_before_the_page_is_served(text_results: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Teacher] = []

    def counted(model: Model, *rest: Any) -> Any:
        made.append(model.teacher)
        return images_of(model, *rest)

    monkeypatch.setattr(demo, "images_of", counted)
    opened = demo.open_runs(text_results, ["dmd2_1step", "dmd2_4step"], "cpu")
    assert [model.teacher for model in opened.values()] == made


def test_runs_that_are_not_there_are_named_with_those_that_are(text_results: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"dmd2_2step: .* --run from: dmd2_1step, dmd2_4step, teacher$"):
        demo.open_runs(text_results, ["teacher", "dmd2_2step"], "cpu")
    with pytest.raises(UserError, match="no finished run; make table2 makes results/digits-t2i"):
        demo.open_runs(tmp_path / "nowhere", ["teacher"], "cpu")


def test_a_model_of_classes_is_refused(world: World, tmp_path: Path):
    (tmp_path / "teacher").mkdir()
    for suffix in ("safetensors", "json"):
        shutil.copy(world.folder / f"teacher.{suffix}", tmp_path / "teacher")
    with pytest.raises(UserError, match="has no prompts; name the results of a text-to-image preset"):
        demo.open_runs(tmp_path, ["teacher"], "cpu")


def test_without_gradio_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["dmd2", "demo", "--results", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install -e '.[demo]'" in caplog.messages[-1]


def test_a_taken_port_is_refused(text_results: Path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*choose another"):
            demo.serve(text_results, ["dmd2_1step"], host="127.0.0.1", port=port, wait=False)


class Browsed:
    """The page in a browser that reaches this machine alone, and the hosts that it requested."""

    def __init__(self, page: Any, address: str):
        self.page, self.hosts = page, set()
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.set_default_timeout(60_000)
        page.goto(address)

    def caption(self, run: str, words: str) -> str:
        """The caption of a run, once it has `words`."""
        found = self.page.locator(f"#{run}-caption", has_text=words)
        found.wait_for()
        return str(found.inner_text())

    def image(self, run: str) -> bytes:
        """The pixels of a run's image, as the server sends them."""
        shown = self.page.locator(f"#{run} img")
        shown.wait_for()
        return bytes(self.page.request.get(shown.get_attribute("src")).body())

    def type(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.page.press("#prompt textarea", "Enter")

    def message(self, words: str) -> str:
        found = self.page.locator("#message", has_text=words)
        found.wait_for()
        return str(found.inner_text())


@pytest.fixture(scope="module")
def address(text_results: Path) -> Iterator[str]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    blocks = demo.serve(text_results, list(demo.RUNS), host="127.0.0.1", port=None, wait=False, **STEPS)
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def browsed(address: str) -> Iterator[Browsed]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield Browsed(browser.new_page(viewport={"width": 1000, "height": 700}), address)
        browser.close()


def test_the_opened_page_shows_the_first_example_and_loads_nothing_from_elsewhere(browsed: Browsed, address: str):
    assert browsed.caption("teacher", "4 passes").startswith("Teacher: 4 passes, ")
    assert browsed.caption("dmd2_1step", "1 pass").startswith("One step: 1 pass, ")
    assert browsed.caption("dmd2_4step", "4 passes").startswith("Four steps: 4 passes, ")
    assert len({browsed.image(run) for run in demo.RUNS}) == 3
    assert browsed.page.input_value("#prompt textarea") == PROMPT
    assert browsed.hosts == {address.split("/")[2]}


def test_a_typed_prompt_and_a_seed_make_other_images(browsed: Browsed):
    found = {browsed.image("dmd2_4step")}
    browsed.type("a four left of a two")
    assert "held out" in browsed.message("No network")
    found.add(browsed.image("dmd2_4step"))
    browsed.page.fill("#seed input", "-1")
    browsed.page.press("#seed input", "Enter")
    browsed.message("the seed must be a whole number")
    browsed.page.fill("#seed input", "7")
    browsed.page.click("button:has-text('Generate')")
    browsed.message("No network")
    found.add(browsed.image("dmd2_4step"))
    assert len(found) == 3


def test_a_message_takes_the_place_of_images_and_an_example_brings_them_back(browsed: Browsed):
    browsed.caption("dmd2_4step", "4 passes")
    browsed.type("a <b>cat</b>")
    message = browsed.message("is not a caption")
    assert message.startswith("'a <b>cat</b>' is not a caption of digit_pairs; write it as 'a three left of a seven'")
    assert browsed.page.locator("#dmd2_4step img").count() == 0
    assert "Traceback" not in browsed.page.content()
    browsed.page.get_by_text("a one right of an eight", exact=True).click()
    browsed.caption("dmd2_4step", "4 passes")
    assert browsed.page.input_value("#prompt textarea") == "a one right of an eight"
    assert browsed.image("dmd2_4step")
