"""Prints how well the pair classifier of a preset names digits of which it saw none in training.

`python docs/figures/pair_classifier.py [PRESET]`: for two splits of scikit-learn's digits and two seeds, it is trained
on pairs of four fifths of them and tested on pairs of the others.
"""

import sys
import time
from pathlib import Path

import numpy as np

from dmd2.config.reading import load_preset
from dmd2.datasets.sources.digit_pairs import DigitPairs
from dmd2.metrics.classifier import PairClassifier, PairExtractor, train_classifier
from dmd2.metrics.labels import targets

WORKFLOW = Path(__file__).parents[2] / "workflow"


def pairs(source: DigitPairs, glyphs: list[np.ndarray]) -> np.ndarray:
    """The images of the source with other digits to draw from."""
    source._of_digit = glyphs
    return np.stack([source[i] for i in range(len(source))])


def main(name: str) -> None:
    preset = load_preset(WORKFLOW, name)
    source, accuracies = DigitPairs(preset.data), []
    whole, labels = source._of_digit, np.asarray(source.labels, dtype=str)
    for split in range(2):
        orders = [np.random.default_rng([split, digit]).permutation(of) for digit, of in enumerate(whole)]
        images = pairs(source, [order[len(order) // 5 :] for order in orders])
        unseen = pairs(source, [order[: len(order) // 5] for order in orders])
        for seed in range(2):
            start = time.process_time()
            features = preset.features.model_copy(update={"seed": seed, "held_out": 1e-3})
            state, _ = train_classifier(images, labels, features, preset.data)
            seconds = time.process_time() - start
            network = PairClassifier(1, 16)
            network.load_state_dict(state)
            found = np.asarray(PairExtractor(network).observe(unseen, detailed=False).classes, np.int64)
            right = np.asarray(targets(labels), np.int64)
            digits = np.mean([found // 10 == right // 10, found % 10 == right % 10])
            accuracies.append(digits)
            both = (found == right).mean()
            print(
                f"split {split}, seed {seed}: {digits:.4f} per digit, {both:.4f} both ({seconds:.0f} CPU-s)", flush=True
            )
    print(f"{name}: {np.mean(accuracies):.4f} per unseen digit, at least {min(accuracies):.4f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits-t2i")
