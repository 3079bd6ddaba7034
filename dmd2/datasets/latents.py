"""Writes sets of latents with conditions, and of noise-image pairs.

A latent set has the fields `latent`, `cond.NAME` (tokens) and `cls` or `txt`; a pair set has `noise`, `x0` and
`cond.NAME`.

Shapes: B batch, (H, W, C) an image, `...` the shape of a sample in the network's space.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmd2 import files
from dmd2.config import digit_pairs
from dmd2.datasets.loader import PairBatch
from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shard_writer import Batch, Fields, LeftOut, shard_path
from dmd2.datasets.shards import content_id, write_shards
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Codec, Cond, Conditioner

log = logging.getLogger(__name__)
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
    **options: Any,
) -> dict[str, Any]:
    """Writes the latents and the tokens of the labels of an image set, shard by shard; returns the manifest.

    The first batch of every shard is decoded and compared with the images: UserError unless they are equal or, for an
    inexact codec, their PSNR is at least `codec.min_psnr`. The errors are kept with each shard, their mean PSNR and
    `codec.facts` (a mapping such as scaling factor and posterior seed, if the codec has it) in the manifest's facts,
    and this rank's images per second and cut captions in `provenance.json`. With `captions.subset: training` in the
    spec's data, the images of held-out captions are left out. `options` are those of `write_shards`.
    """
    encoder = _Encoder(ShardReader(images_manifest, images_digest), codec, conditioner, held_out(spec))
    manifest = encoder.reader.manifest

    def facts() -> dict[str, Any]:
        shards = range(-(-len(encoder.reader) // manifest["shard_size"]))
        sidecars = [files.read_json(shard_path(Path(out_manifest), n).with_suffix(".json")) for n in shards]
        return {**getattr(codec, "facts", {}), **_summary(sidecars)}

    return write_shards(
        out_manifest,
        len(encoder.reader),
        manifest["shard_size"],
        encoder.make,
        spec,
        batch_size=batch_size,
        check=encoder.check,
        inputs=content_id(manifest) + getattr(codec, "facts", {}).get("encoder_sha256", ""),
        facts=facts,
        notes=encoder.speed,
        **options,
    )


def held_out(spec: Spec) -> Callable[[str], bool] | None:
    """Which captions' images no network is trained on: those of `captions.subset: training`, or None of them.

    Raises UserError for data without held-out captions.
    """
    data = spec.data
    if data is None or data.captions is None or data.captions.subset == "all":
        return None
    if data.source != "digit_pairs":
        raise UserError(f"captions.subset is training, but source {data.source} holds no captions out; set it to all")
    return lambda caption: digit_pairs.is_held_out(*digit_pairs.composition(caption))


class _Encoder:
    """Encodes images of a set and the tokens of their labels; measures its own speed."""

    def __init__(
        self, reader: ShardReader, codec: Codec, conditioner: Conditioner, leave_out: Callable[[str], bool] | None
    ):
        self.reader, self._codec, self._conditioner, self._leave_out = reader, codec, conditioner, leave_out
        self._label = "cls" if "cls" in reader.fields else "txt"
        self._num, self._seconds = 0, 0.0

    def make(self, ids: range) -> Batch:
        """The fields of the samples `ids` without those that are left out."""
        start = time.perf_counter()
        wanted, out = self._kept(ids)
        if not wanted:
            return Batch({}, out)
        raw = self.reader.read(wanted)
        labels = raw[self._label]
        tokens = _cond_fields(self._conditioner.tokenize(labels.tolist()))
        fields = {"latent.npy": self._codec.encode(raw["image"], wanted), **tokens, self._label: labels}
        self._num += len(wanted)
        self._seconds += time.perf_counter() - start
        return Batch(fields, out)

    def check(self, ids: range, fields: Fields) -> dict[str, float]:
        """The errors of decoded latents against their images. Raises UserError if they are too large."""
        wanted = self._kept(ids)[0]
        if not wanted:
            return {}
        images = self.reader.read(wanted, ["image"])["image"]
        found = decode_error(images, self._codec.decode(self._codec.load(np.asarray(fields["latent.npy"]))))
        limit, exact = self._codec.min_psnr, found["decode_error_mean"] == 0
        if not exact and (limit is None or found["decode_psnr"] < limit):
            rule = "they must be equal" if limit is None else f"at least {limit} dB are required"
            raise UserError(
                f"{self.reader.path}: the codec reconstructs samples {ids.start} to {ids.stop - 1} with a mean error "
                f"of {found['decode_error_mean']:.3f} grey levels ({found['decode_psnr']:.1f} dB), but {rule}; "
                f"check that the teacher's codec matches the data (resolution, channels, levels)"
            )
        return found

    def speed(self) -> dict[str, Any]:
        """How many images this rank encoded per second, for the provenance; empty if all shards were kept."""
        if not self._num:
            return {}
        found: dict[str, Any] = {"images": self._num, "images_per_second": round(self._num / self._seconds, 2)}
        if num := getattr(self._conditioner, "num_truncated", 0):
            log.warning("latents: %d of %d captions are longer than the tokenizer takes and are cut", num, self._num)
            found["captions_cut"] = num
        return {"encoding": found}

    def _kept(self, ids: range) -> tuple[list[int], list[LeftOut]]:
        if self._leave_out is None:
            return list(ids), []
        captions = self.reader.read(ids, [self._label])[self._label].tolist()
        out = [LeftOut(i, text, HELD_OUT) for i, text in zip(ids, captions, strict=True) if self._leave_out(text)]
        absent = {item.position for item in out}
        return [i for i in ids if i not in absent], out


def _summary(sidecars: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean PSNR in dB of the shards whose latents are inexact, and the number of images left out, where there are."""
    found: dict[str, Any] = {}
    if psnr := [item["facts"]["decode_psnr"] for item in sidecars if "decode_psnr" in item["facts"]]:
        found["decode_psnr"] = float(np.mean(psnr))
    if left_out := sum(len(item["left_out"]) for item in sidecars):
        found["held_out"] = left_out
    return found


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
