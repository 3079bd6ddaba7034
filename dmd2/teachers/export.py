"""Exports a student to the folder layout of diffusers, where a stock pipeline loads it offline and samples with it.

`LCMScheduler` samples exactly as DMD2's students do: x0 at each level, then fresh noise at the next one. It is saved so
that `num_inference_steps` alone gives the student's levels. Guidance must be turned off: `guidance_scale=0`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from dmd2.config import DiffusersTeacherConfig
from dmd2.errors import UserError
from dmd2.files import write_text
from dmd2.method.denoiser import Cond
from dmd2.teachers.diffusers_folder import load_autoencoder, load_text
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, stock_unet
from dmd2.teachers.lora import Role
from dmd2.teachers.predictions import FLOW

LORA_FILE = "pytorch_lora_weights.safetensors"


def student_scheduler(teacher: DiffusersTeacherConfig, levels: Sequence[int]) -> Any:
    """The `LCMScheduler` whose timesteps are the student's levels, for `num_inference_steps = len(levels)`.

    Its schedule ends at the first level: a student that starts at level 399 has the first 400 betas. Raises UserError
    for flow matching, which the scheduler does not know, and for levels that are not evenly spaced down to 0.
    """
    from diffusers import LCMScheduler

    if teacher.prediction == FLOW:
        raise UserError("export: LCMScheduler has no flow matching; a student of such a teacher has no stock scheduler")
    known = stock_levels(levels[0] + 1, len(levels))
    if list(levels) != known:
        raise UserError(
            f"export: levels {list(levels)} are not those of LCMScheduler, {known}; use evenly spaced ones, or sample "
            f"with this project"
        )
    options: dict[str, Any] = {
        "num_train_timesteps": levels[0] + 1,
        "beta_start": teacher.beta_start,
        "beta_end": teacher.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": teacher.prediction,
        "original_inference_steps": len(levels),
        "steps_offset": 1,  # which Stable Diffusion has, and LCMScheduler does not use
    }
    if levels[0] + 1 < teacher.num_levels:
        whole = LCMScheduler(**{**options, "num_train_timesteps": teacher.num_levels})
        options["trained_betas"] = whole.betas[: levels[0] + 1].tolist()
    return LCMScheduler(**options)


def stock_levels(num_levels: int, num_steps: int) -> list[int]:
    """The timesteps, descending, of `LCMScheduler` with `num_levels` noise levels and `num_steps` original steps."""
    return [i * (num_levels // num_steps) - 1 for i in range(num_steps, 0, -1)]


def has_stock_scheduler(teacher: DiffusersTeacherConfig, levels: Sequence[int]) -> bool:
    """Whether `student_scheduler` knows the student's levels and the teacher's kind of prediction."""
    return teacher.prediction != FLOW and list(levels) == stock_levels(levels[0] + 1, len(levels))


@torch.no_grad()
def sample_as_stock(
    denoiser: DiffusersDenoiser | Role,
    cond: Cond,
    scheduler: Any,
    num_steps: int,
    noise: Tensor,
    rngs: Sequence[torch.Generator],
) -> Tensor:
    """Samples x0 (B, ...) from unit Gaussian `noise` (B, ...), in the arithmetic of a stock pipeline with `scheduler`.

    Equal to it bit for bit in float32 on the CPU, and to `sampling.few_step` up to rounding: a pipeline's latents have
    unit variance, sqrt(abar) x0 + sqrt(1 - abar) eps, its sqrt(abar) are products in float32, and x0 is multiplied by a
    factor that differs from 1 by less than 1e-7. `rngs` (B) draw the noise between steps, one generator each.
    """
    scheduler.set_timesteps(num_steps)
    x = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        out = denoiser.output(scheduler.scale_model_input(x, time), time.to(x.device).expand(len(x)), cond)
        x = scheduler.step(out, time, x, generator=list(rngs)).prev_sample
    return x


def export_network(
    out: Path,
    denoiser: DiffusersDenoiser,
    scheduler: Any,
    *,
    components: Path | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes a student's U-Net, scheduler and model card; with a `components` folder a whole pipeline.

    Replaces what `out` had. `facts` are lines of the model card.
    """
    unet, pooled = stock_unet(denoiser), denoiser.pooled

    def write(folder: Path) -> None:
        if components is None:
            unet.save_pretrained(folder / "unet", safe_serialization=True)
            scheduler.save_pretrained(folder / "scheduler")
        else:
            _pipeline(unet, scheduler, components, pooled).save_pretrained(folder, safe_serialization=True)

    _write(out, write, _card(scheduler, dict(facts or {}), "pipeline" if components is not None else "unet", pooled))


