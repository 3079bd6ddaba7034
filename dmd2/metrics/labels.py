"""Labels of samples: class numbers, or texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmd2.config.digit_pairs import composition, is_held_out
from dmd2.metrics.images import Labels


def targets(labels: Labels) -> NDArray[np.int64]:
    """What an extractor's class should be, (N,): the class number, or 10 * left + right of a caption of digit_pairs.

    Raises UserError for any other text.
    """
    if labels.dtype.kind != "U":
        return labels.astype(np.int64)
    texts, places = np.unique(labels, return_inverse=True)
    return np.array([10 * left + right for left, right in map(composition, texts)], np.int64)[places]


def held_out(labels: Labels) -> NDArray[np.bool_]:
    """Which captions of digit_pairs (N,) describe a composition that no network was trained on."""
    codes = targets(labels)
    return is_held_out(codes // 10, codes % 10)  # type: ignore[arg-type, return-value]  # of arrays: elementwise


def numbered(labels: Labels, known: Labels) -> NDArray[np.int64]:
    """The position (N,) of each label in the sorted array `known`; -1 if it is not there."""
    places = np.searchsorted(known, labels).clip(max=len(known) - 1)
    return np.where(known[places] == labels, places, -1)
