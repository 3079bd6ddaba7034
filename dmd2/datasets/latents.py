"""Writes sets of latents with conditions, and of noise-image pairs.

A latent set has the fields `latent`, `cond.NAME` (tokens) and `cls` or `txt`; a pair set has `noise`, `x0` and
`cond.NAME`.

Shapes: B batch, (H, W, C) an image, `...` the shape of a sample in the network's space.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.datasets.loader import PairBatch
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shards import Batch, Fields, LeftOut, content_id, write_shards
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Codec, Cond, Conditioner

HELD_OUT = "held out of training"


def write_latents(
    images_manifest: Path | str,
    out_manifest: Path | str,
    codec: Codec,
    conditioner: Conditioner,
    spec: Spec,
    *,
    images_digest: str | None = None,
    batch_size: int = 64,
    leave_out: Callable[[str], bool] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes the latents and the tokens of the labels of an image set, shard by shard; returns the manifest.

    The first batch of every shard is decoded and compared with the images: UserError unless they are equal or, for an
    inexact codec, their PSNR is at least `codec.min_psnr`. The errors are stored with each shard. Images with a caption
    for which `leave_out` is true are left out. `options` are those of `write_shards`.
    """
    reader = ShardReader(images_manifest, images_digest)
    label = "cls" if "cls" in reader.fields else "txt"

    def kept(ids: range) -> tuple[list[int], list[LeftOut]]:
        if leave_out is None:
            return list(ids), []
        captions = reader.read(ids, [label])[label]
        out = [LeftOut(i, str(text), HELD_OUT) for i, text in zip(ids, captions, strict=True) if leave_out(str(text))]
        return [i for i in ids if i not in {item.position for item in out}], out

    def make(ids: range) -> Batch:
        wanted, out = kept(ids)
        raw = reader.read(wanted)
        tokens = _cond_fields(conditioner.tokenize(raw[label].tolist()))
        return Batch({"latent.npy": codec.encode(raw["image"], wanted), **tokens, label: raw[label]}, out)

    def check(ids: range, fields: Fields) -> dict[str, float]:
        images = reader.read(kept(ids)[0], ["image"])["image"]
        found = decode_error(images, codec.decode(codec.load(np.asarray(fields["latent.npy"]))))
        exact = found["decode_error_mean"] == 0
        if not (exact if codec.min_psnr is None else exact or found["decode_psnr"] >= codec.min_psnr):
            wanted = "they must be equal" if codec.min_psnr is None else f"at least {codec.min_psnr} dB are required"
            raise UserError(
                f"{images_manifest}: the codec reconstructs samples {ids.start} to {ids.stop - 1} with a mean error "
                f"of {found['decode_error_mean']:.3f} grey levels ({found.get('decode_psnr', 0):.1f} dB), but "
                f"{wanted}; check that the teacher's codec matches the data (resolution, channels, levels)"
            )
        return found

    size, inputs = reader.manifest["shard_size"], content_id(reader.manifest)
    return write_shards(
        out_manifest, len(reader), size, make, spec, batch_size=batch_size, check=check, inputs=inputs, **options
    )


def decode_error(images: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """Mean and largest absolute difference of two batches of uint8 images (B, H, W, C) in grey levels; PSNR in dB.

    Equal images have no PSNR.
    """
    if images.shape != decoded.shape:
        raise UserError(f"the codec decodes to {decoded.shape}, the images are {images.shape}; check the teacher")
    difference = np.abs(images.astype(np.int16) - decoded.astype(np.int16))
    found = {"decode_error_mean": float(difference.mean()), "decode_error_max": float(difference.max())}
    if difference.any():
        found["decode_psnr"] = float(10 * np.log10(255**2 / np.square(difference, dtype=np.float64).mean()))
    return found


def write_pairs(
    out_manifest: Path | str,
    num_pairs: int,
    make: Callable[[range], PairBatch],
    spec: Spec,
    *,
    shard_size: int,
    batch_size: int = 64,
    **options: Any,
) -> dict[str, Any]:
    """Writes noise-image pairs; returns the manifest.

    `make(ids)` returns the pairs `ids`; noise and x0 are stored in their dtype (float32 or float16).
    `options` are those of `write_shards`.
    """

    def fields(ids: range) -> Fields:
        pairs = make(ids)
        if pairs.noise.shape != pairs.x0.shape:
            raise ValueError(f"noise has shape {tuple(pairs.noise.shape)}, x0 {tuple(pairs.x0.shape)}")
        return {
            "noise.npy": pairs.noise.numpy(force=True),
            "x0.npy": pairs.x0.numpy(force=True),
            **_cond_fields(pairs.cond),
        }

    return write_shards(out_manifest, num_pairs, shard_size, fields, spec, batch_size=batch_size, **options)


def _cond_fields(cond: Cond) -> dict[str, np.ndarray]:
    return {f"cond.{name}.npy": value.numpy(force=True) for name, value in cond.items()}
