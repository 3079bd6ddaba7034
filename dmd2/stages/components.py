"""The stage that makes the components of a text-to-image teacher beside its denoiser.

They are the autoencoder, tokenizers and text encoders, in the folder layout of diffusers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dmd2.config import DiffusersTeacherConfig
from dmd2.datasets import ShardReader
from dmd2.errors import UserError
from dmd2.files import sha256, write_json
from dmd2.lineage.records import provenance
from dmd2.lineage.spec import Spec
from dmd2.teachers.diffusers_folder import copy_components
from dmd2.teachers.fit_autoencoder import fit_autoencoder
from dmd2.teachers.fit_text_encoder import fit_text_encoder


def components(spec: Spec, images: Path | None, record: Path) -> None:
    """Writes the components to the folder of `record`, which lists their files and is written last.

    They are trained on the images and captions of a set of shards, or taken from the configured model.
    """
    teacher: DiffusersTeacherConfig = spec.need("teacher")
    folder = record.parent
    for old in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if teacher.weights is not None:
        facts = copy_components(teacher.weights, folder)
    elif teacher.training is not None:
        facts = _trained(spec, images, folder)
    else:
        raise UserError("teacher: neither `training` nor `weights` is set, so there is no text encoder or autoencoder")
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(record, {"files": files, **facts, "provenance": provenance(spec)})


def _trained(spec: Spec, images: Path | None, folder: Path) -> dict[str, Any]:
    if images is None:
        raise UserError("--images is missing: these components are trained on them")
    content = ShardReader(images, spec.upstream["shards"])
    read = content.read(range(len(content)))
    settings = spec.need("teacher").training.components
    captions = [str(caption) for caption in read["txt"]]
    facts = {"autoencoder": fit_autoencoder(read["image"], settings, folder / "vae")}
    facts["text_encoder"] = fit_text_encoder(sorted(set(captions)), settings, folder)
    return facts
