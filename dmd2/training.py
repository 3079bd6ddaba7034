"""One DMD2 run: its networks, and the step that shows the order of everything that moves weights.

Shapes: B this rank's batch, `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dmd2 import distributed, objective, sampling
from dmd2.config import Train
from dmd2.critic import Critic
from dmd2.denoiser import Cond, Denoiser, Teacher, move
from dmd2.errors import UserError
from dmd2.noise import add_noise, expand, normal, step_rng
from dmd2.optimization import Average, Descent, FiniteGuard, warmup

Batches = Callable[[int], tuple[Tensor, Cond]]
"""Batch number -> (x0 (B, ...), conditions) of real samples."""
Pairs = Callable[[int], tuple[Tensor, Tensor, Cond]]
"""Batch number -> (noise (B, ...), the teacher's x0 (B, ...), conditions)."""

SHARED = 2**31
"""The `rank` of random numbers that all ranks draw alike."""


class Distillation:
    """A student in training: generator, critic, their optimizers and the generator's average.

    `data` and `pairs` are asked only where a term needs them. `start` holds the networks of another run to go on
    from (`generator.*`, `critic.fake.*`), with fresh optimizers and a fresh realism head.
    """

    def __init__(
        self,
        teacher: Teacher,
        train: Train,
        *,
        data: Batches | None = None,
        pairs: Pairs | None = None,
        start: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        if (data is None) and (train.has_gan or (train.num_steps > 1 and not train.backward_simulation)):
            raise UserError("this run needs real data: it has a GAN, or several steps without backward simulation")
        if (pairs is None) and train.regression_weight > 0:
            raise UserError("regression_weight > 0 needs the teacher's noise-image pairs")
        if train.guidance_scale != 1 and teacher.conditioner.null(1) is None:
            raise UserError(
                f"guidance_scale is {train.guidance_scale}, but this teacher has no unconditional input; set it to 1"
            )
        self.train = train
        self.device = torch.device(device)
        self.teacher = teacher.to(self.device)
        self.batch_size = distributed.local_share(train.batch_size)
        self._data, self._pairs = data, pairs
        self._sigmas = teacher.grid.student_steps(train.num_steps)
        with torch.random.fork_rng(devices=[]):  # the realism head's initial weights
            torch.manual_seed(train.seed)
            # In evaluation mode: DMD2 uses no dropout, whatever the teacher was trained with.
            self.generator: Denoiser = teacher.copy_network().to(self.device).eval()
            self.critic = Critic(teacher.copy_network(), has_gan=train.has_gan).to(self.device).eval()
        if start is not None:
            self._load_networks(start)
        self.average = Average(self.generator, train.ema_decay)
        self.guard = FiniteGuard(self.device)
        self._generator_descent = self._descent(self.generator, train.generator_learning_rate)
        self._critic_descent = self._descent(self.critic, train.critic_learning_rate)

    def _descent(self, network: torch.nn.Module, learning_rate: float) -> Descent:
        train = self.train
        return Descent(
            list(network.parameters()),
            learning_rate=learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
            rate=warmup(train.warmup_iterations),
        )

    def step(self, index: int) -> dict[str, Tensor]:
        """Iteration `index`, from 0 (paper, algorithm 1): every R-th moves the generator, each one the critic.

        The critic trains on the images that the generator made before its update. Returns scalars for the log, on
        the device; a function of (seed, index, rank) and the networks, so that a resumed run repeats it exactly.
        """
        train = self.train
        rng = step_rng(train.seed, index, distributed.rank(), device=self.device)
        update_generator = index % train.critic_steps_per_generator == 0

        x, sigma, cond = self._generator_input(index, rng)
        with torch.set_grad_enabled(update_generator):
            x0 = self.generator(x, sigma, cond)

        metrics: dict[str, Tensor] = {}
        if update_generator:
            grad, metrics = self._generator_gradient(x0.detach(), cond, rng)
            x0.backward(grad)
            terms = {name: metrics[name] for name in metrics if name.endswith("_loss")}
            if train.regression_weight > 0:
                terms["regression_loss"] = metrics["regression_loss"] = self._add_regression(index)
            norm = self._generator_descent.step(index, self.guard, terms, "generator_grad_norm")
            self.average.update()
            metrics |= {"generator_grad_norm": norm, **_describe(x0.detach())}

        losses = objective.critic_losses(
            x0.detach(), cond, lambda: self._real_batch(index), self.teacher, self.critic, train, rng
        )
        losses.total.backward()
        terms = {"denoising_loss": losses.denoising.loss.detach()}
        if losses.gan is not None:
            terms["gan_critic_loss"] = losses.gan.loss.detach()
            metrics["d_accuracy"] = 0.5 * ((losses.gan.p_data > 0.5).float() + (losses.gan.p_gen < 0.5).float()).mean()
        norm = self._critic_descent.step(index, self.guard, terms, "critic_grad_norm")
        return metrics | terms | {"critic_grad_norm": norm} | self._lag(index, terms["denoising_loss"])

    def _generator_input(self, index: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """(x, sigma, conditions): pure noise for one step; for several, the student's own input at a step that all
        ranks draw alike."""
        train, grid = self.train, self.teacher.grid
        shape = (self.batch_size, *self.teacher.sample_shape)
        if train.num_steps > 1 and not train.backward_simulation:
            return self._noised_data(index, rng)
        cond = move(self.teacher.conditioner.draw(self.batch_size, rng), self.device)
        shared = step_rng(train.seed, index, SHARED)
        k = int(torch.randint(train.num_steps, (), generator=shared))
        x, sigma = sampling.simulate(self.generator, cond, self._sigmas, grid.init_scale, k, lambda: normal(shape, rng))
        return x, sigma, cond

    def _noised_data(self, index: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """Without backward simulation: noised real samples with their own conditions, at a step of their own each;
        pure noise at the first."""
        x0, cond = self._real_batch(index)
        eps = normal(x0.shape, rng)
        k = torch.randint(self.train.num_steps, (x0.shape[0],), generator=rng, device=self.device)
        sigma = torch.tensor(self._sigmas, device=self.device)[k]
        pure = self.teacher.grid.init_scale * eps
        return torch.where(expand(k == 0, x0), pure, add_noise(x0, sigma, eps)), sigma, cond

    def _generator_gradient(self, x0: Tensor, cond: Cond, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of matching and GAN losses on the images x0, and what the log wants of them."""
        train = self.train
        grad = torch.zeros_like(x0)
        metrics: dict[str, Tensor] = {}
        if train.matching_weight > 0:
            matching, matching_grad = objective.matching_gradient(x0, cond, self.teacher, self.critic, train, rng)
            grad += train.matching_weight * matching_grad
            metrics |= {"matching_loss": matching.loss, "num_nonfinite": matching.num_nonfinite.sum().float()}
        if train.has_gan:
            gan_loss, gan_grad = objective.gan_gradient(x0, cond, self.teacher, self.critic, train, rng)
            gan_grad = train.gan_generator_weight * gan_grad
            if train.matching_weight > 0:
                metrics["gan_to_matching_ratio"] = gan_grad.norm() / grad.norm()
            grad += gan_grad
            metrics["gan_generator_loss"] = gan_loss
        return grad, metrics

    def _add_regression(self, index: int) -> Tensor:
        """Original DMD's regression on pairs: adds its gradient to the generator's; the loss (), unweighted."""
        assert self._pairs is not None
        noise, target, cond = self._pairs(index)
        sigma = torch.full((noise.shape[0],), self._sigmas[0], device=self.device)
        x0 = self.generator(self.teacher.grid.init_scale * noise.to(self.device), sigma, move(cond, self.device))
        loss = torch.nn.functional.mse_loss(x0, target.to(self.device))
        (self.train.regression_weight * loss).backward()
        return loss.detach()

    def _real_batch(self, index: int) -> tuple[Tensor, Cond]:
        assert self._data is not None
        x0, cond = self._data(index)
        return x0.to(self.device, non_blocking=True), move(cond, self.device)

    def _lag(self, index: int, denoising: Tensor) -> dict[str, Tensor]:
        """The critic's loss on the first and on the last iteration between two generator updates."""
        period = self.train.critic_steps_per_generator
        if period == 1:
            return {}
        phase = index % period
        name = {1: "denoising_loss_after_update", 0: "denoising_loss_before_update"}.get(phase)
        return {name: denoising} if name else {}

    def export(self) -> dict[str, Tensor]:
        """The generator to sample with: its average, or its weights where the run keeps none."""
        return self.average.weights()

    def networks(self) -> dict[str, Tensor]:
        """Generator and critic as they are, for a run that goes on from this one."""
        return {
            **{f"generator.{k}": v for k, v in self.generator.state_dict().items()},
            **{f"critic.{k}": v for k, v in self.critic.state_dict().items()},
        }

    def _load_networks(self, start: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in start.items() if k.startswith(prefix)}

        self.generator.load_state_dict(part("generator."))
        self.critic.fake.load_state_dict(part("critic.fake."))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the step number."""
        return {
            "networks": self.networks(),
            "average": self.average.state_dict(),
            "generator_optimizer": self._generator_descent.state_dict(),
            "critic_optimizer": self._critic_descent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; every key must fit."""
        networks = state["networks"]
        self.generator.load_state_dict({k[10:]: v for k, v in networks.items() if k.startswith("generator.")})
        self.critic.load_state_dict({k[7:]: v for k, v in networks.items() if k.startswith("critic.")})
        self.average.load_state_dict(state["average"])
        self._generator_descent.load_state_dict(state["generator_optimizer"])
        self._critic_descent.load_state_dict(state["critic_optimizer"])


def _describe(x0: Tensor) -> dict[str, Tensor]:
    """Health of generated images x0 (B, ...): brightness, saturation, and how close neighbours have moved.

    `neighbour_ratio` is the mean distance to the nearest other sample of the batch over the mean distance of all
    pairs: it falls towards 0 when a generator collapses to a few images.
    """
    distances = torch.cdist(x0.flatten(1), x0.flatten(1))
    num = x0.shape[0]
    health = {"brightness": x0.mean(), "saturated": (x0.abs() > 1).float().mean()}
    if num > 1:
        nearest = (distances + torch.diag(torch.full((num,), float("inf"), device=x0.device))).min(dim=1).values
        health["neighbour_ratio"] = nearest.mean() / (distances.sum() / (num * (num - 1))).clamp(min=1e-12)
    return health
