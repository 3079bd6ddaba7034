"""Training batches: a rank's share of latents and pairs, read from shards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmd2.datasets.loader import Loader, to_batch, to_pairs
from dmd2.datasets.prompts import PromptStream, load_prompts
from dmd2.datasets.shards import read_manifest
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Cond, Teacher
from dmd2.method.inputs import Batches, PairBatches, Prompts
from dmd2.training import ranks


def data_batches(
    spec: Spec, manifest: Path, teacher: Teacher, batch_size: int, seed: int, device: torch.device
) -> Batches:
    """Batches of real samples: (x0 in the teacher's space, conditions)."""
    _check_autoencoder(spec, manifest, teacher)
    loader = _loader(spec, "latents", manifest, batch_size, seed)

    def batch(index: int) -> tuple[Tensor, Cond]:
        x0, cond = to_batch(loader.batch(index), teacher.codec)
        return _staged(x0, device), {name: _staged(value, device) for name, value in cond.items()}

    return batch


def _check_autoencoder(spec: Spec, manifest: Path, teacher: Teacher) -> None:
    """Raises UserError for latents that another autoencoder than the teacher's made."""
    facts = read_manifest(manifest, spec.upstream["latents"])["facts"]
    own = getattr(teacher.codec, "facts", {})
    for key, have in facts.items():
        if key in own and own[key] != have:
            raise UserError(
                f"{manifest}: latents with {key} {have}, but the teacher's autoencoder has {own[key]}; delete the "
                f"latents, or put the autoencoder back that made them"
            )


def pair_batches(spec: Spec, manifest: Path, batch_size: int, seed: int, device: torch.device) -> PairBatches:
    """Batches of (noise, the teacher's x0, conditions), shuffled with `seed` + 1, unlike the real samples."""
    loader = _loader(spec, "pairs", manifest, batch_size, seed + 1)

    def batch(index: int) -> tuple[Tensor, Tensor, Cond]:
        noise, x0, cond = to_pairs(loader.batch(index))
        staged = {name: _staged(value, device) for name, value in cond.items()}
        return _staged(noise, device), _staged(x0, device), staged

    return batch


def prompt_batches(spec: Spec, teacher: Teacher, batch_size: int, seed: int, device: torch.device) -> Prompts | None:
    """Batches of prompts to generate samples for, shuffled with `seed` + 2; None for a teacher of classes."""
    if spec.prompts is None:
        return None
    share = ranks.local_share(batch_size)
    tokenize = teacher.conditioner.tokenize
    stream = PromptStream(load_prompts(spec.prompts), tokenize, share, seed + 2, ranks.rank(), ranks.world_size())

    def batch(index: int) -> tuple[Tensor, Cond]:
        ids, tokens = stream(index)
        return _staged(ids, device), {name: _staged(value, device) for name, value in tokens.items()}

    return batch


def _loader(spec: Spec, upstream: str, manifest: Path, batch_size: int, seed: int) -> Loader:
    """The loader of this rank's batches of a set."""
    return Loader(
        manifest,
        batch_size=ranks.local_share(batch_size),
        seed=seed,
        rank=ranks.rank(),
        world=ranks.world_size(),
        digest=spec.upstream[upstream],
    )


def _staged(value: Tensor, device: torch.device) -> Tensor:
    """The tensor in pinned memory for asynchronous copies to a GPU; unchanged for a CPU."""
    return value.pin_memory() if device.type == "cuda" else value
