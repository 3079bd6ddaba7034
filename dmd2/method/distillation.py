"""DMD2 training: the networks and the training step (paper, algorithm 1).

Shapes: B samples of one micro-batch (see `training.micro_batches`), `...` the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmd2.config import Train
from dmd2.method import losses, sampling
from dmd2.method.critic import Critic
from dmd2.method.denoiser import Cond, Denoiser, Teacher, move
from dmd2.method.diagnostics import describe
from dmd2.method.inputs import Batches, Distance, Networks, PairBatches, Prompts, check_inputs, part_of
from dmd2.method.noise import add_noise, expand
from dmd2.training import sharding
from dmd2.training.micro_batches import BatchReader, MicroBatches, means
from dmd2.training.optimizer import EMA, FiniteGuard, Optimizer, warmup
from dmd2.training.post_hoc_ema import ema_suffix, power_decay
from dmd2.training.rng import normal, shared_choice


class Generated(NamedTuple):
    """The generated images of one micro-batch, and its random generator for the terms that follow."""

    x0: Tensor  # (B, ...), detached
    cond: Cond
    rng: torch.Generator


class Distillation:
    """A student in training: generator, critic, their optimizers and the generator's EMA.

    `data` and `pairs` are read only if a loss term needs them. `prompts` are the labels to generate samples for;
    without them the teacher's conditioner draws classes. `networks` are trained in place of copies of the teacher's.
    `start` are the networks of another run to initialise from (`generator.*`, `critic.fake.*`), with new optimizers
    and realism heads. `micro_batch_size` enables gradient accumulation. Raises UserError as `check_inputs` does.
    """

    def __init__(
        self,
        teacher: Teacher,
        train: Train,
        *,
        data: Batches | None = None,
        pairs: PairBatches | None = None,
        prompts: Prompts | None = None,
        networks: Networks | None = None,
        regression_distance: Distance = torch.nn.functional.mse_loss,
        start: Mapping[str, Tensor] | None = None,
        micro_batch_size: int | None = None,
        layout: sharding.Layout = "replicate",
        device: torch.device | str = "cpu",
    ):
        check_inputs(
            teacher, train, has_data=data is not None, has_pairs=pairs is not None, has_prompts=prompts is not None
        )
        self.train = train
        self.device = torch.device(device)
        self.teacher = teacher.to(self.device)
        self.micro_batches = MicroBatches.of(train.batch_size, micro_batch_size)
        self._data = BatchReader(data, self.micro_batches, self.device) if data is not None else None
        self._pairs = BatchReader(pairs, self.micro_batches, self.device) if pairs is not None else None
        self._prompts = BatchReader(prompts, self.micro_batches, self.device) if prompts is not None else None
        self._regression_distance = regression_distance
        self.steps = teacher.grid.student_steps(train.num_steps, train.student_levels)
        self._sigma_table = torch.tensor(self.steps.sigmas, device=self.device)
        with torch.random.fork_rng(devices=[]):  # the realism heads' initial weights
            torch.manual_seed(train.seed)
            # eval(): DMD2 uses no dropout, even if the teacher was trained with it.
            # One network after the other is sharded, so that a device never holds three whole ones.
            generator = teacher.copy_network() if networks is None else networks.generator
            self.generator: Denoiser = generator.to(self.device).eval()
            if start is not None:
                self.generator.load_state_dict(part_of(start, "generator."))
            sharding.place(self.generator, layout if self.generator.shardable else "replicate")
            num_taps = train.gan_taps if train.has_gan else 0
            fake = teacher.copy_network() if networks is None else networks.fake
            self.critic = Critic(fake, num_taps=num_taps).to(self.device).eval()
            if start is not None:
                self.critic.fake.load_state_dict(part_of(start, "critic.fake."))
            sharding.place(self.critic, layout if fake.shardable else "replicate")
        for denoiser in (self.teacher.denoiser, self.generator, self.critic.fake):
            denoiser.precision = train.precision
        self._merged = None if networks is None else networks.merged
        if self.teacher.denoiser.shardable:
            self.teacher.denoiser.store(teacher.storage)
            sharding.place(self.teacher.denoiser, layout, entry_points=("denoise_and_tap", "predict_and_tap"))
        self.ema = EMA(self.generator, train.ema_decay)
        self._averages = {width: EMA(self.generator, power_decay(width)) for width in train.ema_lengths or ()}
        self.guard = FiniteGuard(self.device)
        self._generator_optimizer = self._optimizer(self.generator, train.generator_learning_rate)
        self._critic_optimizer = self._optimizer(self.critic, train.critic_learning_rate)

    def _optimizer(self, network: torch.nn.Module, learning_rate: float) -> Optimizer:
        train = self.train
        return Optimizer(
            network,
            learning_rate=learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
            rate=warmup(train.warmup_iterations),
        )

    def rates(self, index: int) -> tuple[float, float]:
        """The generator's and the critic's learning rate at iteration `index`."""
        return self._generator_optimizer.rate_at(index), self._critic_optimizer.rate_at(index)

    def step(self, index: int) -> dict[str, Tensor]:
        """Iteration `index`, from 0 (paper, algorithm 1): every R-th updates the generator, each one the critic.

        The critic trains on the images that the generator made before its update. With `turns: disjoint` it is not
        updated when the generator is. Returns scalars () for the log, on the device, means over the micro-batches; a
        function of (seed, index, rank) and the networks, so that a resumed run repeats it exactly.
        """
        if not self.train.has_critic:
            return self._regression_step(index)
        moves_generator = index % self.train.critic_steps_per_generator == 0
        moves_critic = self.train.turns == "both" or not moves_generator
        regresses = self.train.regression_weight > 0

        made: list[Generated] = []
        rows: list[dict[str, Tensor]] = []
        for micro_batch in range(self.micro_batches.num):
            rng = self.micro_batches.rng(self.train.seed, index, micro_batch, self.device)
            x, sigma, cond = self._generator_input(index, micro_batch, rng)
            with torch.set_grad_enabled(moves_generator):
                x0 = self.generator(x, sigma, cond)
            made.append(Generated(x0.detach(), cond, rng))
            if moves_generator:
                grad, metrics = self._generator_gradient(made[micro_batch])
                with self._generator_optimizer.accumulating(
                    last=self.micro_batches.is_last(micro_batch) and not regresses
                ):
                    x0.backward(grad / self.micro_batches.num)
                if regresses:
                    metrics["regression_loss"] = self._add_regression(index, micro_batch)
                in_pixels = self.teacher.codec.min_psnr is None
                rows.append(metrics | describe(made[micro_batch].x0, in_pixels=in_pixels))
        metrics = {}
        if moves_generator:
            metrics = self._update(self._generator_optimizer, index, means(rows), "generator_grad_norm")
            self._update_averages()

        if moves_critic:
            rows = [
                self._add_critic_losses(index, micro_batch, made[micro_batch])
                for micro_batch in range(self.micro_batches.num)
            ]
            metrics |= self._update(self._critic_optimizer, index, means(rows), "critic_grad_norm")
            metrics |= self._lag(index, metrics["denoising_loss"])
        return metrics

    def _regression_step(self, index: int) -> dict[str, Tensor]:
        """An iteration of a run that only regresses on pairs: every R-th updates the generator; the critic stays."""
        if index % self.train.critic_steps_per_generator:
            return {}
        rows = [{"regression_loss": self._add_regression(index, number)} for number in range(self.micro_batches.num)]
        metrics = self._update(self._generator_optimizer, index, means(rows), "generator_grad_norm")
        self._update_averages()
        return metrics

    def _update_averages(self) -> None:
        for average in (self.ema, *self._averages.values()):
            average.update()

    def _update(self, optimizer: Optimizer, index: int, metrics: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
        """Optimizer step, skipped if a loss or the gradient is not finite; returns `metrics` with the gradient norm."""
        terms = {name: value for name, value in metrics.items() if name.endswith("_loss")}
        return metrics | {norm: optimizer.step(index, self.guard, terms, norm)}

    def _generator_input(self, index: int, micro_batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """(x, sigma, conditions): pure noise for a one-step student; else the student's own input at a step index
        that is the same on all ranks and micro-batches."""
        train = self.train
        shape = (self.micro_batches.size, *self.teacher.sample_shape)
        if train.num_steps > 1 and not train.backward_simulation:
            return self._noised_real_input(index, micro_batch, rng)
        cond = self._drawn(index, micro_batch, rng)
        k = shared_choice(train.seed, index, train.num_steps)
        x, sigma = sampling.simulate(self.generator, cond, self.steps, k, lambda: normal(shape, rng))
        return x, sigma, cond

    def _drawn(self, index: int, micro_batch: int, rng: torch.Generator) -> Cond:
        """Conditions to generate samples for: of the next prompts, or of random classes."""
        if self._prompts is not None:
            _, tokens = self._prompts(index, micro_batch)
            return self.teacher.conditioner.embed(tokens)
        drawn = self.teacher.conditioner.draw(self.micro_batches.size, rng)
        assert drawn is not None  # checked at the start
        return self.teacher.conditioner.embed(move(drawn, self.device))

    def _noised_real_input(self, index: int, micro_batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """Without backward simulation: noised real samples with their own conditions, at a random step per sample;
        pure noise at the first step."""
        x0, cond = self._real(index, micro_batch)
        eps = normal(x0.shape, rng)
        k = torch.randint(self.train.num_steps, (x0.shape[0],), generator=rng, device=self.device)
        sigma = self._sigma_table[k]
        pure = self.steps.init_scale * eps
        return torch.where(expand(k == 0, x0), pure, add_noise(x0, sigma, eps)), sigma, cond

    def _generator_gradient(self, made: Generated) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient (B, ...) of matching and GAN losses with respect to the images, and scalars for the log."""
        train, (x0, cond, rng) = self.train, made
        matching, gan = losses.generator_terms(x0, cond, self.teacher, self.critic, train, rng)
        grad = torch.zeros_like(x0) if matching is None else matching[1]
        metrics: dict[str, Tensor] = {}
        if matching is not None:
            sums = matching[0]
            metrics |= {"matching_loss": sums.loss, "num_nonfinite": sums.nonfinite.sum().float()}
        if gan is not None:
            metrics["gan_generator_loss"] = gan[0].loss
            gan_grad = train.gan_generator_weight * gan[1]
            if matching is not None:
                metrics["gan_to_matching_ratio"] = gan_grad.norm() / grad.norm()
            grad += gan_grad
        return grad, metrics

    def _add_regression(self, index: int, micro_batch: int) -> Tensor:
        """The regression loss of DMD on pairs: accumulates its gradient; returns the unweighted loss ()."""
        assert self._pairs is not None
        noise, target, tokens = self._pairs(index, micro_batch)
        sigma = torch.full((noise.shape[0],), self.steps.sigmas[0], device=self.device)
        x0 = self.generator(self.steps.init_scale * noise, sigma, self.teacher.conditioner.embed(tokens))
        loss = self._regression_distance(x0, target)
        with self._generator_optimizer.accumulating(last=self.micro_batches.is_last(micro_batch)):
            (self.train.regression_weight / self.micro_batches.num * loss).backward()
        return loss.detach()

    def _add_critic_losses(self, index: int, micro_batch: int, made: Generated) -> dict[str, Tensor]:
        """Fake-score and discriminator losses on generated images; accumulates their gradient."""
        x0, cond, rng = made
        real = partial(self._real, index, micro_batch)
        share = 1 / self.micro_batches.num
        terms = losses.critic_losses(x0, cond, real, self.teacher, self.critic, self.train, rng, share)
        with self._critic_optimizer.accumulating(last=self.micro_batches.is_last(micro_batch)):
            terms.backward()
        metrics = {"denoising_loss": terms.denoising.loss}
        if terms.gan is not None:
            metrics |= {"gan_critic_loss": terms.gan.loss, "d_accuracy": terms.gan.accuracy}
        return metrics

    def _real(self, index: int, micro_batch: int) -> tuple[Tensor, Cond]:
        assert self._data is not None
        x0, tokens = self._data(index, micro_batch)
        return x0, self.teacher.conditioner.embed(tokens)

    def _lag(self, index: int, denoising: Tensor) -> dict[str, Tensor]:
        """The critic's loss at its first and last update between two generator updates."""
        period = self.train.critic_steps_per_generator
        if period == 1:
            return {}
        first, last = 1, 0 if self.train.turns == "both" else period - 1
        names = {"denoising_loss_after_update": first, "denoising_loss_before_update": last}
        return {name: denoising for name, phase in names.items() if index % period == phase}

    def export(self) -> dict[str, Tensor]:
        """The generator to sample with: its EMA weights, or its weights if the run has no EMA."""
        return (self._merged or dict)(self.ema.weights())

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """The generator's power-function averages, by the suffix of their files (`ema_suffix`)."""
        return {ema_suffix(width): (self._merged or dict)(a.weights()) for width, a in self._averages.items()}

    def networks(self) -> dict[str, Tensor]:
        """State dicts of generator and critic, for a run that starts from this one."""
        return {
            **{f"generator.{k}": v for k, v in self.generator.state_dict().items()},
            **{f"critic.{k}": v for k, v in self.critic.state_dict().items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs except the step number."""
        return {
            "networks": self.networks(),
            "average": self.ema.state_dict(),
            **({"averages": [a.state_dict() for a in self._averages.values()]} if self._averages else {}),
            "generator_optimizer": self._generator_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; every key must match."""
        networks = state["networks"]
        self.generator.load_state_dict(part_of(networks, "generator."))
        self.critic.load_state_dict(part_of(networks, "critic."))
        self.ema.load_state_dict(state["average"])
        for average, stored in zip(self._averages.values(), state.get("averages", []), strict=True):
            average.load_state_dict(stored)
        self._generator_optimizer.load_state_dict(state["generator_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
