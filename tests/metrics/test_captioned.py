"""Measures of samples with prompts, on pairs of digits whose answer is known."""

from pathlib import Path

import numpy as np
import pytest

from dmd2 import config
from dmd2.config.data import Captions
from dmd2.config.digit_pairs import captions_of, is_held_out
from dmd2.config.protocols import MEASURES_OF_CAPTIONS, MeasureName
from dmd2.datasets.sources.digit_pairs import DigitPairs
from dmd2.errors import UserError
from dmd2.metrics import MEASURES, Meter, Reference, Tally, load_extractor, measure_blocks, resample_floor
from dmd2.metrics import train_classifier as train
from dmd2.metrics.extractor import Observed
from dmd2.metrics.labels import held_out, numbered, targets
from dmd2.training.checkpoint_store import save_weights

DATA = config.Data(source="digit_pairs", resolution=16, channels=1, captions=Captions())
MEASURED = ("fid", "patch_fid", "prompt_diversity", "alignment")
NUM = 1200  # twelve images of each composition, six of each caption


class KnownDigits:
    """An extractor of two features of the pixels, which knows the digits; -1 stands for a wrong one."""

    name, dim = "pair_classifier", 2

    def __init__(self, images: np.ndarray, codes: np.ndarray) -> None:
        self.known = {image.tobytes(): code for image, code in zip(images, codes, strict=True)}

    def observe(self, images, *, detailed=True, bicubic=False):
        halves = np.stack([half.mean(axis=(1, 2, 3)) for half in np.split(images.astype(np.float64), 2, axis=2)], 1)
        codes = np.array([self.known.get(image.tobytes(), -1) for image in images])
        return Observed(halves, codes, None)


@pytest.fixture(scope="module")
def pairs():
    source = DigitPairs(DATA)
    return np.stack([source[i] for i in range(NUM)]), source.labels[:NUM]


@pytest.fixture(scope="module")
def reported(pairs) -> KnownDigits:
    return KnownDigits(pairs[0], targets(pairs[1]))


@pytest.fixture(scope="module")
def reference(pairs, reported) -> Reference:
    return Reference.build(lambda ids: (pairs[0][ids], pairs[1][ids]), NUM, reported, None, with_patches=True)


def measured(images, labels, reference, extractor, names=MEASURED, **options) -> dict[str, float]:
    meter = Meter(reference, extractor, len(images), evaluation=config.Evaluation(measures=names), **options)
    found = measure_blocks(meter, lambda ids: ([images[ids]], labels[ids]))
    return {name: value["mean"] for name, value in found["metrics"].items()}


def test_the_data_scores_as_itself(pairs, reference, reported):
    found = measured(*pairs, reference, reported)
    assert list(found) == ["fid", "patch_fid", "prompt_diversity", "alignment", "alignment_held_out"]
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["patch_fid"] == pytest.approx(0, abs=1e-6)
    assert found["prompt_diversity"] == pytest.approx(1, abs=1e-9)
    assert (found["alignment"], found["alignment_held_out"]) == (1, 1)


def test_one_image_for_each_prompt_keeps_alignment_and_loses_diversity(pairs, reference, reported):
    images, labels = pairs
    first = {caption: i for i, caption in reversed(list(enumerate(labels)))}
    found = measured(images[[first[caption] for caption in labels]], labels, reference, reported)
    assert found["prompt_diversity"] == pytest.approx(0, abs=1e-9)
    assert found["alignment"] == 1


