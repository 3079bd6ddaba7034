"""Data with which no sample can be compared is refused by the stage that meets it first, which writes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from world import RUNTIME, WORKFLOW, World

from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import write_record
from dmd2.metrics import train_classifier
from dmd2.stages import data, measure
from dmd2.training.checkpoint_store import save_weights


def shards_of(pixels: np.ndarray, folder: Path, plan: Plan) -> Path:
    """Shards of grey images (2 classes, N, 8, 8) of a folder tree."""
    for label, images in enumerate(pixels):
        (folder / "tree" / f"c{label}").mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / "tree" / f"c{label}" / f"{number}.png")
    data.shards(plan.shards, folder / "manifest.json", str(folder / "tree"), {}, 1)
    return folder / "manifest.json"


def plan_of(**evaluation: object) -> Plan:
    over = {"source": "image_folder", "num_classes": 2, "levels": 256, "path": "tree"}
    return Plan(WORKFLOW, "smoke", {"data": over, "features": {"epochs": 1}, "evaluation": evaluation})


CONSTANT = np.full((2, 6, 8, 8), 120, np.uint8)
ONE_PER_CLASS = np.stack([np.full((6, 8, 8), level, np.uint8) for level in (0, 255)])


def made_by_hand(plan: Plan, path: Path) -> Path:
    """An extractor of two classes, as the features stage would write it of other images."""
    varied = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    state, _ = train_classifier(varied, np.arange(12) % 2, plan.features.need("features"), plan.features.need("data"))
    save_weights(path, state)
    write_record(path, plan.features, kind="classifier")
    return path


def test_features_of_images_that_are_all_the_same_are_not_trained(tmp_path: Path) -> None:
    plan = plan_of()
    with pytest.raises(UserError, match="the 12 images of the data are all the same"):
        measure.features(plan.features, shards_of(CONSTANT, tmp_path, plan), tmp_path / "extractor.weights")
    assert not (tmp_path / "extractor.weights").exists()


def test_a_classifier_that_diverges_is_not_written() -> None:
    plan = plan_of()
    features = plan.features.need("features").model_copy(update={"learning_rate": 1e30})
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match="features of the images have variance nan"):
        train_classifier(images, np.arange(12) % 2, features, plan.features.need("data"))


@pytest.mark.parametrize(
    ("pixels", "complaint"),
    [(CONSTANT, "12 images of the data are all the same"), (ONE_PER_CLASS, "no class of the data has two different")],
)
def test_a_reference_that_nothing_can_be_compared_with_is_not_written(
    pixels: np.ndarray, complaint: str, tmp_path: Path
) -> None:
    plan = plan_of()
    extractor = made_by_hand(plan, tmp_path / "extractor.weights")
    with pytest.raises(UserError, match=complaint):
        measure.reference(plan.reference, shards_of(pixels, tmp_path, plan), extractor, tmp_path / "r.npz", RUNTIME)
    assert not (tmp_path / "r.npz").exists()


def test_one_image_per_class_is_enough_for_measures_without_diversity(tmp_path: Path) -> None:
    plan = plan_of(measures=("fid",))
    extractor = made_by_hand(plan, tmp_path / "extractor.weights")
    manifest = shards_of(ONE_PER_CLASS, tmp_path, plan)
    measure.reference(plan.reference, manifest, extractor, tmp_path / "r.npz", RUNTIME)
    assert (tmp_path / "r.npz").exists()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_features_that_are_not_finite_do_not_reach_a_reference(tmp_path: Path, world: World) -> None:
    state = load_file(world.extractor)
    state["scale"] = torch.zeros(())
    plan, path = world.plan(), tmp_path / "extractor.weights"
    save_weights(path, state)
    write_record(path, plan.features, kind="classifier")
    with pytest.raises(UserError, match="statistics of the real images: `features` has values that are not finite"):
        measure.reference(plan.reference, world.shards, path, tmp_path / "r.npz", RUNTIME)
    assert not (tmp_path / "r.npz").exists()
