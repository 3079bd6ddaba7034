"""Uses the weights of a finished run outside the workflow: images, and an export for stock pipelines.

The record beside the weights has their configuration, so nothing else is needed to load them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dmd2.config import Data, Sampler, TeacherConfig, Train
from dmd2.config.digit_pairs import composition
from dmd2.config.reading import parse
from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.lineage.records import read_record
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Teacher, move
from dmd2.method.inputs import part_of
from dmd2.progress import Counter
from dmd2.stages.open_weights import components_folder
from dmd2.stages.sample import from_student, from_teacher, num_passes
from dmd2.teachers import load_teacher
from dmd2.teachers.weights import read_weights
from dmd2.training import ranks
from dmd2.training.rng import SampleNoise

NAMES = ("generator.safetensors", "teacher.safetensors")
COMPONENTS = "components/components.json"


class Model(NamedTuple):
    """A teacher or student that is ready to sample."""

    spec: Spec
    teacher: Teacher
    sampler: Sampler
    components: Path | None  # folder of a text-to-image teacher's other networks

    @property
    def passes(self) -> int:
        """Network passes per image."""
        return num_passes(self.spec, self.teacher, self.sampler)


def open_run(weights: Path, device: torch.device | str, *, steps: int = 25, guidance_scale: float = 2.0) -> Model:
    """Loads a student or teacher from its weight file or its folder in `results/PRESET/`.

    `steps` and `guidance_scale` are of a teacher's sampler; a student's steps are its run's. Raises UserError if
    there are no weights with a record, or if a text-to-image teacher's components are gone.
    """
    path = next((weights / name for name in NAMES if (weights / name).exists()), weights)
    record = read_record(path)
    spec = parse(Spec, record["provenance"]["spec"], f"record of {path}")
    teacher = spec.need("teacher")
    folder = None
    if not isinstance(teacher, TeacherConfig) and teacher.own is not None:
        raise UserError(
            f"{path} is a model with a scheduler of its own, not a student of DMD2; sample it by a row of a table"
        )
    if not isinstance(teacher, TeacherConfig):
        components = path.parent.parent / COMPONENTS
        if not components.exists():
            raise UserError(f"{components}: the text encoder and autoencoder of {path} are not there; copy them along")
        folder = components_folder(components, read_json(components)["provenance"]["digest"])
    if spec.stage == "teacher" and isinstance(teacher, TeacherConfig):
        sampler = Sampler(kind="heun", num_steps=max(2, steps))
    elif spec.stage == "teacher":
        options = {"timestep_spacing": "trailing"}
        keys: dict[str, Any] = {"scheduler": "DDIMScheduler", "options": options, "guidance_scale": guidance_scale}
        sampler = Sampler(kind="diffusers", num_steps=steps, **keys)
    else:
        sampler = Sampler(kind="few_step")
        spec = spec.model_copy(update={"train": spec.train or Train()})
    bare = teacher.model_copy(update={"training": None, "weights": None})
    loaded = load_teacher(bare, spec.need("data"), path, components=folder).to(device)
    return Model(spec.model_copy(update={"teacher": bare}), loaded, sampler, folder)


def images_of(model: Model, labels: Sequence[Any], seed: int) -> Any:
    """One image per label (class number or prompt): uint8 (B, H, W, C). Image i has the noise of sample i of `seed`."""
    spec, teacher, sampler, _ = model
    device = teacher.grid.sigmas.device
    cond = teacher.conditioner.embed(move(teacher.conditioner.tokenize(labels), device))
    noise = SampleNoise(seed, range(len(labels)), teacher.sample_shape, device)
    if sampler.kind == "few_step":
        x0 = from_student(spec, teacher, cond, noise)
    else:
        x0 = from_teacher(spec, teacher, cond, noise, sampler)
    return teacher.codec.decode(x0)


def generate(
    weights: Path, labels: Sequence[Any], out: Path, *, num: int, seed: int, steps: int, guidance_scale: float
) -> list[Path]:
    """Writes `num` images per label as PNG to `out`; returns their paths. Raises UserError for unsuitable labels."""
    device = ranks.device_of("auto")
    model = open_run(weights, device, steps=steps, guidance_scale=guidance_scale)
    _check(weights, model.spec.need("data"), labels)
    start = time.perf_counter()
    images = images_of(model, [label for label in labels for _ in range(num)], seed)
    took = (time.perf_counter() - start) / len(images)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, image in enumerate(images):
        written.append(out / f"{number:04d}.png")
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(written[-1])
    Counter("generate", len(images))(len(images))
    print(f"{len(images)} images in {out}, {model.passes} passes and {1000 * took:.0f} ms each")
    return written


def _check(weights: Path, data: Data, labels: Sequence[Any]) -> None:
    """Raises UserError for labels of the other kind, for classes and captions that the data have not."""
    captions = data.captions is not None
    if captions != isinstance(labels[0], str):
        wanted = "prompts: use --prompt" if captions else "classes: use --class"
        raise UserError(f"{weights} is a model of {wanted}")
    for label in labels:
        if not captions and not 0 <= label < data.classes:
            raise UserError(f"--class {label}: {weights} has the classes 0 to {data.classes - 1}")
        if data.source == "digit_pairs":
            composition(label)


def export(weights: Path, out: Path, *, lora: bool) -> None:
    """Writes a text-to-image student as a folder of diffusers; with `lora` its adapters and scheduler alone.

    A stock pipeline samples from it with `num_inference_steps` and `guidance_scale=0`. Raises UserError for a teacher,
    for a model of classes, and for adapters of a run that trained none.
    """
    from dmd2.teachers.diffusers_unet import DiffusersDenoiser
    from dmd2.teachers.export import export_adapter, export_network, student_scheduler

    model = open_run(weights, "cpu")
    denoiser, train = model.teacher.denoiser, model.spec.train
    if train is None or not isinstance(denoiser, DiffusersDenoiser):
        raise UserError(f"{weights} is no text-to-image student, and only these are exported")
    steps = model.teacher.grid.student_steps(train.num_steps, train.student_levels)
    scheduler = student_scheduler(model.spec.need("teacher"), steps.levels)
    facts = {"run": model.spec.name, "configuration": model.spec.digest, "steps": str(train.num_steps)}
    if lora:
        export_adapter(out, _adapter(weights, train), scheduler, facts=facts)
    else:
        export_network(out, denoiser, scheduler, components=model.components, facts=facts)
    print(f"{out}: {'adapters' if lora else 'a pipeline'} for diffusers; README.md has the call")


def _adapter(weights: Path, train: Train) -> Any:
    """The generator's adapters on the frozen teacher, as the run's last iteration left them."""
    from dmd2.teachers.lora import load_adapter, roles

    folder = weights if weights.is_dir() else weights.parent
    networks = folder / "networks.safetensors"
    if train.generator_lora is None:
        raise UserError(f"{folder}: this run trained no adapters (train.generator_lora); export it without --lora")
    teacher = open_run(folder.parent / "teacher", "cpu").teacher
    role = roles(teacher.denoiser, {"student": train.generator_lora})["student"]  # type: ignore[arg-type]
    read_record(networks)
    state = part_of(read_weights(networks), "generator.")
    load_adapter(role, state, str(networks))
    return role
