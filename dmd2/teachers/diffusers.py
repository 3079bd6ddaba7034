"""Latent text-to-image teachers: a U-Net of diffusers with its autoencoder and text encoders.

Shapes: (c, h, w) one latent.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.config import Data, DiffusersTeacherConfig, OwnNetwork
from dmd2.downloads.hub import resolve
from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.method.denoiser import Teacher
from dmd2.method.noise import NoiseGrid
from dmd2.teachers.autoencoder import AutoencoderCodec
from dmd2.teachers.diffusers_folder import check_components, load_autoencoder, load_text, weight_files
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, build_unet
from dmd2.teachers.predictions import FLOW
from dmd2.teachers.text_encoder import TextConditioner, TextShape
from dmd2.teachers.unet_configs import same_config, unet_config
from dmd2.teachers.weights import check_state, read_weights


def noise_grid(teacher: DiffusersTeacherConfig) -> NoiseGrid:
    """The teacher's noise levels: the scaled-linear schedule, or those of flow matching's straight path.

    Flow matching has t_i = (i + 1/2) / T, without t = 1, where sigma = t / (1 - t) is infinite. Its pure noise is a
    unit Gaussian in the network's input: (1 + sigma) * eps.
    """
    if teacher.prediction != FLOW:
        return NoiseGrid.ddpm(teacher.num_levels, teacher.beta_start, teacher.beta_end)
    with torch.device("cpu"):
        t = (torch.arange(teacher.num_levels, dtype=torch.float64) + 0.5) / teacher.num_levels
    sigmas = (t / (1 - t)).float()
    return NoiseGrid(sigmas, 1 + float(sigmas[-1]))


def _settings(teacher: DiffusersTeacherConfig, data: Data) -> tuple[dict[str, Any], TextShape]:
    """The U-Net's configuration, checked against the data's size, and the text that it attends to."""
    config = unet_config({**teacher.network, **(teacher.own.network if teacher.own else {})})
    size = data.resolution // teacher.latent_factor
    config.setdefault("sample_size", size)
    if data.resolution % teacher.latent_factor or config["sample_size"] != size:
        raise UserError(
            f"teacher.network.sample_size: {config['sample_size']}, but images of {data.resolution} pixels have "
            f"latents of {data.resolution / teacher.latent_factor:g}; correct data.resolution, latent_factor or "
            f"sample_size"
        )
    if config.setdefault("in_channels", 4) != teacher.latent_channels:
        raise UserError(
            f"teacher.latent_channels: {teacher.latent_channels}, but the U-Net has in_channels {config['in_channels']}"
        )
    width = int(config.get("cross_attention_dim", 1280))
    if config.get("addition_embed_type") != "text_time":
        return config, TextShape(width)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return config, TextShape(width, pooled)


def latent_space(
    teacher: DiffusersTeacherConfig, data: Data, components: Path | None = None
) -> tuple[AutoencoderCodec, TextConditioner]:
    """The codec and the conditioner of a components folder; without one those of a plan, which have no networks."""
    _, shape = _settings(teacher, data)
    options: dict[str, Any] = {"min_psnr": teacher.min_psnr, "posterior_seed": teacher.posterior_seed}
    size = (teacher.own and teacher.own.time_ids_size) or data.resolution
    time_ids = (size, size, 0, 0, size, size)  # original size, crop, target size (arXiv 2307.01952, section 2.2)
    if components is None:
        return AutoencoderCodec(None, data, **options), TextConditioner(shape, null=teacher.null, time_ids=time_ids)
    pooled = shape.pooled is not None
    check_components(components, teacher, data, pooled, shape.width)
    tokenizers, encoders = load_text(components, pooled)
    conditioner = TextConditioner(shape, tokenizers, encoders, null=teacher.null, time_ids=time_ids)
    return AutoencoderCodec(load_autoencoder(components), data, **options), conditioner


def load_diffusers(
    teacher: DiffusersTeacherConfig,
    data: Data,
    weights: Path | None,
    *,
    seed: int = 0,
    components: Path | None = None,
) -> Teacher:
    """The teacher with float32 weights, its codec and its conditioner.

    The U-Net's weights come from the file or the `unet` folder `weights`, or else from the configured model folder,
    which then also has the components; without either they are initialised from `seed`. Raises UserError for a model
    that is missing, damaged or another one than configured.
    """
    config, _ = _settings(teacher, data)
    state: dict[str, Tensor] | None
    where = str(weights)
    if weights is None and teacher.weights is not None:
        folder = resolve(teacher.weights)
        state = read_unet(folder, config, teacher.weights.variant)
        components, where = components or folder, str(folder / "unet")
    else:
        state = None if weights is None else read_weights(weights)
    codec, conditioner = latent_space(teacher, data, components)
    grid = noise_grid(teacher)
    own = teacher.own or OwnNetwork()
    denoiser = _denoiser(config, grid, own.prediction or teacher.prediction, own.embedded_guidance, state, seed, where)
    return Teacher(
        denoiser=denoiser.eval().requires_grad_(False),
        grid=grid,
        codec=codec,
        conditioner=conditioner,
        sample_shape=denoiser.sample_shape,
        sigma_data=None,
        storage=teacher.storage,
    )


def import_unet(teacher: DiffusersTeacherConfig, data: Data) -> tuple[dict[str, Tensor], list[Path]]:
    """The state dict of the U-Net in the configured model folder, and the files that it was read from.

    Its values have the files' dtypes. Raises UserError if it is not there, or is another network than configured.
    """
    assert teacher.weights is not None
    config, _ = _settings(teacher, data)
    folder, variant = resolve(teacher.weights), teacher.weights.variant
    return read_unet(folder, config, variant), weight_files(folder, "unet", variant)


def read_unet(folder: Path, config: dict[str, Any], variant: str | None = None) -> dict[str, Tensor]:
    """The state dict of the U-Net in a model folder. Raises UserError if it is another network than `config`."""
    same_config(read_json(folder / "unet" / "config.json"), config, str(folder / "unet" / "config.json"))
    state: dict[str, Tensor] = {}
    for path in weight_files(folder, "unet", variant):
        state |= read_weights(path)
    return state


def _denoiser(
    config: dict[str, Any],
    grid: NoiseGrid,
    prediction: str,
    embedded_guidance: float | None,
    state: dict[str, Tensor] | None,
    seed: int,
    where: str,
) -> DiffusersDenoiser:
    sigmas = grid.sigmas.to(torch.get_default_device())
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DiffusersDenoiser(build_unet(config), sigmas, prediction, embedded_guidance=embedded_guidance)
    with torch.device("meta"):
        unet = build_unet(config)
    check_state(state, unet.state_dict(), where)
    if bad := [name for name, value in state.items() if not math.isfinite(value.float().sum().item())]:
        raise UserError(f"{where}: {len(bad)} weights contain NaN or infinity, the first {bad[0]}; fetch it again")
    unet.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return DiffusersDenoiser(unet, sigmas, prediction, embedded_guidance=embedded_guidance)
