"""What known GPUs can do at most: dense tensor-core rates and memory, from NVIDIA's data sheets. No torch."""

from __future__ import annotations

from typing import NamedTuple

from dmd2.config import Precision
from dmd2.errors import UserError, suggestion

UTILISATION = 0.2
"""ASSUMED share of the peak that a run sustains. The released code's training times come to about 0.2 of an A100's
bf16 peak; on an H100 the same share is 198 TFLOP/s."""


class Gpu(NamedTuple):
    """Dense peaks in TFLOP/s, and the memory that a process sees, in GiB."""

    name: str  # as torch.cuda.get_device_name gives it
    bf16: float
    tf32: float
    memory_gib: float

    def peak(self, precision: Precision) -> float:
        """TFLOP/s of networks in `precision`; in fp32 PyTorch's convolutions use TF32."""
        return self.bf16 if precision == "bf16" else self.tf32


GPUS = {
    "a10": Gpu("NVIDIA A10", 125.0, 62.5, 22.0),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 312.0, 156.0, 39.4),
    "a100-40gb-pcie": Gpu("NVIDIA A100-PCIE-40GB", 312.0, 156.0, 39.4),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 312.0, 156.0, 79.2),
    "a100-80gb-pcie": Gpu("NVIDIA A100 80GB PCIe", 312.0, 156.0, 79.2),
    "a40": Gpu("NVIDIA A40", 149.7, 74.8, 44.4),
    "b200": Gpu("NVIDIA B200", 2250.0, 1125.0, 178.0),
    "h100-80gb": Gpu("NVIDIA H100 80GB HBM3", 989.4, 494.7, 79.1),
    "h100-80gb-pcie": Gpu("NVIDIA H100 PCIe", 756.0, 378.0, 79.1),
    "h100-nvl": Gpu("NVIDIA H100 NVL", 835.5, 417.7, 93.1),
    "h200": Gpu("NVIDIA H200", 989.4, 494.7, 139.8),
    "l4": Gpu("NVIDIA L4", 121.0, 60.5, 22.0),
    "l40s": Gpu("NVIDIA L40S", 362.0, 183.0, 44.4),
    "rtx-3090": Gpu("NVIDIA GeForce RTX 3090", 71.2, 35.6, 23.6),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 23.5),
}


def gpu(key: str) -> Gpu:
    """The GPU called `key` here. Raises UserError for an unknown one."""
    if key not in GPUS:
        raise UserError(f"--gpu {key}: not among the known GPUs; {suggestion(key, GPUS)}")
    return GPUS[key]


def known(device_name: str) -> Gpu | None:
    """The GPU that torch calls `device_name`, or None for one whose peaks are not listed."""
    return next((found for found in GPUS.values() if found.name == device_name), None)
