"""Evaluation protocols by name: choices in which published Frechet distances differ. Does not import torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal["edm", "dmd2", "coco10k", "coco30k", "coco10k_released", "coco30k_released"]
MeasureName = Literal[
    "fid", "patch_fid", "pixel_fd", "nearest_distance", "precision_recall", "inception_score",
    "accuracy", "diversity", "alignment", "prompt_diversity", "clip_score", "lpips_diversity",
]  # fmt: skip
"""The keys of metrics.MEASURES."""
Rounding = Literal["round", "truncate"]
CovarianceStart = Literal["zeros", "ones"]


class Protocol(NamedTuple):
    """How samples are quantised to grey levels and compared.

    `side`: samples are resized to that many pixels with a Lanczos filter before all but `patch_fid`, `clip_score` and
    `lpips_diversity`, as the reference images are when they are read. `bicubic`: images come to Inception in its input
    size by clean-fid's antialiased bicubic filter, not by the network's own bilinear one.

    The others change the samples themselves, as mistakes and settings of the released evaluators do. `first_tokenizer`:
    both text encoders of SDXL's kind get the first one's tokens. `alpha_bar`: in place of the last level's own where a
    one-step student that starts there computes x0. `tf32`: sampling in TensorFloat-32 on GPUs.
    """

    rounding: Rounding
    covariance_start: CovarianceStart
    side: int | None = None
    bicubic: bool = False
    first_tokenizer: bool = False
    alpha_bar: float | None = None
    tf32: bool = False

    @property
    def sampling(self) -> tuple[bool, float | None, bool]:
        """What changes the samples; protocols of one evaluation must agree on it."""
        return self.first_tokenizer, self.alpha_bar, self.tf32


PROTOCOLS: dict[str, Protocol] = {
    "edm": Protocol("round", "zeros"),  # Karras et al. 2022
    "dmd2": Protocol("truncate", "ones"),  # the released DMD2 code on ImageNet
    "coco10k": Protocol("truncate", "zeros", side=512, bicubic=True),  # the same for SDXL: paper, tables 2, 4 and 6
    "coco30k": Protocol("truncate", "zeros", side=256, bicubic=True),  # and for Stable Diffusion 1.5: table 5
    # The same with what the released evaluators do to the samples (test_folder_sdxl.py, test_folder_sd.py).
    "coco10k_released": Protocol("truncate", "zeros", side=512, bicubic=True, first_tokenizer=True, tf32=True),
    "coco30k_released": Protocol("truncate", "zeros", side=256, bicubic=True, alpha_bar=0.0047, tf32=True),
}

MEASURES_OF_CLASSES: tuple[MeasureName, ...] = (
    "fid", "pixel_fd", "nearest_distance", "diversity", "accuracy", "precision_recall", "inception_score"
)  # fmt: skip
"""The default for data with classes."""
MEASURES_OF_CAPTIONS: tuple[MeasureName, ...] = ("fid", "pixel_fd", "nearest_distance", "precision_recall")
"""The default for data with captions: what needs neither several images of a caption nor a network of its own."""
CLASSES_ONLY: tuple[MeasureName, ...] = ("diversity", "accuracy")
CAPTIONS_ONLY: tuple[MeasureName, ...] = ("prompt_diversity", "alignment", "clip_score")
DETAILED = ("patch_fid", "clip_score", "lpips_diversity", "precision_recall", "inception_score")
"""Measures that a training curve does not need."""


def describe(names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The protocols `names` with their choices, as stored in a record; without those that are not made."""
    return {name: {key: str(made) for key, made in PROTOCOLS[name]._asdict().items() if made} for name in names}
