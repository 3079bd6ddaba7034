"""Tar shards with a manifest: how every set of samples is stored, be it images, latents, pairs or generated images.

    manifest.json       counts, sizes and checksums of the shards, layout of the fields; written last
    provenance.json     when and by which code they were made, apart so that sets of equal content have equal manifests
    shard-00000.tar     WebDataset samples `000000000.image.png`, `000000000.cls`, ...
    shard-00000.json    the shard's sidecar: what decided its content, its checksum, and where each member lies

The same input gives the same bytes. A sample's id is its position in the whole set, its key the id in nine digits.
Member positions are in the sidecars and not in the manifest: for ImageNet's 1.28 million samples they come to some
60 MB, of which a reader loads a shard's part when it first touches the shard; the manifest stays below 1 MB.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dmd2 import records
from dmd2.datasets import members
from dmd2.errors import UserError
from dmd2.spec import Spec

FORMAT = 1
Fields = Mapping[str, Sequence[Any] | np.ndarray]
"""Values of consecutive samples by field (see `members`), all of one length."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_shards(
    manifest_path: Path | str,
    num_samples: int,
    shard_size: int,
    make: Callable[[range], Fields],
    spec: Spec,
    *,
    batch_size: int | None = None,
    inputs: str = "",
    check: Callable[[range, Fields], Mapping[str, Any]] | None = None,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], object] | None = None,
    progress: Callable[[int], object] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes samples 0 .. num_samples-1 as shards beside `manifest_path`; returns the manifest, written last.

    `make(ids)` gives the samples `ids`, at most `batch_size` at a time (default: a whole shard). It must be a function
    of the ids: a shard that is already there, undamaged and made under the same `spec` and `inputs` (a checksum of what
    is read besides the spec) is kept. `check` sees the first batch of each new shard; what it returns is kept with the
    shard in the manifest. With several ranks each writes every world-th shard, and `barrier` waits for all of them.
    `progress` is called with the sample count of each shard.

    Raises UserError naming the sample for a value that cannot be stored (NaN, infinity, another shape than the
    others'), and naming the file when the disk is full; finished shards stay.
    """
    if world > 1 and barrier is None:
        raise ValueError("several ranks need a barrier, or the manifest is written before the last shard")
    wait = barrier or (lambda: None)
    manifest_path = Path(manifest_path)
    if rank == 0:
        manifest_path.unlink(missing_ok=True)  # while shards change there is no valid set
    plan = shard_ranges(num_samples, shard_size)
    for number in range(rank, len(plan), world):
        path, ids = shard_path(manifest_path, number), plan[number]
        if not _is_finished(path, ids, spec.digest, inputs):
            _write_shard(path, ids, batch_size or shard_size, make, check, {"digest": spec.digest, "inputs": inputs})
        if progress is not None:
            progress(len(ids))
    wait()
    if rank == 0:
        _write_manifest(manifest_path, plan, spec, inputs, facts or {})
    wait()
    return read_manifest(manifest_path, spec.digest)


def shard_ranges(num_samples: int, shard_size: int) -> list[range]:
    """The sample ids of each shard."""
    if num_samples < 1 or shard_size < 1:
        raise UserError(f"{num_samples} samples in shards of {shard_size}: both must be at least 1")
    return [range(start, min(start + shard_size, num_samples)) for start in range(0, num_samples, shard_size)]


def shard_path(manifest_path: Path, number: int) -> Path:
    """Where shard `number` of a set lies."""
    return manifest_path.parent / f"shard-{number:05d}.tar"


def read_manifest(manifest_path: Path | str, digest: str | None = None) -> dict[str, Any]:
    """The manifest of a set of shards.

    Raises UserError naming the file if it is missing, damaged or not a manifest, and if it was made under another
    configuration than `digest`.
    """
    manifest = records.read_json(manifest_path)
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


def _is_finished(path: Path, ids: range, digest: str, inputs: str) -> bool:
    """Whether the shard holds `ids`, made under the same configuration and inputs, undamaged."""
    sidecar = path.with_suffix(".json")
    if not (path.exists() and sidecar.exists()):
        return False
    try:
        found = records.read_json(sidecar)
    except UserError:
        return False  # a damaged sidecar proves nothing: the shard is written again
    wanted = {"digest": digest, "inputs": inputs, "start": ids.start, "count": len(ids), "bytes": path.stat().st_size}
    return {key: found.get(key) for key in wanted} == wanted and records.sha256(path) == found.get("sha256")


def _write_shard(
    path: Path,
    ids: range,
    batch_size: int,
    make: Callable[[range], Fields],
    check: Callable[[range, Fields], Mapping[str, Any]] | None,
    origin: Mapping[str, str],
) -> None:
    """Writes one shard and then its sidecar, each atomically: a sidecar vouches for a whole tar."""
    for leftover in path.parent.glob(f".{path.stem}.*.tmp"):
        leftover.unlink()  # of a writer that was killed
    layouts: dict[str, members.Layout] = {}
    facts: Mapping[str, Any] = {}
    with _new_file(path) as temporary:
        with temporary.open("wb") as stream, _tar_writer(stream) as tar:
            for start in range(ids.start, ids.stop, batch_size):
                batch = range(start, min(start + batch_size, ids.stop))
                fields = make(batch)
                if check is not None and start == ids.start:
                    facts = check(batch, fields)
                for sample in _encoded(batch, fields, layouts):
                    tar.write(sample)
        index = _member_index(temporary)
        size, checksum = temporary.stat().st_size, records.sha256(temporary)
    sidecar = {
        **origin,
        "start": ids.start,
        "count": len(ids),
        "bytes": size,
        "sha256": checksum,
        "fields": {field: layouts[field] for field in sorted(layouts)},
        "facts": dict(facts),
        "index": index,
    }
    with _new_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(sidecar, allow_nan=False), encoding="utf-8")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """`records.atomic`, with the file's name in the error when there is no room for it."""
    try:
        with records.atomic(path) as temporary:
            yield temporary
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(
            f"{path}: could not be written ({error.strerror}); make room and run again, finished shards are kept"
        ) from error


def _tar_writer(stream: Any) -> Any:
    """WebDataset's writer, with nothing in the headers that depends on the time or the user."""
    from webdataset.writer import TarWriter

    return TarWriter(stream, encoder=False, mtime=0, user="", group="")


def _encoded(ids: range, fields: Fields, layouts: dict[str, members.Layout]) -> Iterator[dict[str, Any]]:
    """The samples of a batch for WebDataset's writer. Fills `layouts` by the first and holds the others to it."""
    for field, values in fields.items():
        if len(values) != len(ids):
            raise ValueError(f"{field}: {len(values)} values for samples {ids.start} to {ids.stop - 1}")
    if layouts and set(layouts) != set(fields):
        raise ValueError(f"samples from {ids.start} on have fields {sorted(fields)}, those before {sorted(layouts)}")
    for row, number in enumerate(ids):
        sample: dict[str, Any] = {"__key__": f"{number:09d}"}
        for field, values in fields.items():
            value = np.asarray(values[row])
            layout = layouts.setdefault(field, members.layout_of(value))
            try:
                if members.layout_of(value) != layout:
                    raise ValueError(f"{value.dtype} of shape {value.shape}, the samples before are {dict(layout)}")
                sample[field] = members.encode(field, value)
            except ValueError as error:
                raise UserError(f"sample {number}: `{field}`: {error}; mend what makes it and run again") from None
        yield sample


def _member_index(path: Path) -> list[list[int]]:
    """Offset and size of the data of every member, samples in order of id and fields in alphabetical order."""
    with tarfile.open(path) as tar:
        return [[member.offset_data, member.size] for member in tar]


def _write_manifest(
    manifest_path: Path, plan: Sequence[range], spec: Spec, inputs: str, facts: Mapping[str, Any]
) -> None:
    """Writes the manifest over shards that were all written under `spec` and `inputs`."""
    shards: list[dict[str, Any]] = []
    fields: dict[str, Any] = {}
    for number, ids in enumerate(plan):
        path = shard_path(manifest_path, number)
        sidecar_path = path.with_suffix(".json")
        sidecar = records.read_json(sidecar_path)
        found = [sidecar.get(key) for key in ("digest", "inputs", "start", "count")]
        if not path.exists() or found != [spec.digest, inputs, ids.start, len(ids)]:
            raise UserError(f"{path}: missing, or not of this set; run again, finished shards are kept")
        fields = fields or sidecar["fields"]
        if sidecar["fields"] != fields:
            raise UserError(f"{path}: its fields are {sidecar['fields']}, those of the shards before {fields}")
        entry = {key: sidecar[key] for key in ("start", "count", "bytes", "sha256", "facts")}
        shards.append({"name": path.name, **entry, "index_sha256": records.sha256(sidecar_path)})
    manifest = {
        "format": FORMAT,
        "num_samples": plan[-1].stop,
        "shard_size": len(plan[0]),
        "fields": fields,
        "facts": dict(facts),
        "shards": shards,
        "provenance": records.identity(spec),
    }
    records.write_json(manifest_path.with_name("provenance.json"), records.provenance(spec))
    with _new_file(manifest_path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
