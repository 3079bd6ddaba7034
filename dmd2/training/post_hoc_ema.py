"""Averages of any length after training, from power-function averages stored during it.

Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C. A power-function average after t updates weights
the parameters after update tau <= t by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Its width, the standard
deviation of p relative to t, is sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)). As the averages are linear in the
parameters, a least-squares fit of a wanted profile by the stored ones combines their weights to the average of any
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

WIDEST = 12**-0.5
"""The width of a plain mean, gamma = 0."""
Stored = tuple[int, float]
"""A stored average: number of updates, and width."""


def exponent(width: float) -> float:
    """gamma of a width in (0, WIDEST]: the largest root of w^2 (g + 2)^2 (g + 3) = g + 1 (appendix C, eq. 126).

    Raises ValueError for another width.
    """
    if not 0 < width <= WIDEST + 1e-9:
        raise ValueError(f"an average's width is in (0, {WIDEST:.4f}], not {width}")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots[np.abs(roots.imag) < 1e-6].real.max()))


def power_decay(width: float) -> Callable[[int], float]:
    """The decay of update n + 1 as a function of n: (1 - 1 / (n + 1))^(gamma + 1), for `optimizer.EMA`."""
    gamma = exponent(width)
    return lambda n: (n / (n + 1)) ** (gamma + 1)


def ema_suffix(width: float) -> str:
    """What the name of a stored average's file ends in, before `.safetensors`."""
    return f"-ema{width:g}"


def _product(a: Stored, b: Stored) -> float:
    """The inner product of two profiles, times the larger number of updates."""
    (time_a, width_a), (time_b, width_b) = sorted((a, b))
    gamma_a, gamma_b = exponent(width_a), exponent(width_b)
    # The integral over [0, time_a] of both profiles; time_a <= time_b.
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (time_a / time_b) ** gamma_b


def combination(stored: Sequence[Stored], wanted: Stored) -> tuple[np.ndarray, float]:
    """Weights of the stored averages, float64 (n,), and the relative error of the fitted profile, 0 to 1.

    They minimise the squared distance of profiles, and sum to 1 (appendix C.3). Raises ValueError for none stored.
    """
    if not stored:
        raise ValueError("no averages are stored")
    gram = np.array([[_product(a, b) / max(a[0], b[0]) for b in stored] for a in stored])
    target = np.array([_product(a, wanted) / max(a[0], wanted[0]) for a in stored])
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of unit norm: late and narrow ones would dominate
    solution = scale * np.linalg.lstsq(gram * np.outer(scale, scale), scale * target, rcond=1e-12)[0]
    norm = _product(wanted, wanted) / wanted[0]
    error = float(np.sqrt(max(0.0, 1 - (2 * solution @ target - solution @ gram @ solution) / norm)))
    return solution / solution.sum(), error


def combined(weights: Sequence[float], states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of state dicts, added in float64, in their dtypes; integer tensors are the last one's."""
    total: dict[str, Tensor] = {}
    state: Mapping[str, Tensor] = {}
    for weight, state in zip(weights, states, strict=True):
        for name, value in state.items():
            if value.is_floating_point():
                added = value.double() * weight
                total[name] = total[name] + added if name in total else added
    return {name: total[name].to(value.dtype) if name in total else value for name, value in state.items()}
