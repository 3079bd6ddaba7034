"""Optimizer step with clipping and a guard against NaN, learning-rate schedules, EMA.

All of it works on what a rank holds of a network: the whole, or its rows of each tensor (see `sharding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dmd2.errors import UserError
from dmd2.training import ranks, sharding
from dmd2.training.gradient_buckets import Buckets

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
    """Records on the device, without waiting for it, the first step at which a term is not finite on any rank.

    From then on `tripped` is 1 and every update guarded by it is skipped on the device, so the weights stay as they
    were before the bad step. The host looks with `raise_if_tripped` when it synchronises anyway.
    """

    def __init__(self, device: torch.device):
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad: dict[str, Tensor] = {}
        self.tripped = torch.zeros((), device=device)
        self.clock: Tensor | None = None
        """The number of the step on the device, in place of the one that `watch` is given (a captured step)."""

    def watch(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Checks the scalar `terms` of step `step` (counted from 0); the ranks must name the same."""
        names = list(terms)
        bad = ~torch.isfinite(torch.stack([terms[name].detach().float() for name in names]))
        first = bad.any() & (self.tripped == 0)
        now = step if self.clock is None else self.clock
        self._step.copy_(ranks.maximum(torch.where(first, now, self._step)))
        for name, flag in zip(names, bad, strict=True):
            known = self._bad.setdefault(name, torch.zeros_like(flag))
            known.copy_(torch.where(first, flag, known))
        self.tripped.copy_((self._step >= 0).float())

    def raise_if_tripped(self) -> None:
        """Raises UserError naming the step and the terms, on every rank. Synchronises with the device."""
        if self.tripped.item() == 0:
            return
        flags = ranks.agree([int(flag.item()) for flag in self._bad.values()])
        terms = ", ".join(name for name, flag in zip(self._bad, flags, strict=True) if flag)
        raise UserError(
            f"step {int(self._step.item()) + 1}: {terms} not finite; training stopped before that update, and the last "
            f"checkpoint is kept. Lower the learning rate or the loss weights, or check the data for NaN"
        )


class Moments(NamedTuple):
    """AdamW's state of one parameter."""

    step: Tensor  # (), float32, as the kernel wants it
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> Moments:
        """Those of weights that have not moved yet."""
        step = torch.zeros((), dtype=torch.float32, device=weights.device)
        return cls(step, torch.zeros_like(weights), torch.zeros_like(weights))


class Optimizer:
    """AdamW on a network with a global-norm clip and a learning-rate schedule (paper, appendix F; released code).

    The network must be in its layout already (`sharding.place`). Its gradients become means over the ranks. The update
    is torch's functional AdamW: the class around it imports torch._dynamo, a second and more of each training's start.
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
        # The kernel sees plain tensors: a rank's rows share their memory with the sharded parameter.
        self._held = [nn.Parameter(sharding.local(p)) if sharding.is_sharded(p) else p for p in self.params]
        self._is_sharded = any(sharding.is_sharded(p) for p in self.params)
        several = ranks.world_size() > 1
        self._buckets = Buckets(self.params) if several and not self._is_sharded else None
        self._base, self._rate, self._clip = learning_rate, rate, grad_clip
        self._betas, self._weight_decay = betas, weight_decay
        self._moments = [Moments.of(p) for p in self._held]

    def rate_at(self, index: int) -> float:
        """The learning rate of iteration `index`."""
        return self._base * self._rate(index)

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

    @torch.no_grad()
    def step(self, index: int, guard: FiniteGuard, terms: Mapping[str, Tensor], name: str) -> Tensor:
        """One update at iteration `index` from the gradients that are there; they are dropped. Returns their norm ().

        `terms` and the norm (as `name`) are watched by `guard`. The clip coefficient and the guard's flag go into the
        fused kernel (its `grad_scale` divides, `found_inf` skips): no pass of their own, no wait for the device.
        """
        held, moments, grads = self._collect()
        norm = self._norm(grads)
        guard.watch(index, {**terms, name: norm})
        adamw(
            held,
            grads,
            [own.exp_avg for own in moments],
            [own.exp_avg_sq for own in moments],
            [],
            [own.step for own in moments],
            fused=True,
            lr=self.rate_at(index),
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=self._weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=(norm / self._clip).clamp(min=1.0),
            found_inf=guard.tripped,
        )
        for p in (*self._held, *self.params):
            p.grad = None
        return norm

    def _collect(self) -> tuple[list[Tensor], list[Moments], list[Tensor]]:
        """What this rank holds of the weights that have a gradient, their moments, and the gradients.

        These are means over the ranks from now on.
        """
        if self._buckets is not None:
            self._buckets.finish()
        if self._is_sharded:
            for p, held in zip(self.params, self._held, strict=True):
                held.grad = None if p.grad is None else sharding.local(p.grad)
        pairs = [(p, moments) for p, moments in zip(self._held, self._moments, strict=True) if p.grad is not None]
        grads = [p.grad for p, _ in pairs if p.grad is not None]
        return [p for p, _ in pairs], [moments for _, moments in pairs], grads

    def _norm(self, grads: list[Tensor]) -> Tensor:
        norm = torch.nn.utils.get_total_norm(grads)
        return ranks.total(norm.square()).sqrt() if self._is_sharded else norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments by parameter, and its counts of steps in the order of the parameters."""
        named = list(zip(self._names, self.params, self._moments, strict=True))
        return {
            "steps": torch.stack([state.step for state in self._moments]),
            "exp_avg": {name: sharding.as_part_of(state.exp_avg, p) for name, p, state in named},
            "exp_avg_sq": {name: sharding.as_part_of(state.exp_avg_sq, p) for name, p, state in named},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; every name must fit."""
        if list(state["exp_avg"]) != self._names or list(state["exp_avg_sq"]) != self._names:
            raise ValueError("the optimizer's state is of other parameters than the network's")
        for own, name, step in zip(self._moments, self._names, state["steps"], strict=True):
            own.step.copy_(step)
            own.exp_avg.copy_(sharding.local(state["exp_avg"][name]))
            own.exp_avg_sq.copy_(sharding.local(state["exp_avg_sq"][name]))


class EMA:
    """A moving average of a network's parameters, counted in that network's updates.

    `decay` is a function of the number of earlier updates, or a constant, up to which the decay rises as
    (1 + n) / (10 + n), so that a short run does not average its start; with decay 0 the average is the network itself
    and costs nothing.
    """

    def __init__(self, network: nn.Module, decay: float | Callable[[int], float]):
        self._live = network
        self._decay = decay
        self._num_updates = 0
        self._mean = {k: v.detach().clone() for k, v in network.state_dict().items()} if decay else {}
        self._params = dict(network.named_parameters()) if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's current weights."""
        if self._decay:
            decay = self._decay(self._num_updates) if callable(self._decay) else min(self._decay, self._rising)
            mean = [sharding.local(self._mean[name]) for name in self._params]
            torch._foreach_lerp_(mean, [sharding.local(p) for p in self._params.values()], 1 - decay)
            self.count()

    @property
    def _rising(self) -> float:
        return (1 + self._num_updates) / (10 + self._num_updates)

    @property
    def is_settled(self) -> bool:
        """Whether the decay has reached its final value, so that all further updates are the same operations."""
        return not callable(self._decay) and (not self._decay or self._rising >= self._decay)

    def count(self) -> None:
        """The host's part of an update: counts it."""
        self._num_updates += bool(self._decay)

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