def export_adapter(out: Path, role: Role, scheduler: Any, *, facts: Mapping[str, str] | None = None) -> None:
    """Writes a student's adapters, scheduler and model card.

    The file has rank and alpha: without them stock pipelines scale by 1.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    lora, pooled = role.shared.adapters[role.name], role.shared.network.pooled
    kind = StableDiffusionXLPipeline if pooled else StableDiffusionPipeline
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)).to_dict()
    plain = json.loads(json.dumps(settings, default=_jsonable))
    state = {name: value.detach().cpu().contiguous() for name, value in role.state_dict().items()}

    def write(folder: Path) -> None:
        kind.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=plain)
        scheduler.save_pretrained(folder / "scheduler")

    _write(out, write, _card(scheduler, dict(facts or {}), "lora", pooled))


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _pipeline(unet: Any, scheduler: Any, components: Path, pooled: bool) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    vae = load_autoencoder(components)
    if vae.config.shift_factor:
        raise UserError(f"{components / 'vae'}: stock pipelines ignore shift_factor; export the U-Net alone")
    tokenizers, encoders = load_text(components, pooled)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": encoders[0], "tokenizer": tokenizers[0]}
    if pooled:
        second = {"text_encoder_2": encoders[1], "tokenizer_2": tokenizers[1]}
        return StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _write(out: Path, write: Callable[[Path], None], card: str) -> None:
    """Fills a new folder beside `out`, which then takes its place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        write(new)
        write_text(new / "README.md", card)
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


LOADING = {
    "pipeline": """pipe = DiffusionPipeline.from_pretrained("PATH OF THIS FOLDER")
""",
    "unet": """unet = UNet2DConditionModel.from_pretrained("PATH OF THIS FOLDER", subfolder="unet")
pipe = DiffusionPipeline.from_pretrained("BASE MODEL", unet=unet)
pipe.scheduler = LCMScheduler.from_pretrained("PATH OF THIS FOLDER", subfolder="scheduler")
""",
    "lora": """pipe = DiffusionPipeline.from_pretrained("BASE MODEL")
pipe.load_lora_weights("PATH OF THIS FOLDER", weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = LCMScheduler.from_pretrained("PATH OF THIS FOLDER", subfolder="scheduler")
""",
}
TITLES = {"pipeline": "pipeline", "unet": "U-Net", "lora": "low-rank adapters"}


def _card(scheduler: Any, facts: dict[str, str], kind: str, pooled: bool) -> str:
    """The model card, with the tags that model hubs read."""
    steps = scheduler.config.original_inference_steps
    levels = stock_levels(scheduler.config.num_train_timesteps, steps)
    listed = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    pipeline = "StableDiffusionXLPipeline" if pooled else "StableDiffusionPipeline"
    names = {"pipeline": ["DiffusionPipeline"], "unet": ["DiffusionPipeline", "LCMScheduler", "UNet2DConditionModel"]}
    imports = ", ".join(names.get(kind, ["DiffusionPipeline", "LCMScheduler"]))
    base = f"base_model: {facts['base model']}\n" if "base model" in facts else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, dmd2, distillation{", lora" if kind == "lora" else ""}]
{base}---

# A student of DMD2 with {steps} step{"s" if steps > 1 else ""}: {TITLES[kind]}

Distilled with DMD2 (Improved Distribution Matching Distillation, arXiv 2405.14867). It samples at the timesteps
{levels} of the teacher, without classifier-free guidance. The terms of the teacher's licence
apply to it.

{listed}
```python
from diffusers import {imports}

{LOADING[kind]}image = pipe("PROMPT", num_inference_steps={steps}, guidance_scale=0).images[0]
```

Pass both arguments: the defaults of {pipeline} are 50 steps with guidance.
"""
