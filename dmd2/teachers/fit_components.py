"""What the training of a text-to-image teacher's components shares: the loop, and building a network from its keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.progress import Progress
from dmd2.training.optimizer import FiniteGuard, Optimizer, warmup_decay
from dmd2.training.rng import step_rng

GRAD_CLIP = 10.0
WARMUP = 0.15
"""Share of the iterations in which the learning rate rises; it falls linearly for the rest."""
FINAL_RATE = 0.01
CHECK_EVERY = 50

Loss = Callable[[torch.Generator], Tensor]
"""The loss () of one iteration, from its own random generator on the CPU."""


def seeded(build: Callable[[], nn.Module], seed: int) -> Any:
    """A new network whose initial weights depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def refused(key: str, error: Exception) -> UserError:
    """The error of a configuration that a library does not accept, in one line."""
    return UserError(f"{key}: {' '.join(str(error).split()) or type(error).__name__}; correct the configuration")


def minimise(
    network: nn.Module, loss: Loss, *, iterations: int, learning_rate: float, seed: int, title: str
) -> dict[str, float]:
    """Trains `network` in place with AdamW without weight decay, the rate rising and falling; returns facts.

    Iteration i draws its random numbers from (seed, i) alone. Facts: the last loss, the number of parameters, wall
    and CPU seconds. Raises UserError if a loss or gradient is not finite.
    """
    network.train()
    device = next(network.parameters()).device
    guard = FiniteGuard(device)
    optimizer = Optimizer(
        network,
        learning_rate=learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        grad_clip=GRAD_CLIP,
        rate=warmup_decay(round(WARMUP * iterations), iterations, WARMUP, FINAL_RATE),
    )
    progress, wall, cpu = Progress(title, iterations), time.monotonic(), time.process_time()
    for index in range(iterations):
        value = loss(step_rng(seed, index))
        value.backward()
        optimizer.step(index, guard, {f"{title}_loss": value}, "grad_norm")
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == iterations:
            guard.raise_if_tripped()
            progress.update(index + 1, value.item())
    network.eval().requires_grad_(False)
    return {
        "loss": value.item(),
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "wall_s": round(time.monotonic() - wall, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
    }
