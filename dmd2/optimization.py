"""What moves weights: the update with clipping and a finite guard, learning-rate schedules, weight averages.

All of it works on what a rank holds of a network: the whole, or its rows of each tensor (see `sharding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmd2 import distributed, sharding
from dmd2.errors import UserError
from dmd2.gradients import Buckets

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
    """Notices on the device, without waiting for it, the first step at which a term is not finite on any rank.

    From then on `tripped` is 1 and every update guarded by it is skipped on the device, so the weights stay as they
    were before the bad step. The host asks with `raise_if_tripped` when it synchronises anyway.
    """

    def __init__(self, device: torch.device):
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad: dict[str, Tensor] = {}
        self.tripped = torch.zeros((), device=device)

    def watch(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Checks the scalar `terms` of step `step` (counted from 0); the ranks must name the same."""
        names = list(terms)
        bad = ~torch.isfinite(torch.stack([terms[name].detach().float() for name in names]))
        first = bad.any() & (self.tripped == 0)
        self._step = distributed.maximum(torch.where(first, step, self._step))
        for name, flag in zip(names, bad, strict=True):
            self._bad[name] = torch.where(first, flag, self._bad.get(name, torch.zeros_like(flag)))
        self.tripped = (self._step >= 0).float()

    def raise_if_tripped(self) -> None:
        """Raises UserError naming the step and the terms, on every rank. Synchronises with the device."""
        if self.tripped.item() == 0:
            return
        flags = distributed.agree([int(flag.item()) for flag in self._bad.values()])
        terms = ", ".join(name for name, flag in zip(self._bad, flags, strict=True) if flag)
        raise UserError(
            f"step {int(self._step.item()) + 1}: {terms} not finite; training stopped before that update, and the last "
            f"checkpoint is kept. Lower the learning rate or the loss weights, or check the data for NaN"
        )


class Descent:
    """AdamW on a network with a global-norm clip and a learning-rate schedule (paper, appendix F; released code).

    The network must be in its layout already (`sharding.place`). Its gradients become means over the ranks.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        rate: Rate,
    ):
        self._network = network
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._names, self.params = list(named), list(named.values())
        # AdamW sees plain tensors: a rank's rows share their memory with the sharded parameter.
        self._held = [nn.Parameter(sharding.local(p)) if sharding.is_sharded(p) else p for p in self.params]
        self._is_sharded = any(sharding.is_sharded(p) for p in self.params)
        several = distributed.world_size() > 1
        self._buckets = Buckets(self.params) if several and not self._is_sharded else None
        self._base, self._rate, self._clip = learning_rate, rate, grad_clip
        self._adamw = torch.optim.AdamW(
            self._held, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        for p in self._held:  # what AdamW would make at its first step; a checkpoint may ask for it before
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self._adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """One of the backward passes whose gradients an update sums; the ranks exchange them in the last one alone.

        The last is one backward pass over the network: each bucket or block leaves as soon as it is complete. Passes
        outside of any such block are right too; what they leave is exchanged in `step`, or, sharded, at once.
        """
        sharding.synchronise(self._network, last)
        try:
            if last and self._buckets is not None:
                with self._buckets.overlapping():
                    yield
            else:
                yield
        finally:
            sharding.synchronise(self._network, True)

    def step(self, index: int, guard: FiniteGuard, terms: Mapping[str, Tensor], name: str) -> Tensor:
        """One update at iteration `index` from the gradients that are there; they are dropped. Returns their norm ().

        `terms` and the norm (as `name`) are watched by `guard`. The clip coefficient and the guard's flag go into the
        fused kernel (its `grad_scale` divides, `found_inf` skips): no pass of their own, no wait for the device.
        """
        norm = self._norm(self._collect())
        guard.watch(index, {**terms, name: norm})
        self._adamw.grad_scale = (norm / self._clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self._adamw.found_inf = guard.tripped  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = self._base * self._rate(index)
        self._adamw.step()
        for p in (*self._held, *self.params):
            p.grad = None
        return norm

    def _collect(self) -> list[Tensor]:
        """What this rank holds of the gradients, which are means over the ranks from now on."""
        if self._buckets is not None:
            self._buckets.finish()
        if self._is_sharded:
            for p, held in zip(self.params, self._held, strict=True):
                held.grad = None if p.grad is None else sharding.local(p.grad)
        return [p.grad for p in self._held if p.grad is not None]

    def _norm(self, grads: list[Tensor]) -> Tensor:
        norm = torch.nn.utils.get_total_norm(grads)
        return distributed.total(norm.square()).sqrt() if self._is_sharded else norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments by parameter, and its counts of steps in the order of the parameters."""
        states = [self._adamw.state[p] for p in self._held]

        def moments(key: str) -> dict[str, Tensor]:
            named = zip(self._names, self.params, states, strict=True)
            return {name: sharding.as_part_of(state[key], p) for name, p, state in named}

        return {
            "steps": torch.stack([state["step"] for state in states]),
            "exp_avg": moments("exp_avg"),
            "exp_avg_sq": moments("exp_avg_sq"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; every name must fit."""
        if list(state["exp_avg"]) != self._names or list(state["exp_avg_sq"]) != self._names:
            raise ValueError("the optimizer's state is of other parameters than the network's")
        for p, name, step in zip(self._held, self._names, state["steps"], strict=True):
            own = self._adamw.state[p]
            own["step"].copy_(step)
            for key in ("exp_avg", "exp_avg_sq"):
                own[key].copy_(sharding.local(state[key][name]))


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
        self._params = dict(network.named_parameters()) if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's current weights."""
        if self._decay:
            decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
            mean = [sharding.local(self._mean[name]) for name in self._params]
            torch._foreach_lerp_(mean, [sharding.local(p) for p in self._params.values()], 1 - decay)
            self._num_updates += 1

    def weights(self) -> dict[str, Tensor]:
        """The averaged state dict, or the live one with decay 0."""
        return dict(self._mean) if self._decay else self._live.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The average and its count."""
        return {"mean": self._mean, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; every name must fit."""
        if state["mean"].keys() != self._mean.keys():
            raise ValueError("the average in the state is of other tensors than the network's")
        for name, value in state["mean"].items():
            sharding.local(self._mean[name]).copy_(sharding.local(value))
        self._num_updates = state["num_updates"]
