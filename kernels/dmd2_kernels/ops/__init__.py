"""The Triton side of every op: kernel, launch table and host function. Importing this is the moment triton is imported.

Host functions take contiguous tensors whose shapes and dtypes were checked; `_library.py` calls them.
"""

from . import denoising_loss, gan_loss, group_norm_nhwc, group_norm_silu, score_difference
from ._launch import interpreted

__all__ = ["denoising_loss", "gan_loss", "group_norm_nhwc", "group_norm_silu", "interpreted", "score_difference"]
