"""What moves weights: the update with clipping and a finite guard, learning-rate schedules, weight averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmd2 import distributed
from dmd2.errors import UserError

Rate = Callable[[int], float]
"""The learning rate's factor at an update or iteration index, counted from 0."""


def warmup(num: int) -> Rate:
    """Linear from 1/num to 1 over the first `num` iterations, then constant."""
    return lambda index: min(1.0, (index + 1) / num) if num else 1.0


def warmup_decay(num_warmup: int, iterations: int, decay_from: float, final: float) -> Rate:
    """Linear warm-up, constant, then linear from `decay_from * iterations` down to `final` at the end."""
    rise = warmup(num_warmup)
    start = decay_from * iterations

    def rate(index: int) -> float:
        progress = max(0.0, (index - start) / max(1.0, iterations - start))
        return rise(index) * (1.0 - (1.0 - final) * progress)

    return rate


class FiniteGuard:
    """Notices on the device, without waiting for it, the first step at which a term is not finite.

    From then on `tripped` is 1 and every update guarded by it is skipped on the device, so the weights stay as they
    were before the bad step. The host asks with `raise_if_tripped` when it synchronises anyway.
    """

    def __init__(self, device: torch.device):
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad: dict[str, Tensor] = {}
        self.tripped = torch.zeros((), device=device)

    def watch(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Checks the scalar `terms` of step `step` (counted from 0)."""
        names = list(terms)
        bad = ~torch.isfinite(torch.stack([terms[name].detach().float() for name in names]))
        first = bad.any() & (self.tripped == 0)
        self._step = torch.where(first, step, self._step)
        for name, flag in zip(names, bad, strict=True):
            self._bad[name] = torch.where(first, flag, self._bad.get(name, torch.zeros_like(flag)))
        self.tripped = torch.maximum(self.tripped, first.float())

    def raise_if_tripped(self) -> None:
        """Raises UserError naming the step and the terms. Synchronises with the device."""
        if self.tripped.item() == 0:
            return
        terms = ", ".join(name for name, flag in self._bad.items() if flag.item())
        raise UserError(
            f"step {int(self._step.item()) + 1}: {terms} not finite; training stopped before that update, and the last "
            f"checkpoint is kept. Lower the learning rate or the loss weights, or check the data for NaN"
        )


class Descent:
    """AdamW over `params` with a global-norm clip and a learning-rate schedule (paper, appendix F; released code)."""

    def __init__(
        self,
        params: list[nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        rate: Rate,
    ):
        self.params = params
        self._base, self._rate, self._clip = learning_rate, rate, grad_clip
        self._adamw = torch.optim.AdamW(params, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)

    def step(self, index: int, guard: FiniteGuard, terms: Mapping[str, Tensor], name: str) -> Tensor:
        """One update at iteration `index` from the gradients that are there; they are dropped. Returns their norm ().

        `terms` and the norm (as `name`) are watched by `guard`. The clip coefficient and the guard's flag go into the
        fused kernel (its `grad_scale` divides, `found_inf` skips): no pass of their own, no wait for the device.
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        distributed.average(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        guard.watch(index, {**terms, name: norm})
        self._adamw.grad_scale = (norm / self._clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self._adamw.found_inf = guard.tripped  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = self._base * self._rate(index)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state."""
        return self._adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores AdamW's state."""
        self._adamw.load_state_dict(state)


class Average:
    """An exponential moving average of a network's parameters, counted in that network's updates.

    The decay rises as (1 + n) / (10 + n) up to `decay`, so that a short run does not average its start; with decay 0
    the average is the network itself and costs nothing.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._live = network
        self._decay = decay
        self._num_updates = 0
        self._mean = {k: v.detach().clone() for k, v in network.state_dict().items()} if decay else {}
        self._names = [name for name, _ in network.named_parameters()] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's current weights."""
        if self._decay:
            decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
            live = dict(self._live.named_parameters())
            torch._foreach_lerp_(
                [self._mean[name] for name in self._names], [live[name] for name in self._names], 1 - decay
            )
            self._num_updates += 1

    def weights(self) -> dict[str, Tensor]:
        """The averaged state dict, or the live one with decay 0."""
        return dict(self._mean) if self._decay else self._live.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The average and its count."""
        return {"mean": self._mean, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for name, value in state["mean"].items():
            self._mean[name].copy_(value)
        self._num_updates = state["num_updates"]
