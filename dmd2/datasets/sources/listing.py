"""Which files of a source are its images, in folders, zips and tars; what is passed over is counted by reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dmd2.datasets.sources.spans import printable

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pjp", ".pjpeg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
OTHER_IMAGES = frozenset({".avif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".pbm", ".pnm", ".svg", ".tga"})
"""Images of formats that are not read: they count as unreadable, which `data.max_unreadable` limits."""
SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
)
# fmt: off
OTHER_SUFFIXES = frozenset({
    ".cfg", ".cls", ".css", ".csv", ".db", ".doc", ".docx", ".h5", ".hdf5", ".htm", ".html", ".ini", ".ipynb",
    ".js", ".json", ".jsonl", ".lock", ".log", ".lst", ".mat", ".md5", ".md", ".mp3", ".mp4", ".npy", ".npz",
    ".parquet", ".pdf", ".pickle", ".pkl", ".pt", ".pth", ".py", ".rst", ".rtf", ".safetensors", ".sh", ".sha256",
    ".sqlite", ".tex", ".toml", ".tsv", ".txt", ".url", ".wav", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
})
OTHER_NAMES = frozenset({
    "authors", "changelog", "checksums", "citation", "copying", "dockerfile", "licence", "license", "makefile",
    "manifest", "md5sums", "notice", "readme", "sha1sums", "sha256sums", "version",
})
# fmt: on
"""Suffixes and names without one of files that are no images; any other file may be an image."""
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
TRAINING = ("train", "training")
HIDDEN, OTHER = "hidden or of a system", "no image by their suffix"
UNKNOWN = "of an unknown suffix"
OUTSIDE = "outside the class folders"
REPLACED = "replaced by a later one of that name"
DOUBTFUL = (UNKNOWN, OUTSIDE, REPLACED)
"""Reasons that may pass over images of the data set, which `data.max_passed_over` limits."""


class PassedOver:
    """Files of a source that are not taken, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts a file."""
        self._names.setdefault(reason, []).append(printable(name))

    @property
    def doubtful(self) -> PassedOver:
        """Those that may be images of the data set."""
        found = PassedOver()
        found._names = {reason: names for reason, names in self._names.items() if reason in DOUBTFUL}
        return found

    def __len__(self) -> int:
        return sum(map(len, self._names.values()))

    def __str__(self) -> str:
        """One line, such as `2 no image by their suffix (first: a/notes.txt)`; empty if there is nothing."""
        return ", ".join(f"{len(names)} {reason} (first: {min(names)})" for reason, names in self._names.items())


def reason(name: str) -> str:
    """Why a file that is no image by its name is passed over."""
    if is_hidden(name):
        return HIDDEN
    file = name.rpartition("/")[2].lower()
    stem, dot, suffix = file.rpartition(".")
    return OTHER if (f".{suffix}" in OTHER_SUFFIXES if dot and stem else file in OTHER_NAMES) else UNKNOWN


def is_hidden(name: str) -> bool:
    """Whether any part of a path is hidden or a system's: `.ipynb_checkpoints/a.png`, `__MACOSX/a.png`."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]  # `tar -C folder .` writes ./a.png
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in parts)


def has_image_suffix(name: str) -> bool:
    """Whether the suffix is an image's, also of a format that is not read."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return bool(dot) and f".{suffix.lower()}" in SUFFIXES | OTHER_IMAGES


def is_image(name: str) -> bool:
    """Whether a path is that of an image of the data set: of an image's suffix, and no part of it hidden."""
    return has_image_suffix(name) and not is_hidden(name)


def taken(names: Iterable[str], passed_over: PassedOver) -> list[str]:
    """The paths of images, in order; the others are counted."""
    kept = []
    for name in names:
        if is_image(name):
            kept.append(name)
        else:
            passed_over.add(reason(name), name)
    return kept


def training_split(paths: Sequence[Sequence[str]]) -> int | None:
    """The depth at which all images lie below siblings named as splits, one of them for training; None without splits.

    `paths` are the parts of the images' paths. A class called `train` among other classes is a class.
    """
    shortest = min(map(len, paths), default=0)
    for depth in range(shortest - 1):
        values = {path[depth].lower() for path in paths}
        training = [path for path in paths if path[depth].lower() in TRAINING]
        # Below the training split there are class folders; Kaggle's validation images lie in their split itself.
        if values <= SPLITS and training and all(len(path) > depth + 2 for path in training):
            return depth
        if len(values) > 1:
            return None
    return None
