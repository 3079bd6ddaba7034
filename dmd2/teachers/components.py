"""Components folders of the workflow, linked from a user's model, and their record.

The record `components.json`, which the workflow writes, has the SHA-256 of each file.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dmd2.config import ModelFolder
from dmd2.downloads.hub import resolve
from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.teachers.diffusers_folder import WEIGHTS, parts_of, weight_files

RECORD = "components.json"
SETTINGS = ("*.json", "*.txt")


def link_components(model: ModelFolder, out: Path, *, copy: bool = False) -> dict[str, Any]:
    """Fills the components folder `out` from a user's model; returns where the model came from, for the record.

    Weights become links to the user's files (`copy`: copies), under their plain names if the model has a variant;
    settings and vocabularies are copied. Raises UserError for a missing component.
    """
    source = resolve(model)
    pooled = (source / "text_encoder_2").is_dir()
    for part in parts_of(pooled):
        if not (source / part).is_dir():
            raise UserError(f"{source}: no component {part}/; it must have {', '.join(parts_of(pooled))}")
        target = out / part
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for pattern in SETTINGS:
            for path in (source / part).glob(pattern):
                if ".index." not in path.name:
                    shutil.copyfile(path, target / path.name)
        if part in ("vae", "text_encoder", "text_encoder_2"):
            _link_weights(source, part, model.variant, target, copy)
    return {"origin": {"path": model.path, "revision": model.revision, "variant": model.variant}}


def _link_weights(source: Path, part: str, variant: str | None, target: Path, copy: bool) -> None:
    files = weight_files(source, part, variant)
    index = [] if len(files) == 1 else sorted((source / part).glob("*.index.json"))
    if len(files) > 1 and variant:
        raise UserError(f"{source / part}: variant {variant} is split into {len(files)} files; save it as one")
    for path in (*files, *index):
        name = f"{WEIGHTS.get(part, 'model')}.safetensors" if len(files) == 1 else path.name
        if not path.is_file():
            raise UserError(f"{path}: no such file, but its index lists it; fetch it again")
        if copy or path in index:
            shutil.copyfile(path, target / name)
        else:
            (target / name).symlink_to(path.resolve())


def read_record(folder: Path) -> dict[str, str]:
    """The recorded SHA-256 of each file. Raises UserError if a file is missing; contents are not read again."""
    digests = read_json(folder / RECORD).get("files")
    if not isinstance(digests, dict):
        raise UserError(f"{folder / RECORD}: no table `files`; delete the folder and run the workflow again")
    for name in digests:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: recorded in {RECORD}, but missing; restore it or make the folder again")
    return digests


def autoencoder_digest(folder: Path) -> str:
    """The recorded SHA-256 of the autoencoder's weights, which distinguishes latents of different autoencoders."""
    digests = read_record(folder)
    found = [value for name, value in digests.items() if name.startswith("vae/") and name.endswith(".safetensors")]
    if not found:
        raise UserError(f"{folder / RECORD}: no weights of vae/; delete the folder and run the workflow again")
    return "-".join(found)
