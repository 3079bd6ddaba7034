"""The interface of a teacher, implemented by the adapters in `teachers/`.

Shapes: B batch, `...` the shape of one sample in the network's space (C, H, W for images and latents).
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dmd2.method.noise import NoiseGrid, expand
from dmd2_kernels import LinearHead

VARIANTS = 64
"""Most compiled variants of one block (batch size, with or without gradients). A step needs about five."""

Cond = Mapping[str, Tensor]
"""Conditions of a batch by name, each tensor with the batch dimension first. Only adapters look inside."""


class Prediction(NamedTuple):
    """A network's output (B, ...) and its conversion to x0 = a * x + k * out; without a head `out` is x0 itself."""

    out: Tensor
    head: LinearHead | None = None

    def x0(self, x: Tensor) -> Tensor:
        """The x0 estimate (B, ...) at the network's input x (B, ...)."""
        return self.out if self.head is None else expand(self.head.a, x) * x + expand(self.head.k, x) * self.out.float()


class Denoiser(nn.Module, abc.ABC):
    """A network that estimates x0 from x = x0 + sigma * eps, with taps on its encoder.

    Inputs and outputs are float32, whatever precision the network computes in.
    """

    feature_shapes: tuple[tuple[int, int, int], ...]
    """(C, H, W) of the features of one sample that can be tapped: the bottleneck first, then ever finer levels."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The network's compute precision, if it supports several; may be changed between calls."""

    shardable: bool = True
    """Whether layout "shard" applies: not to one that shares its weights with others."""

    @property
    def predicts_x0(self) -> bool:
        """Whether `predict_and_tap` gives x0 itself, or a raw output with a linear head, for the loss kernels."""
        return True

    @abc.abstractmethod
    def denoise_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """x0 for the first `num_denoise` samples and the first `num_taps` features for all, in one encoder pass.

        x (B, ...), sigma (B,) -> x0 (num_denoise, ...), features[i] (B, *feature_shapes[i]). With num_denoise = 0
        the decoder is not run. Raises ValueError if num_taps > len(feature_shapes).
        """

    def predict_and_tap(
        self, x: Tensor, sigma: Tensor, cond: Cond, num_denoise: int, num_taps: int = 1
    ) -> tuple[Prediction, list[Tensor]]:
        """As `denoise_and_tap`, with the network's own prediction in place of x0."""
        x0, features = self.denoise_and_tap(x, sigma, cond, num_denoise, num_taps)
        return Prediction(x0), features

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Prediction:
        """The prediction of all samples, without taps."""
        if self.predicts_x0:
            return Prediction(self(x, sigma, cond))
        return self.predict_and_tap(x, sigma, cond, x.shape[0], num_taps=0)[0]

    def store(self, precision: Literal["fp32", "bf16"]) -> Denoiser:
        """Itself, with a frozen network's weights stored in a type. Raises ValueError if it supports only float32."""
        if precision != "fp32":
            raise ValueError(f"{type(self).__name__} is stored in fp32 only")
        return self

    def blocks(self) -> list[nn.Module]:
        """The units of compilation, activation checkpointing and sharding; empty for a small network.

        Each has a flag `recompute`: whether activation checkpointing is on.
        """
        return []

    def prepare(
        self, *, compile: bool = False, activation_checkpointing: bool = False, backend: str = "inductor"
    ) -> None:
        """Sets up compilation and activation checkpointing of the blocks, in place; the state dict does not change.

        Results are equal up to rounding with `compile`, bit for bit with `activation_checkpointing`. A copy of a
        network is not compiled. A block compiles once per batch size, with and without gradients; a graph break is an
        error, not a fallback.
        """
        for block in self.blocks():
            block.recompute = activation_checkpointing  # type: ignore[assignment]
            if compile:
                block.compile(
                    backend=backend, fullgraph=True, dynamic=False, isolate_recompiles=True, recompile_limit=VARIANTS
                )
        if compile:
            torch._dynamo.config.accumulated_recompile_limit = 64 * VARIANTS * len(self.blocks())

    def check_taps(self, num_taps: int) -> None:
        """Raises ValueError unless 0 <= num_taps <= len(feature_shapes)."""
        if not 0 <= num_taps <= len(self.feature_shapes):
            raise ValueError(f"{num_taps} taps requested; this network has {len(self.feature_shapes)}")

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The x0 estimate: (B, ...), (B,) -> (B, ...)."""
        return self.denoise_and_tap(x, sigma, cond, x.shape[0], num_taps=0)[0]


class Codec(Protocol):
    """Converts between 8-bit images, a compact storage form and the network's space."""

    min_psnr: float | None
    """Required PSNR in dB of decoded latents against their images; None: they must be equal."""

    def to(self, device: torch.device | str) -> Codec:
        """The same codec with its networks, if it has any, on `device`."""

    def encode(self, images: np.ndarray, ids: Sequence[int] | range) -> np.ndarray:
        """uint8 images (B, H, W, C) -> stored latents (B, ...), in the codec's storage dtype.

        A codec with a random encoding seeds it with the samples' `ids` (B,), so that it does not depend on the batch.
        """

    def load(self, stored: np.ndarray) -> Tensor:
        """Stored latents (B, ...) -> float32 x0 (B, ...)."""

    def decode(self, x0: Tensor, *, rounding: str = "round") -> np.ndarray:
        """x0 (B, ...) -> uint8 images (B, H, W, C); `rounding` is "round" (EDM) or "truncate" (DMD2)."""


