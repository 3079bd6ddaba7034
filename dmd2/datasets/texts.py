"""What captions and prompts are made of."""

from __future__ import annotations

CAPTION_KEYS = ("caption", "text")
"""Keys or columns of a caption; the first that is there counts."""


def tidy(caption: object) -> str:
    """A caption with single spaces, and "?" for what UTF-8 cannot encode (halves of surrogate pairs); "" for None.

    Raises TypeError for anything but a text.
    """
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise TypeError(f"{caption!r} is not a text")
    return " ".join(caption.encode("utf-8", "replace").decode().split())
