"""Small networks with every weight random, and states compared: what tests of several folders share.

`ToyDenoiser` is two convolutions, in any dtype, for questions about the method; `SIZES` is EDM's network, as small as
one with two levels and attention can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.method.denoiser import Cond, Denoiser, Teacher
from dmd2.method.noise import NoiseGrid, expand
from dmd2.teachers.pixels import ClassConditioner, PixelCodec

NUM_CLASSES = 3
SHAPE = (1, 4, 4)
SIGMA_DATA = 0.5
DIGEST = "0123456789abcdef"
SIZES: dict[str, Any] = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
}


class ToyDenoiser(Denoiser):
    """EDM's preconditioning around two convolutions; the features are the hidden layer, 4x4.

    With more `levels` there are further taps, each of twice the size and four channels more than the one before.
    """

    def __init__(self, seed: int, channels: int = 8, dropout: float = 0.0, levels: int = 1):
        super().__init__()
        self.feature_shapes = tuple((channels + 4 * i, 4 << i, 4 << i) for i in range(levels))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Conv2d(1, channels, 3, padding=1)
            self.label = nn.Embedding(NUM_CLASSES, channels)
            self.level = nn.Linear(1, channels)
            self.decoder = nn.Conv2d(channels, 1, 3, padding=1)
            self.finer = nn.ModuleList(nn.Conv2d(channels, shape[0], 1) for shape in self.feature_shapes[1:])
        self.dropout = nn.Dropout(dropout)

    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        self.check_taps(num_taps)
        dtype = self.encoder.weight.dtype
        x, sigma = x.to(dtype), sigma.to(dtype)
        total = sigma.square() + SIGMA_DATA**2
        embedding = self.label(cond["label"]) + self.level(sigma.log()[:, None] / 4)
        features = torch.tanh(self.encoder(x * expand(total.rsqrt(), x)) + embedding[:, :, None, None])
        features = self.dropout(features)
        x, sigma, total = x[:num_denoise], sigma[:num_denoise], total[:num_denoise]
        out = self.decoder(features[:num_denoise])
        x0 = expand(SIGMA_DATA**2 / total, x) * x + expand(sigma * SIGMA_DATA * total.rsqrt(), x) * out
        finer = [F.interpolate(conv(features), size=4 << i) for i, conv in enumerate(self.finer, start=1)]
        return x0, [features, *finer][:num_taps]


class NullLabels(ClassConditioner):
    """Class labels whose last class means "no class"."""

    def null(self, cond: Cond) -> Cond:
        return {"label": torch.full_like(cond["label"], self.num_classes - 1)}


def toy_teacher(seed: int = 0, *, guidable: bool = False, dropout: float = 0.0, levels: int = 1) -> Teacher:
    """A frozen teacher with random weights."""
    return Teacher(
        denoiser=ToyDenoiser(seed, dropout=dropout, levels=levels).eval().requires_grad_(False),
        grid=NoiseGrid.karras(),
        codec=PixelCodec(256, 1),
        conditioner=(NullLabels if guidable else ClassConditioner)(NUM_CLASSES),
        sample_shape=SHAPE,
        sigma_data=SIGMA_DATA,
    )


def labels(num: int) -> dict[str, Tensor]:
    return {"label": torch.arange(num) % NUM_CLASSES}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Call:
    """The inputs and the output of a call of a denoiser."""

    def __init__(self, inputs: tuple[Any, ...], output: Tensor):
        self.x, self.sigma, self.cond = (value for value in inputs[:3])
        self.output = output


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Call]]:
    """The calls of `network` within the block."""
    calls: list[Call] = []
    handle = network.register_forward_hook(lambda _, inputs, output: calls.append(Call(inputs, output)))
    try:
        yield calls
    finally:
        handle.remove()


def shaken(module: nn.Module, scale: float, seed: int) -> nn.Module:
    """The module with noise on every weight: EDM starts last layers at zero, so that nothing would reach the others."""
    with torch.no_grad():
        noise = rng(seed)
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return module


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """A nested state as leaves by path."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        return {name: state}
    return {key: leaf for part, value in items for key, leaf in flat(value, f"{name}/{part}").items()}


def assert_equal(one: Any, other: Any) -> None:
    """Equality to the last bit of two nested states."""
    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name], name
