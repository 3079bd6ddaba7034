"""Roles of one tiny shared network with changed adapters, for the tests of adapters."""

import torch
from tiny_pipelines import LATENT, WIDTH, tiny_pipeline
from torch import Tensor

from dmd2 import config
from dmd2.method.noise import NoiseGrid
from dmd2.teachers.diffusers_unet import DiffusersDenoiser
from dmd2.teachers.lora import Role, merged, roles

GRID = NoiseGrid.ddpm()
LORA = {"student": config.LoRA(rank=2, alpha=1.0), "critic": config.LoRA(rank=3, alpha=6.0)}


def base(kind: str = "sd15") -> DiffusersDenoiser:
    return DiffusersDenoiser(tiny_pipeline(kind).unet.eval(), GRID.sigmas)


def shaken(role: Role, seed: int) -> Role:
    """The role with random second factors, as after some training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.2)
    return role


def made(kind: str = "sd15") -> dict[str, Role]:
    found = roles(base(kind), LORA)
    shaken(found["student"], 1)
    shaken(found["critic"], 2)
    return found


def batch(kind: str = "sd15") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    cond = {"text": torch.randn(2, 8, WIDTH if kind == "sd15" else 2 * WIDTH, generator=rng)}
    if kind == "sdxl":
        cond |= {"pooled": torch.randn(2, WIDTH, generator=rng), "time_ids": torch.full((2, 6), 16.0)}
    return torch.randn(2, *LATENT, generator=rng) * 3, GRID.sigmas[[249, 749]], cond


def alone(role: Role) -> DiffusersDenoiser:
    """An independent network with the role's adapters merged into its weights."""
    network = base()
    network.load_state_dict(merged(role))
    return network