class Conditioner(Protocol):
    """Converts the labels of a data set (classes, captions) to the network's conditions, in two steps.

    *Tokens* are small integer tensors, which data sets store; *conditions* are what the network takes.
    """

    def to(self, device: torch.device | str) -> Conditioner:
        """The same conditioner with its networks, if it has any, on `device`."""

    def tokenize(self, labels: Sequence[Any]) -> Cond:
        """The tokens of B class numbers or captions, on the CPU. Raises UserError for an unsuitable label."""

    def embed(self, tokens: Cond) -> Cond:
        """The network's conditions of a batch of tokens, on their device, without gradient."""

    def draw(self, num: int, rng: torch.Generator) -> Cond | None:
        """Tokens of `num` uniformly random classes to generate samples for in training; None: prompts are needed."""

    def null(self, cond: Cond) -> Cond | None:
        """The unconditional inputs for classifier-free guidance of a batch of conditions; None if there are none."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher: its denoiser, noise levels, codec and conditioner."""

    denoiser: Denoiser
    grid: NoiseGrid
    codec: Codec
    conditioner: Conditioner
    sample_shape: tuple[int, ...]
    sigma_data: float | None
    """EDM's data scale; None for epsilon-prediction teachers, whose critic weight is sigma^-2."""
    storage: Literal["fp32", "bf16"] = "fp32"
    """The type in which a training stores the frozen network's weights."""

    def copy_network(self) -> Denoiser:
        """A trainable copy of the denoiser in training mode: initialises a generator or a critic."""
        network = copy.deepcopy(self.denoiser)
        return network.train().requires_grad_(True)

    def to(self, device: torch.device | str) -> Teacher:
        """The same teacher with its networks and grid on `device`."""
        return dataclasses.replace(
            self,
            denoiser=self.denoiser.to(device),
            grid=self.grid.to(device),
            codec=self.codec.to(device),
            conditioner=self.conditioner.to(device),
        )


def move(cond: Cond, device: torch.device | str) -> dict[str, Tensor]:
    """The same conditions on `device`; asynchronous to a GPU."""
    return {name: value.to(device, non_blocking=torch.device(device).type == "cuda") for name, value in cond.items()}


def concat(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """Concatenates batches of conditions; all must have the same names."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def first(cond: Cond, num: int) -> dict[str, Tensor]:
    """The conditions of the first `num` samples."""
    return {name: value[:num] for name, value in cond.items()}


def guided(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, null: Cond | None, scale: float) -> Tensor:
    """Classifier-free guidance in x0: uncond + scale * (cond - uncond), as one batch of 2B; no guidance at scale 1.

    x (B, ...), sigma (B,) -> (B, ...). Guiding x0 equals guiding epsilon, as they are linear in each other (paper,
    section 4; DMD2 guides only the real score). Raises ValueError if scale != 1 and `null` is None.
    """
    if scale == 1.0:
        return denoiser(x, sigma, cond)
    if null is None:
        raise ValueError(f"guidance scale {scale} needs a teacher with unconditional inputs; use 1.0")
    both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), concat([null, cond]))
    x0_null, x0_cond = both.chunk(2)
    return torch.lerp(x0_null, x0_cond, scale)
