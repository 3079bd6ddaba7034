"""Training batches: a rank's share of latents and pairs, read from shards."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.datasets import read_manifest
from dmd2.datasets.loader import Loader, to_batch, to_pairs
from dmd2.datasets.prompts import PromptStream, load_prompts
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Cond, Teacher
from dmd2.method.inputs import Batches, PairBatches, Prompts
from dmd2.training import ranks

log = logging.getLogger(__name__)
PROBED = 10_000
"""Prompts whose length is examined at the start of a training."""


def data_batches(
    spec: Spec, manifest: Path, teacher: Teacher, batch_size: int, seed: int, device: torch.device
) -> Batches:
    """Batches of real samples: (x0 in the teacher's space, conditions). Raises UserError for another VAE's latents."""
    check_encoder(manifest, read_manifest(manifest, spec.upstream["latents"])["facts"], teacher.codec)
    loader = _loader(spec, "latents", manifest, batch_size, seed)

    def batch(index: int) -> tuple[Tensor, Cond]:
        x0, cond = to_batch(loader.batch(index), teacher.codec)
        return _staged(x0, device), {name: _staged(value, device) for name, value in cond.items()}

    return batch


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
    tokenize, listed = teacher.conditioner.tokenize, load_prompts(spec.prompts)
    if ranks.rank() == 0 and (num := num_cut(teacher, listed[:PROBED])):
        log.warning(
            "prompts: %d of the first %d are longer than the tokenizer takes, and are cut", num, len(listed[:PROBED])
        )
    stream = PromptStream(listed, tokenize, share, seed + 2, ranks.rank(), ranks.world_size())

    def batch(index: int) -> tuple[Tensor, Cond]:
        ids, tokens = stream(index)
        return _staged(ids, device), {name: _staged(value, device) for name, value in tokens.items()}

    return batch


def with_cached_prompts(spec: Spec, teacher: Teacher, at_most: int, device: torch.device) -> Teacher:
    """The teacher, which looks its training prompts up if there are at most that many distinct ones."""
    if spec.prompts is None or len(listed := set(load_prompts(spec.prompts))) > at_most:
        return teacher
    from dmd2.teachers.text_cache import CachedConditioner

    cached = CachedConditioner(teacher.conditioner.to(device), sorted(listed))  # type: ignore[arg-type]
    log.info("prompts: the embeddings of %d are computed once", len(listed))
    return dataclasses.replace(teacher, conditioner=cached)


def check_encoder(manifest: Path, facts: Mapping[str, Any], codec: Any) -> None:
    """Raises UserError if the facts of latents name another autoencoder than the codec has, or another scaling."""
    if getattr(codec, "vae", None) is None or "encoder_sha256" not in facts:
        return
    ours = codec.facts
    if wrong := [key for key in ("encoder_sha256", "scaling_factor", "shift_factor") if facts.get(key) != ours[key]]:
        key = wrong[0]
        raise UserError(
            f"{manifest}: latents of another autoencoder: {key} is {facts.get(key)}, that of the teacher's components "
            f"{ours[key]}; delete the latents and run the workflow again, or restore the components"
        )


def num_cut(teacher: Teacher, prompts: Sequence[str]) -> int:
    """The number of prompts that the teacher's tokenizer cuts; 0 for a teacher of classes."""
    count = getattr(teacher.conditioner, "num_too_long", None)
    return count(prompts) if count else 0


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
