"""The captions of the embedded text-to-image data set: two digits side by side. Does not import torch.

"a three left of a seven" and "a seven right of a three" describe the same composition (3, 7): left digit, right digit.
"""

from __future__ import annotations

import re

from dmd2.config.data import Subset
from dmd2.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMPOSITIONS = tuple((left, right) for left in range(10) for right in range(10))
_CAPTION = re.compile(rf"an? ({'|'.join(DIGITS)}) (left|right) of an? ({'|'.join(DIGITS)})")


def captions_of(left: int, right: int) -> tuple[str, str]:
    """The two captions of a composition."""
    return f"{_noun(left)} left of {_noun(right)}", f"{_noun(right)} right of {_noun(left)}"


def composition(caption: str) -> tuple[int, int]:
    """(left digit, right digit) of a caption. Raises UserError for any other text."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise UserError(
            f"{caption!r} is not a caption of digit_pairs; write it as 'a three left of a seven' or "
            f"'an eight right of a one'"
        )
    first, relation, second = DIGITS.index(match[1]), match[2], DIGITS.index(match[3])
    return (first, second) if relation == "left" else (second, first)


def is_held_out(left: int, right: int) -> bool:
    """Whether no network is trained on a composition: on 20 of 100, each digit twice on each side."""
    return (left + 3 * right) % 5 == 0


def prompts(subset: Subset = "all") -> list[str]:
    """All 200 captions, or the 160 of compositions that are not held out, in a fixed order."""
    chosen = [pair for pair in COMPOSITIONS if subset == "all" or not is_held_out(*pair)]
    return [caption for pair in chosen for caption in captions_of(*pair)]


def _noun(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {DIGITS[digit]}"
