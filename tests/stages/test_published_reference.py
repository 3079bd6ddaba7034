"""An evaluation as on ImageNet: a TorchScript detector, and moments of the real images from a published file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from world import RUNTIME, World

from dmd2.datasets import ShardReader
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import read_record
from dmd2.metrics import FeatureStats, Reference, frechet_distance
from dmd2.stages import measure

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


class Detector(nn.Module):
    """Features: the means of the four quarters of the first channel; probabilities: their softmax."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        quarters = nn.functional.adaptive_avg_pool2d(img[:, :1], 2).flatten(1)
        return quarters if return_features else torch.softmax(quarters / 50, dim=1)


def quarters(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(len(images), 4)


class Setting:
    """The files of the user, and the stages up to the reference."""

    def __init__(self, world: World, folder: Path, **published: np.ndarray) -> None:
        self.world, self.folder = world, folder
        torch.jit.script(Detector()).save(str(folder / "detector.pt"))
        moments = {"mu": np.full(4, 90.0), "sigma": np.diag([900.0, 800, 700, 600]), **published}
        np.savez(folder / "published.npz", **moments)
        self.extractor, self.reference = folder / "extractor.weights", folder / "reference.npz"

    def plan(self, **file: str) -> Plan:
        detector = self.folder / "detector.pt"
        features: dict[str, Any] = {
            "kind": "inception",
            "weights": {"path": str(detector), "sha256": sha256(detector)},
            "reference": {"path": str(self.folder / "published.npz"), **file},
        }
        return self.world.plan(features=features, evaluation={"streamed": True})

    def build(self, plan: Plan) -> Reference:
        measure.features(plan.features, None, self.extractor)
        measure.reference(plan.reference, self.world.shards, self.extractor, self.reference, RUNTIME)
        return Reference.load(self.reference)


def test_distance_is_to_the_published_moments_and_the_rest_to_the_data(world: World, tmp_path: Path):
    setting = Setting(world, tmp_path)
    plan = setting.plan()
    found = setting.build(plan)
    of_file = f"published.npz {sha256(tmp_path / 'published.npz')[:12]}"
    assert found.origin == read_record(setting.reference)["moments"] == of_file
    np.testing.assert_array_equal(found.features.covariance, np.diag([900.0, 800, 700, 600]))
    real = ShardReader(world.shards).read(range(1797))["image"]
    np.testing.assert_allclose(found.kept_features, quarters(real), rtol=1e-5)
    assert found.pixels.mean.mean() == pytest.approx(real.mean() / 127.5 - 1)
    out = tmp_path / "m.json"
    measured = measure.SampleSource(None, world.student)
    spec = plan.metrics("dmd2/student")
    measure.metrics(spec, measured, setting.reference, setting.extractor, tmp_path / "state", out, RUNTIME)
    record = json.loads(out.read_text())
    assert record["features"]["reference"] == of_file
    assert set(record["metrics"]) >= {"fid", "precision", "recall", "inception_score"}
    assert "accuracy" not in record["metrics"], "the detector's classes are not the data's"
    images = _samples(plan, world, tmp_path)
    moments = FeatureStats.of(quarters(images)).gaussian()
    assert record["metrics"]["fid"]["blocks"][0] == pytest.approx(frechet_distance(moments, found.features), rel=1e-4)


def _samples(plan: Plan, world: World, folder: Path) -> np.ndarray:
    """The first block of the student's samples, as the stage that stores them makes them."""
    from dmd2.stages.sample import sample

    stored = world.plan()
    sample(stored.sample("dmd2/student"), world.student, folder / "samples/manifest.json", RUNTIME)
    return ShardReader(folder / "samples/manifest.json").read(range(96))["image"]


def test_data_is_read_a_batch_at_a_time(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setting = Setting(world, tmp_path)
    sizes, read = [], ShardReader.read

    def recording(self: ShardReader, ids: Any, names: Any = None) -> Any:
        sizes.append(len(ids))
        return read(self, ids, names)

    monkeypatch.setattr(ShardReader, "read", recording)
    setting.build(setting.plan())
    assert sizes == [1, 1797, 1024, 773], "one for its shape, the images that are kept, and then all"


@pytest.mark.parametrize(
    ("published", "file", "complaint"),
    [
        ({"mu": np.zeros(2048)}, {}, r"`mu` is float64 \(2048,\), the extractor has 4 features"),
        ({"sigma": np.diag([1.0, 1, 1, -1])}, {}, "`sigma` is not a covariance"),
        ({}, {"sha256": "0" * 64}, r"published\.npz: its SHA-256 is .*, expected 0000"),
    ],
)
def test_wrong_file_ends_the_stage_before_the_data_is_read(
    world: World, tmp_path: Path, published: dict, file: dict, complaint: str, monkeypatch: pytest.MonkeyPatch
):
    setting = Setting(world, tmp_path, **published)
    plan = setting.plan(**file)
    monkeypatch.setattr(ShardReader, "read", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(UserError, match=complaint):
        setting.build(plan)
    assert not setting.reference.exists()
