"""The CLIP score by a tiny network of open_clip with random weights."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dmd2 import config
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.metrics.clip_score import ClipScore, ClipScorer
from dmd2.metrics.context import Context
from dmd2.metrics.measure import Batch

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = np.array(["a red square", "a blue square", "nothing at all"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> config.ClipModel:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    state = open_clip.create_model("tiny-clip", load_weights=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "clip.safetensors")
    return of_file(folder / "clip.safetensors")


def of_file(path: Path, digest: str | None = None, model: str = "tiny-clip") -> config.ClipModel:
    weights = config.WeightsFile(path=str(path), sha256=digest or sha256(path))
    return config.ClipModel(model=model, weights=weights)


def images(num: int, side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(side).integers(256, size=(num, side, side, channels), dtype=np.uint8)


def expected(clip: config.ClipModel, picture: np.ndarray, text: str) -> float:
    """The cosine of one image, written out."""
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=clip.weights.path)
    small = Image.fromarray(picture).resize((256, 256), Image.Resampling.LANCZOS)
    tokens = open_clip.get_tokenizer("tiny-clip")([text])
    with torch.no_grad():
        a, b = model.eval().encode_image(preprocess(small)[None])[0], model.encode_text(tokens)[0]
    return float(a @ b / (a.norm() * b.norm()))


def test_score_is_the_cosine_with_a_photo_depicts_before_the_prompt(clip):
    pictures = images(3, 300)
    found = ClipScorer(clip, batch_size=2).cosines(pictures, PROMPTS)
    wanted = [expected(clip, x, f"A photo depicts {text}") for x, text in zip(pictures, PROMPTS, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert expected(clip, pictures[0], str(PROMPTS[0])) != pytest.approx(found[0], abs=1e-4)


def test_grey_images_are_scored_as_coloured_ones(clip):
    grey = images(2, 16, channels=1)
    scorer = ClipScorer(clip)
    np.testing.assert_array_equal(
        scorer.cosines(grey, PROMPTS[:2]), scorer.cosines(grey.repeat(3, axis=3), PROMPTS[:2])
    )


def test_measure_is_the_mean_over_merged_batches_of_whole_images(clip):
    """The protocol makes 512 pixels of the images for FID, of which CLIP must not see anything."""
    evaluation = config.Evaluation(measures=("fid", "clip_score"), clip=clip)
    measure = ClipScore(Context(None, 3, ("coco10k",), "cpu", evaluation))  # type: ignore[arg-type]
    pictures = images(3, 600)
    parts = [
        measure.observe(Batch(None, [pictures[part]], PROMPTS[part], part.start, ["coco10k"]))  # type: ignore[arg-type]
        for part in (slice(0, 1), slice(1, 3))
    ]
    found = measure.value(parts[0].merge(parts[1]))
    assert found == {"clip": pytest.approx(ClipScorer(clip).cosines(pictures, PROMPTS).mean(), rel=1e-6)}


def test_unsuitable_network_is_named(clip, tmp_path: Path):
    def load(model: config.ClipModel) -> None:
        ClipScorer(model).cosines(images(1, 8), PROMPTS[:1])

    with pytest.raises(UserError, match=r"evaluation\.clip\.model: open_clip has no 'ViT-huge'"):
        load(of_file(Path(clip.weights.path), model="ViT-huge"))
    with pytest.raises(UserError, match=r"no such file \(evaluation\.clip\.weights\.path\)"):
        load(of_file(tmp_path / "none.safetensors", digest="0" * 64))
    (tmp_path / "a.pt").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"a\.pt is no weights of open_clip's tiny-clip"):
        load(of_file(tmp_path / "a.pt"))
    save_file({"other": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors is no weights of open_clip's tiny-clip"):
        load(of_file(tmp_path / "b.safetensors"))
    with pytest.raises(UserError, match=r"clip\.safetensors: .*SHA-256"):
        load(of_file(Path(clip.weights.path), digest="0" * 64))


def test_file_that_would_run_code_is_refused(clip, tmp_path: Path):
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Runs()}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt is no weights"):
        ClipScorer(of_file(tmp_path / "c.pt")).cosines(images(1, 8), PROMPTS[:1])
    assert not (tmp_path / "ran").exists()
