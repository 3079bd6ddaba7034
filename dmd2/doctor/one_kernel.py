"""Launches one Triton kernel and compares it with its definition; an exception is the result of a failure."""

import torch

import dmd2_kernels


def main() -> None:
    """On a GPU if there is one; otherwise TRITON_INTERPRET must be set."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 8, 8, generator=generator).to(device) for _ in range(3)]
    found = {}
    for name in ("reference", "triton"):
        with dmd2_kernels.use(name):
            found[name] = float(dmd2_kernels.matching_loss(*inputs).loss)
    difference = abs(found["triton"] - found["reference"])
    if not difference <= 1e-4 * abs(found["reference"]):
        raise ArithmeticError(f"the kernel gives {found['triton']}, its definition {found['reference']}")


if __name__ == "__main__":
    main()
