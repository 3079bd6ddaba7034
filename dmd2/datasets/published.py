"""Shards that this workflow made elsewhere, used where they lie: `data.path` names their `manifest.json`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dmd2 import files
from dmd2.config.data import is_url
from dmd2.datasets import remote
from dmd2.datasets.shards import FORMAT
from dmd2.errors import UserError
from dmd2.lineage import records
from dmd2.lineage.spec import Spec

log = logging.getLogger(__name__)
CONNECTIONS = 16
"""Shards that are looked for at a time."""


def adopt(manifest_path: Path | str, source: str, spec: Spec) -> dict[str, Any]:
    """Writes a manifest of the shards that the manifest `source`, a path or URL, lists; returns it.

    No shard is read or copied: their names become locations, and a reader fetches and checks each when it needs it.
    Digest and content are those of shards made here, so that everything made from them is the same.

    Raises UserError if `source` is missing, not a manifest or of another configuration than `spec`, and naming the
    shard, if one is missing or has another size.
    """
    where = remote.shown(source) if is_url(source) else source
    try:
        with remote.open_location(source) as file:
            manifest = json.loads(file.read())
    except FileNotFoundError:
        raise UserError(f"data.path: {where} does not exist; correct the path or make the shards there") from None
    except ValueError as error:
        raise UserError(f"data.path: {where}: damaged JSON ({error}); upload it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.get("shards"):
        raise UserError(f"data.path: {where}: not a shard manifest of format {FORMAT}; correct the path")
    if (found := manifest.get("provenance", {}).get("digest")) != spec.digest:
        raise UserError(
            f"data.path: {where}: made with configuration {found}, but this data section is {spec.digest}; give it the "
            f"values that the shards were made with"
        )
    for shard in manifest["shards"]:
        if os.path.basename(shard["name"]) != shard["name"] or not shard["name"].endswith(".tar"):
            raise UserError(
                f"data.path: {where}: {shard['name']!r} is not the name of a shard beside it; upload it again"
            )
    base = source if is_url(source) else os.path.abspath(source)
    shards = [{**shard, "name": remote.join(base, shard["name"])} for shard in manifest["shards"]]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(_insist, shards))
    log.info("shards: %d samples in %d shards at %s", manifest["num_samples"], len(shards), where)
    path = Path(manifest_path)
    files.write_json(path.with_name("provenance.json"), {**records.provenance(spec), "shards_at": where})
    files.write_json(path, {**manifest, "shards": shards})
    return {**manifest, "shards": shards}


def _insist(shard: Mapping[str, Any]) -> None:
    """Raises UserError for a shard that is missing or has another size than the manifest says."""
    location = shard["name"]
    try:
        size = remote.identify(location).size if is_url(location) else os.stat(location).st_size
    except FileNotFoundError:
        raise UserError(f"data.path: {location} is missing beside its manifest; upload it") from None
    if size not in (None, shard["bytes"]):
        raise UserError(f"data.path: {location} has {size} bytes instead of {shard['bytes']}; upload it again")
