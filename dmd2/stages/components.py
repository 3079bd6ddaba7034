"""The stage that makes the components of a text-to-image teacher beside its denoiser.

They are the autoencoder, tokenizers and text encoders, in the folder layout of diffusers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.config import DiffusersTeacherConfig, digit_pairs
from dmd2.datasets import ShardReader
from dmd2.errors import UserError
from dmd2.files import sha256, write_json
from dmd2.lineage.records import provenance
from dmd2.lineage.spec import Spec


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
        from dmd2.teachers.components import link_components

        facts = link_components(teacher.weights, folder)
    elif teacher.training is not None:
        facts = _trained(spec, images, folder)
    else:
        raise UserError("teacher: neither `training` nor `weights` is set, so there is no text encoder or autoencoder")
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(record, {"files": files, **facts, "provenance": provenance(spec)})


def _trained(spec: Spec, images: Path | None, folder: Path) -> dict[str, Any]:
    """Trains autoencoder and text encoder; the scheduler's configuration says which noise levels they go with."""
    from diffusers import DDIMScheduler

    from dmd2.teachers.fit_autoencoder import fit_autoencoder
    from dmd2.teachers.fit_text_encoder import fit_text_encoder

    if images is None:
        raise UserError("--images is missing: these components are trained on them")
    teacher, data = spec.need("teacher"), spec.need("data")
    reader = ShardReader(images, spec.upstream["shards"])
    content = reader.read(range(len(reader)), ["image", "txt"])
    trained = set(digit_pairs.prompts(data.captions.subset))
    chosen = np.flatnonzero([str(caption) in trained for caption in content["txt"]])
    unseen = [caption for caption in digit_pairs.prompts() if caption not in trained]
    targets, others = ({text: digit_pairs.composition(text) for text in part} for part in (sorted(trained), unseen))
    settings = teacher.training.components
    facts = {
        "autoencoder": fit_autoencoder(content["image"][chosen], settings, folder),
        "text_encoder": fit_text_encoder(targets, settings, folder, unseen=others or None),
    }
    levels = {"num_train_timesteps": teacher.num_levels, "beta_start": teacher.beta_start, "beta_end": teacher.beta_end}
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = DDIMScheduler(**levels, **options, beta_schedule="scaled_linear", prediction_type=teacher.prediction)
    scheduler.save_pretrained(folder / "scheduler")
    return facts
