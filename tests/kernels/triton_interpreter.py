"""Triton's interpreter, repaired where it differs from a GPU: it rounds float32 to bfloat16 by truncation.

It also keeps bfloat16 as bit patterns and would add those as integers; the lint requires a cast at every load.
"""

from typing import Any

import numpy as np
import torch


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """The bit patterns (uint16) of floats rounded to nearest even, as torch and a GPU round."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The floats that bit patterns (uint16) stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(dtype)


def repair_bf16() -> None:
    """Make every cast between bfloat16 and another float exact in this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    broken, broken_custom = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source in (tl.float32, tl.float64):
            return interpreter.TensorHandle(to_bf16_bits(src.data), target)
        if source == tl.bfloat16 and target in (tl.float32, tl.float64):
            return interpreter.TensorHandle(from_bf16_bits(src.data, interpreter._get_np_dtype(target)), target)
        return broken(self, src, dst_type)

    def custom(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        return broken_custom(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast, custom
