"""Features, reference and metrics of data with captions, by the stages and through shards."""

import json
from pathlib import Path

import numpy as np
import pytest
from world import RUNTIME, WORKFLOW

from dmd2.config.digit_pairs import is_held_out, prompts
from dmd2.datasets import ShardReader, write_shards
from dmd2.datasets.coco import digest
from dmd2.datasets.sources import digit_pairs
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.lineage.spec import Spec
from dmd2.metrics.labels import targets
from dmd2.stages import data, measure

NUM = 400  # four of each composition
ENTRY = "teacher/low_guidance"
COLUMNS = [
    *("fid", "patch_fid", "pixel_fd", "nearest_distance", "prompt_diversity", "alignment", "alignment_held_out"),
    *("precision", "recall"),
]


class Captioned:
    """A folder with few pairs of digits, an extractor and their reference."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plan = folder, plan()
        self.shards, self.extractor = folder / "shards/manifest.json", folder / "extractor.weights"
        self.reference = folder / "reference.npz"
        data.shards(self.plan.shards, self.shards, None, {}, 1)
        measure.features(self.plan.features, self.shards, self.extractor)
        measure.reference(self.plan.reference, self.shards, self.extractor, self.reference, RUNTIME)
        content = ShardReader(self.shards, self.plan.shards.digest).read(range(NUM))
        self.images, self.captions = content["image"], content["txt"]

    def metrics(self, spec: Spec, out: Path, samples: Path | None = None) -> dict[str, float]:
        given = measure.SampleSource(samples, None)
        measure.metrics(spec, given, self.reference, self.extractor, self.folder / "state", out, RUNTIME)
        return {name: value["mean"] for name, value in json.loads(out.read_text())["metrics"].items()}

    def of_samples(self, images: np.ndarray, captions: np.ndarray, folder: Path) -> dict[str, float]:
        spec, manifest = self.plan.metrics(ENTRY), folder / "manifest.json"

        def make(ids: range) -> dict[str, list]:
            return {"image.png": list(images[ids]), "txt": [str(text) for text in captions[ids]]}

        facts = {"nfe": 1, "model": {"run": "teacher"}}
        write_shards(manifest, NUM, 1000, make, self.plan.sample(ENTRY), batch_size=100, inputs="here", facts=facts)
        return self.metrics(spec, folder / "metrics.json", manifest)


def plan(**evaluation) -> Plan:
    over = {"num_samples": NUM, "num_blocks": 1, **evaluation}
    return Plan(WORKFLOW, "smoke-t2i", {"evaluation": over, "features": {"epochs": 3}})


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_pairs, "EACH", NUM // 100)
        yield Captioned(tmp_path_factory.mktemp("captioned"))


def test_stored_samples_that_are_the_data_score_as_it(captioned: Captioned, tmp_path: Path):
    found = captioned.of_samples(captioned.images, captioned.captions, tmp_path)
    assert list(found) == COLUMNS
    assert found["fid"] == pytest.approx(0, abs=1e-4)
    assert found["patch_fid"] == pytest.approx(0, abs=1e-4)
    assert found["prompt_diversity"] == pytest.approx(1, abs=1e-9)
    assert found["nearest_distance"] == pytest.approx(0, abs=1e-5)
    listed = json.loads((tmp_path / "metrics.json").read_text())["prompts"]
    assert listed == {"num": 200, "sha256": digest(prompts())}


def test_samples_of_other_prompts_lose_alignment_and_nothing_else(captioned: Captioned, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    right = captioned.of_samples(captioned.images, captioned.captions, tmp_path / "a")
    shifted = captioned.of_samples(captioned.images, np.roll(captioned.captions, 37), tmp_path / "b")
    assert shifted["alignment"] < right["alignment"] / 2
    assert shifted["fid"] == pytest.approx(right["fid"], abs=1e-6)


def test_floor_of_captions_has_the_same_columns(captioned: Captioned, tmp_path: Path):
    found = captioned.metrics(captioned.plan.metrics("floor"), tmp_path / "floor.json")
    assert list(found) == COLUMNS
    assert found["alignment_held_out"] > 0
    codes = targets(captioned.captions)
    assert is_held_out(codes // 10, codes % 10).mean() == 0.2


def test_measures_that_do_not_suit_the_labels_stop_the_planning():
    with pytest.raises(UserError, match=r"evaluation\.measures: accuracy is not for data with captions"):
        plan(measures=["fid", "accuracy"])
    with pytest.raises(UserError, match=r"evaluation\.measures: alignment is not for data with classes"):
        Plan(WORKFLOW, "smoke", {"evaluation": {"measures": ["fid", "alignment"]}})
    with pytest.raises(UserError, match="`fid` is missing, by which snapshots are chosen"):
        plan(measures=["alignment"])
    with pytest.raises(UserError, match="one is listed twice"):
        plan(measures=["fid", "fid"])
    with pytest.raises(UserError, match=r"lpips_diversity needs evaluation\.vgg_weights"):
        plan(measures=["fid", "lpips_diversity"])
    with pytest.raises(UserError, match="coco10k compares images of 512 pixels, but the real ones have 16"):
        plan(protocols=["coco10k"])


def test_classes_have_the_digest_that_they_had_and_new_statistics_another():
    def digest(**evaluation) -> str:
        return Plan(WORKFLOW, "smoke", {"evaluation": evaluation}).reference.digest

    assert digest() == digest(protocols=["dmd2"], num_samples=50)
    assert digest(measures=["fid", "patch_fid"]) != digest()
