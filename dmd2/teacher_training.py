"""Trains a small EDM teacher (Karras et al. 2022, section 5): for data sets whose teacher is made in the workflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmd2 import distributed
from dmd2.config import TeacherTraining
from dmd2.denoiser import Teacher, move
from dmd2.noise import add_noise, normal, step_rng
from dmd2.objective import critic_weight
from dmd2.optimization import Average, Descent, FiniteGuard, warmup_decay
from dmd2.training import Batches
from dmd2_kernels import denoising_loss


class TeacherFit:
    """A teacher in training: network, optimizer and average."""

    def __init__(
        self, teacher: Teacher, training: TeacherTraining, data: Batches, *, device: torch.device | str = "cpu"
    ):
        self.training, self._data = training, data
        self.device = torch.device(device)
        self.sigma_data = teacher.sigma_data
        self.network = teacher.copy_network().to(self.device)
        self.average = Average(self.network, training.ema_decay)
        self.guard = FiniteGuard(self.device)
        self._descent = Descent(
            list(self.network.parameters()),
            learning_rate=training.learning_rate,
            betas=training.betas,
            weight_decay=0.0,
            grad_clip=training.grad_clip,
            rate=warmup_decay(
                training.warmup_iterations, training.iterations, training.decay_from, training.final_rate
            ),
        )

    def step(self, index: int) -> dict[str, Tensor]:
        """Iteration `index`: the weighted denoising loss at log-normal noise levels, one update."""
        training = self.training
        rng = step_rng(training.seed, index, distributed.rank(), device=self.device)
        torch.manual_seed(rng.initial_seed())  # the network's dropout draws from torch's global generator
        x0, cond = self._data(index)
        x0 = x0.to(self.device, non_blocking=True)
        sigma = (training.p_mean + training.p_std * normal((x0.shape[0],), rng)).exp()
        x = add_noise(x0, sigma, normal(x0.shape, rng))
        x0_hat = self.network(x, sigma, move(cond, self.device))
        loss = denoising_loss(x0_hat, x0, critic_weight(sigma, self.sigma_data)).loss
        loss.backward()
        terms = {"denoising_loss": loss.detach()}
        norm = self._descent.step(index, self.guard, terms, "grad_norm")
        self.average.update()
        return {**terms, "grad_norm": norm}

    def export(self) -> dict[str, Tensor]:
        """The averaged network: the teacher."""
        return self.average.weights()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the step number."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._descent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._descent.load_state_dict(state["optimizer"])