def test_either_caption_of_a_composition_is_right_and_the_mirrored_one_wrong(pairs, reference, reported):
    images, _ = pairs
    codes = np.array([reported.known[image.tobytes()] for image in images])
    both = [[captions_of(left, right)[k] for left, right in zip(codes // 10, codes % 10, strict=True)] for k in (0, 1)]
    for texts in both:
        assert measured(images, np.array(texts), reference, reported, ("fid", "alignment"))["alignment"] == 1
    mirrored = np.array([captions_of(right, left)[0] for left, right in zip(codes // 10, codes % 10, strict=True)])
    found = measured(images, mirrored, reference, reported, ("fid", "alignment"))
    assert found["alignment"] == pytest.approx((codes // 10 == codes % 10).mean())


def test_held_out_compositions_are_counted_apart(pairs, reference, reported):
    images, labels = pairs
    outside = np.array([is_held_out(code // 10, code % 10) for code in targets(labels)])
    np.testing.assert_array_equal(held_out(labels), outside)
    assert 0 < outside.sum() < NUM
    spoiled = np.where(outside[:, None, None, None], 255 - images, images)
    found = measured(spoiled, labels, reference, reported, ("fid", "alignment"))
    assert found["alignment_held_out"] == 0
    assert found["alignment"] == pytest.approx(1 - outside.mean())
    inside = measured(images[~outside], labels[~outside], reference, reported, ("fid", "alignment"))
    assert "alignment_held_out" not in inside


def test_patches_see_the_centre_alone(pairs, reference, reported):
    images, labels = pairs
    framed = images.copy()
    framed[:, :4], framed[:, -4:] = 255, 255
    found, plain = (measured(x, labels, reference, reported, ("fid", "patch_fid")) for x in (framed, images))
    assert found["patch_fid"] == plain["patch_fid"]
    assert found["fid"] > plain["fid"] + 1


def test_floor_of_captions_is_small_and_aligned(reference):
    evaluation = config.Evaluation(measures=MEASURED)
    found = resample_floor(reference, 2 * NUM, 2, evaluation=evaluation)["metrics"]
    assert list(found) == ["fid", "patch_fid", "prompt_diversity", "alignment", "alignment_held_out"]
    assert 0 < found["fid"]["mean"] < 50
    assert found["alignment"]["mean"] == found["alignment_held_out"]["mean"] == 1
    # six images drawn with replacement are sometimes the same: the variance is 5/6 of that of six different ones
    assert found["prompt_diversity"]["mean"] == pytest.approx(np.sqrt(5 / 6), abs=0.03)


def test_saved_reference_and_tallies_of_captions_measure_the_same(pairs, reference, reported, tmp_path: Path):
    images, labels = pairs
    reference.save(tmp_path / "reference.npz")
    meter = Meter(
        Reference.load(tmp_path / "reference.npz"), reported, NUM, evaluation=config.Evaluation(measures=MEASURED)
    )
    for i in (0, 1):
        part = slice(i * 600, i * 600 + 600)
        meter.tally([images[part]], labels[part], part.start).save(tmp_path / f"{i}.npz")
    both = Tally.load(tmp_path / "0.npz").merge(Tally.load(tmp_path / "1.npz"))
    found = meter.measures(both)
    assert found == pytest.approx(measured(images, labels, reference, reported), abs=1e-6)


def test_a_measure_that_the_data_does_not_allow_is_refused(pairs, reported):
    images, labels = pairs[0][:100], pairs[1][:100]  # one image of each composition
    alone = Reference.build(lambda ids: (images[ids], labels[ids]), 100, reported, None)
    with pytest.raises(UserError, match="prompt_diversity needs data with several images of one caption"):
        measured(images, labels, alone, reported, ("fid", "prompt_diversity"))
    with pytest.raises(UserError, match="the reference has no patches for patch_fid; build it again"):
        measured(images, labels, alone, reported, ("fid", "patch_fid"))
    assert list(measured(images, labels, alone, reported, None)) == [*MEASURES_OF_CAPTIONS[:3], "precision", "recall"]


def test_prompts_that_the_data_has_not_are_left_out_of_the_diversity(pairs, reference, reported):
    images, labels = pairs
    half = NUM // 2
    others = labels.copy()
    others[half:] = "a nine left of a nine, but in other words"
    found = measured(images, others, reference, reported, ("fid", "prompt_diversity"))
    alone = measured(images[:half], labels[:half], reference, reported, ("fid", "prompt_diversity"))
    assert found["prompt_diversity"] == pytest.approx(alone["prompt_diversity"], rel=1e-9)
    with pytest.raises(UserError, match="no prompt is both the data's and that of two samples"):
        measured(images[half:], others[half:], reference, reported, ("fid", "prompt_diversity"))


def test_names_of_the_configuration_are_the_measures():
    assert set(MeasureName.__args__) == set(MEASURES)


def test_labels_are_numbered_by_the_sorted_captions():
    known = np.array(["a", "c", "d"])
    np.testing.assert_array_equal(numbered(np.array(["d", "b", "a", "zebra"]), known), [2, -1, 0, -1])


def test_pair_classifier_names_both_digits_and_reads_back(pairs, tmp_path: Path):
    """Also of compositions that it was not trained on: each side is named on its own."""
    images, labels = pairs
    inside = ~held_out(labels)
    features = config.Features(kind="pair_classifier", epochs=12, batch_size=16)
    state, facts = train(images[inside], labels[inside], features, DATA)
    save_weights(tmp_path / "extractor.weights", state)
    extractor = load_extractor(features, DATA, tmp_path / "extractor.weights")
    seen = extractor.observe(images)
    right = seen.classes == targets(labels)
    assert (extractor.name, facts["kind"], seen.features.shape) == ("pair_classifier", "pair_classifier", (NUM, 64))
    assert right[inside].mean() > 0.9
    assert right[~inside].mean() > 0.5  # chance is 0.01
    np.testing.assert_allclose(seen.probabilities.sum(axis=1), 1, atol=1e-9)


def test_pair_classifier_of_other_data_and_classifier_of_captions_are_refused(digits):
    of_digits = config.Data(source="digits", resolution=8, channels=1, num_classes=10)
    with pytest.raises(UserError, match="pair_classifier belongs to source digit_pairs, not digits"):
        train(digits.images, digits.labels, config.Features(kind="pair_classifier"), of_digits)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), np.uint8)
    with pytest.raises(UserError, match="classifier needs data with classes"):
        train(images, np.array(["a"] * 4), config.Features(kind="classifier"), DATA)
