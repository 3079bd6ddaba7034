"""Scikit-learn's digits and a classifier trained on them, once for all tests of this folder."""

from typing import NamedTuple

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dmd2 import config
from dmd2.metrics import Reference, train_classifier
from dmd2.metrics.classifier import Classifier, ClassifierExtractor

DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=10, levels=17)
FEATURES = config.Features(kind="classifier", epochs=4)


class Digits(NamedTuple):
    images: np.ndarray  # (1797, 8, 8, 1) uint8
    labels: np.ndarray  # (1797,) int64

    def read(self, ids):
        return self.images[ids], self.labels[ids]


@pytest.fixture(scope="session")
def digits() -> Digits:
    content = load_digits()
    return Digits(np.rint(content.images * 255 / 16).astype(np.uint8)[..., None], content.target.astype(np.int64))


@pytest.fixture(scope="session")
def trained(digits: Digits):
    """The state dict and the facts."""
    return train_classifier(digits.images, digits.labels, FEATURES, DATA)


@pytest.fixture(scope="session")
def extractor(trained) -> ClassifierExtractor:
    network = Classifier(DATA.channels, DATA.resolution, DATA.num_classes)
    network.load_state_dict(trained[0])
    return ClassifierExtractor(network)


@pytest.fixture(scope="session")
def reference(digits: Digits, extractor: ClassifierExtractor) -> Reference:
    return Reference.build(digits.read, len(digits.images), extractor, DATA.num_classes)
