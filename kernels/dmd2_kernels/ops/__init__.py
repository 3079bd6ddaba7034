"""The Triton implementation of every op: kernel, launch table and host function. Importing this imports triton.

Host functions expect contiguous tensors with checked shapes and dtypes; `_library.py` calls them.
"""

from . import denoising_loss, gan_loss, group_norm_nhwc, group_norm_silu, score_difference
from ._launch import interpreted

__all__ = ["denoising_loss", "gan_loss", "group_norm_nhwc", "group_norm_silu", "interpreted", "score_difference"]
