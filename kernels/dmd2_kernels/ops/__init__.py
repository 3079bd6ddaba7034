"""The Triton implementation of every op: kernel, launch table and host function. Importing this imports triton.

Host functions expect contiguous tensors with checked shapes and dtypes; `_library.py` calls them.
"""

from . import (
    denoising_loss,
    gan_loss,
    group_norm_nhwc,
    group_norm_nhwc_once,
    group_norm_silu,
    residual_sum,
    score_difference,
)
from ._launch import interpreted
from ._norm_host import Summands, Upstream

__all__ = [
    "Summands",
    "Upstream",
    "denoising_loss",
    "gan_loss",
    "group_norm_nhwc",
    "group_norm_nhwc_once",
    "group_norm_silu",
    "interpreted",
    "residual_sum",
    "score_difference",
]
