"""Tar shards with a manifest: how every set of samples is stored, be it images, latents, pairs or generated images.

    manifest.json       counts, sizes and checksums of the shards, layout of the fields; written last
    provenance.json     when and by which code they were made; not in the manifest, so that equal sets have equal ones
    shard-00000.tar     WebDataset samples `000000000.image.png`, `000000000.cls`, ...
    shard-00000.json    the shard's sidecar: what decided its content, its checksum, and where each member is

The same input gives the same bytes. A sample's id is its position in the whole set, its key in nine digits its position
in what the set is made from. The two are equal unless samples were left out there because they could not be read: a
shard covers a fixed range of positions and holds the samples that could be, so that neither a shard's bytes nor its
neighbours depend on what is left out elsewhere; ids count on over the shards, by the `start` and `count` of each.
Member positions are in the sidecars and not in the manifest: for ImageNet's 1.28 million samples they come to some
60 MB, of which a reader loads a shard's part when it first touches the shard; the manifest stays below 1 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmd2 import files
from dmd2.datasets.shard_writer import Batch, Fields, LeftOut, ShardWriter, new_file, shard_path
from dmd2.datasets.workers import each
from dmd2.errors import UserError
from dmd2.lineage import records
from dmd2.lineage.spec import Spec

FORMAT = 1


def write_shards(
    manifest_path: Path | str,
    num_samples: int,
    shard_size: int,
    make: Callable[[range], Fields | Batch],
    spec: Spec,
    *,
    batch_size: int | None = None,
    inputs: str = "",
    check: Callable[[range, Fields], Mapping[str, Any]] | None = None,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], object] | None = None,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
    left_out: Callable[[Sequence[LeftOut]], object] | None = None,
    facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    notes: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes the samples at positions 0 .. num_samples-1 as shards beside `manifest_path`; returns their manifest.

    `make(ids)` gives the samples `ids`, at most `batch_size` at a time (default: a whole shard). It must be a function
    of the ids: a shard that is already there, undamaged and made under the same `spec` and `inputs` (a checksum of what
    is read besides the spec) is kept. `check` sees the first batch of each new shard; what it returns is kept with the
    shard in the manifest. With several ranks each writes every world-th shard, and `barrier` waits for all of them;
    with several `workers` as many processes write a shard each, for which `make` and `check` are pickled.
    `progress` is called with the sample count of each shard, `left_out` with the samples that `make` left out of it
    (when shards are kept, too), `facts` when all are written; an error that they raise leaves no manifest. `notes` are
    what may differ between sets of equal content, such as a speed, for `provenance.json`.

    Raises UserError naming the sample for a value that cannot be stored (NaN, infinity, another shape than the
    others'), and naming the file when the disk is full; finished shards stay. The manifest is written last.
    """
    if world > 1 and barrier is None:
        raise ValueError("several ranks need a barrier, or the manifest is written before the last shard")
    wait = barrier or (lambda: None)
    manifest_path = Path(manifest_path)
    if rank == 0:
        manifest_path.unlink(missing_ok=True)  # while shards change there is no valid set
    plan = shard_ranges(num_samples, shard_size)
    origin = {"digest": spec.digest, "inputs": inputs}
    writer = ShardWriter(manifest_path, plan, batch_size or shard_size, make, check, origin)
    for done in each(writer, range(rank, len(plan), world), workers):
        if progress is not None:
            progress(done.num_positions)
        if left_out is not None and done.left_out:
            left_out(done.left_out)
    wait()
    if rank == 0:
        found = facts() if callable(facts) else facts or {}
        made = {**records.provenance(spec), **(notes() if notes is not None else {})}
        files.write_json(manifest_path.with_name("provenance.json"), made)
        _write_manifest(manifest_path, plan, spec, origin, found)
    wait()
    return read_manifest(manifest_path, spec.digest)


def shard_ranges(num_samples: int, shard_size: int) -> list[range]:
    """The sample ids of each shard."""
    if num_samples < 1 or shard_size < 1:
        raise UserError(f"{num_samples} samples in shards of {shard_size}: both must be at least 1")
    return [range(start, min(start + shard_size, num_samples)) for start in range(0, num_samples, shard_size)]


def read_manifest(manifest_path: Path | str, digest: str | None = None) -> dict[str, Any]:
    """The manifest of a set of shards.

    Raises UserError naming the file if it is missing, damaged or not a manifest, and if it was made under another
    configuration than `digest`.
    """
    manifest = files.read_json(manifest_path)
    if manifest.get("format") != FORMAT or "shards" not in manifest:
        raise UserError(
            f"{manifest_path}: not a shard manifest of format {FORMAT}; delete it and run the rule that writes it"
        )
    if digest is not None:
        records.expect_digest(manifest_path, manifest, digest)
    return manifest


def content_id(manifest: Mapping[str, Any]) -> str:
    """A checksum of a set's content: the `inputs` of what is made from it."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


def _write_manifest(
    manifest_path: Path, plan: Sequence[range], spec: Spec, origin: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Writes the manifest over shards that were all written under the same `origin`."""
    shards: list[dict[str, Any]] = []
    fields: dict[str, Any] = {}
    total = 0
    for number, ids in enumerate(plan):
        path = shard_path(manifest_path, number)
        sidecar_path = path.with_suffix(".json")
        sidecar = files.read_json(sidecar_path)
        wanted = {**origin, "positions": [ids.start, ids.stop]}
        if not path.exists() or {key: sidecar.get(key) for key in wanted} != wanted:
            raise UserError(f"{path}: missing, or not of this set; run again, finished shards are kept")
        fields = fields or sidecar["fields"]
        if sidecar["count"] and sidecar["fields"] != fields:
            raise UserError(f"{path}: its fields are {sidecar['fields']}, those of the shards before {fields}")
        entry = {key: sidecar[key] for key in ("count", "bytes", "sha256", "facts")}
        index_sha256 = files.sha256(sidecar_path)
        shards.append({"name": path.name, "start": total, **entry, "index_sha256": index_sha256})
        total += sidecar["count"]
    manifest = {
        "format": FORMAT,
        "num_samples": total,
        "shard_size": len(plan[0]),
        "fields": fields,
        "facts": dict(facts),
        "shards": shards,
        "provenance": records.identity(spec),
    }
    with new_file(manifest_path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
