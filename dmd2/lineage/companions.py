"""What is beside a declared file of the workflow and belongs to it: records, shards, snapshots, components.

On a mounted disk these need not be declared; a store only gets what is (`workflow/rules/storage.smk`). No torch.
"""

from __future__ import annotations

from pathlib import PurePosixPath

RECORDED = (".safetensors", ".weights", ".npz", ".csv")
"""Ends of the names of files with a record, which has their name with `.json`."""
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of the components of a text-to-image teacher that was trained in the workflow."""


def companions(path: str) -> list[tuple[str, bool]]:
    """The companions of a file by its name, each with whether it is a folder. `path` may have wildcards in braces."""
    file = PurePosixPath(path)
    if file.name == "manifest.json":  # shards, their indexes, lists of what was left out
        return [(str(file.parent), True)]
    if file.name == "snapshots.json":
        return [(str(file.parent / "snapshots"), True)]
    if file.name == "train_log.jsonl":
        return [(str(file.parent / "tensorboard"), True)]
    if file.name == "components.json":
        return [(str(file.parent / part), True) for part in PARTS]
    if file.suffix in RECORDED:
        return [(str(file.with_suffix(".json")), False)]
    return []
