"""Trains a small teacher for data sets that have no released one.

A class-conditional one as EDM (Karras et al. 2022, section 5): log-normal sigma and EDM's weights. A text-to-image
one as Stable Diffusion (Rombach et al. 2022): uniform levels, the epsilon loss, and some captions replaced by the null
input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmd2.config import DiffusersTraining, TeacherTraining
from dmd2.method.denoiser import Cond, Teacher
from dmd2.method.inputs import Batches
from dmd2.method.noise import add_noise, critic_weight, expand
from dmd2.training import sharding
from dmd2.training.micro_batches import BatchReader, MicroBatches, means
from dmd2.training.optimizer import EMA, FiniteGuard, Optimizer, warmup_decay
from dmd2.training.rng import normal
from dmd2_kernels import denoising_loss


class TeacherFit:
    """A teacher in training: network, optimizer and EMA."""

    def __init__(
        self,
        teacher: Teacher,
        training: TeacherTraining,
        data: Batches,
        *,
        micro_batch_size: int | None = None,
        layout: sharding.Layout = "replicate",
        device: torch.device | str = "cpu",
    ):
        self.training = training
        self.device = torch.device(device)
        self.micro_batches = MicroBatches.of(training.batch_size, micro_batch_size)
        self._data = BatchReader(data, self.micro_batches, self.device)
        on_device = teacher.to(self.device)
        self._conditioner, self._grid = on_device.conditioner, on_device.grid
        self.sigma_data = teacher.sigma_data
        self.network = teacher.copy_network().to(self.device)
        sharding.place(self.network, layout)
        self.ema = EMA(self.network, training.ema_decay)
        self.guard = FiniteGuard(self.device)
        self._optimizer = Optimizer(
            self.network,
            learning_rate=training.learning_rate,
            betas=training.betas,
            weight_decay=0.0,
            grad_clip=training.grad_clip,
            rate=warmup_decay(
                training.warmup_iterations, training.iterations, training.decay_from, training.final_rate
            ),
        )

    def step(self, index: int) -> dict[str, Tensor]:
        """Iteration `index`: one update on the weighted denoising loss at log-normal sigma; returns log scalars."""
        terms = means([self._add_loss(index, micro_batch) for micro_batch in range(self.micro_batches.num)])
        norm = self._optimizer.step(index, self.guard, terms, "grad_norm")
        self.ema.update()
        return {**terms, "grad_norm": norm}

    def _add_loss(self, index: int, micro_batch: int) -> dict[str, Tensor]:
        """The loss () of one micro-batch; accumulates its gradient."""
        training = self.training
        rng = self.micro_batches.rng(training.seed, index, micro_batch, self.device)
        # The network's dropout draws from torch's global generator; its stream must not be that of the noise.
        torch.manual_seed(rng.initial_seed() ^ 0x5DEECE66D)
        x0, tokens = self._data(index, micro_batch)
        cond = self._conditioner.embed(tokens)
        if isinstance(training, DiffusersTraining):
            sigma = self._grid.draw(x0.shape[0], 0, len(self._grid) - 1, rng)
            cond = self._with_nulls(cond, torch.rand(x0.shape[0], generator=rng, device=self.device))
        else:
            sigma = (training.p_mean + training.p_std * normal((x0.shape[0],), rng)).exp()
        x = add_noise(x0, sigma, normal(x0.shape, rng))
        loss = denoising_loss(self.network(x, sigma, cond), x0, critic_weight(sigma, self.sigma_data)).loss
        with self._optimizer.accumulating(last=self.micro_batches.is_last(micro_batch)):
            (loss / self.micro_batches.num).backward()
        return {"denoising_loss": loss.detach()}

    def _with_nulls(self, cond: Cond, draws: Tensor) -> Cond:
        """The conditions with the null input where a uniform draw (B,) is below the caption dropout."""
        assert isinstance(self.training, DiffusersTraining)
        null = self._conditioner.null(cond)
        assert null is not None  # text-to-image teachers have one
        dropped = draws < self.training.caption_dropout
        return {name: torch.where(expand(dropped, value), null[name], value) for name, value in cond.items()}

    def export(self) -> dict[str, Tensor]:
        """The EMA weights: the teacher."""
        return self.ema.weights()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs except the step number."""
        return {
            "network": self.network.state_dict(),
            "average": self.ema.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
