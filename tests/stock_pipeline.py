"""Samples exported students with nothing but diffusers: run as a script, with a JSON list of jobs and no network.

A job has the folder of a `pipeline`, its changes (`lora`, `unet`, `scheduler`: folders), `prompts`, `seeds` (of one
generator for each), `steps` and the file `out` for latents and images.
"""

import json
import sys

import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

torch.set_num_threads(1)


def main(jobs: list[dict]) -> None:
    for job in jobs:
        parts = {"unet": UNet2DConditionModel.from_pretrained(job["unet"], subfolder="unet")} if "unet" in job else {}
        pipe = DiffusionPipeline.from_pretrained(job["pipeline"], use_safetensors=True, **parts)
        pipe.set_progress_bar_config(disable=True)
        if "lora" in job:
            pipe.load_lora_weights(job["lora"], weight_name="pytorch_lora_weights.safetensors")
        if "scheduler" in job:
            pipe.scheduler = LCMScheduler.from_pretrained(job["scheduler"], subfolder="scheduler")

        def sample(output_type: str, pipe: DiffusionPipeline = pipe, job: dict = job) -> object:
            rngs = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
            given = {"num_inference_steps": job["steps"], "guidance_scale": 0, "generator": rngs}
            return pipe(job["prompts"], output_type=output_type, **given).images

        found = {"latents": sample("latent"), "images": torch.from_numpy((sample("np") * 255).round().astype("uint8"))}
        save_file({name: value.contiguous() for name, value in found.items()}, job["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
